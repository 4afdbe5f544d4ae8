/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rec.h: frames of the peer link: how they are checked, and made out of guests' frames. */
#ifndef LS_REC_H
#define LS_REC_H

#include "csum.h"
#include "maps.h"
#include "parse.h"
#include "siphash.h"

static __always_inline int is_peer_frame(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(LS_ETHERTYPE);
}

/* Is the record well-formed, and of a type that is sent in direction dir? */
static __always_inline enum ls_reason rec_form(const struct ls_rec *r, enum ls_dir dir)
{
	const __u32 p2s = 1 << LS_REC_ANNOUNCE | 1 << LS_REC_ASK | 1 << LS_REC_NACK |
			  1 << LS_REC_ECHO | 1 << LS_REC_MARK;
	const __u32 s2p = 1 << LS_REC_DATA | 1 << LS_REC_ANSWER | 1 << LS_REC_DGRAM |
			  1 << LS_REC_NEIGH | 1 << LS_REC_ECHO;
	__u32 may = dir == LS_DIR_P2S ? p2s : s2p;

	if (r->version != LS_ABI_VERSION)
		return LS_R_peer_version;
	if (r->dir != dir || r->type > LS_REC_MARK || !(may >> r->type & 1))
		return LS_R_peer_type;
	if (r->nsum > LS_BOUND_MAX || r->optlen > LS_OPTS_MAX ||
	    r->len != LS_REC_BASE + r->nsum * sizeof(r->bound[0]))
		return LS_R_peer_short;
	return LS_R_record_in;
}

/* Is it authentic, of this session and epoch? */
static __always_inline enum ls_reason rec_authentic(const struct ls_rec *r,
						    const struct ls_conf *conf)
{
	const struct ls_keys *keys = keys_of_gen(conf, r->key_gen);

	if (!keys)
		return LS_R_peer_term;
	if (!(ls_mutate & LS_MUTATE_TAG) &&
	    siphash(r, r->len, keys->sip_rx[0], keys->sip_rx[1]) != r->tag)
		return LS_R_peer_tag;
	/*
	 * The peer may have begun the next epoch a moment before this host did (R17).
	 * Echoes and requests for records are of no epoch. The mark of an epoch comes before
	 * that, and epochs are left out where checkpoints failed.
	 */
	if (r->epoch != conf->epoch && r->epoch != conf->epoch + 1 && r->type != LS_REC_ECHO &&
	    r->type != LS_REC_NACK && r->type != LS_REC_MARK)
		return LS_R_peer_epoch;
	return LS_R_record_in;
}

/*
 * Copies the record of a peer frame to sc->rec and checks it. Returns
 * LS_R_record_in, or why it is refused. *off is where the record stands.
 */
static __always_inline enum ls_reason rec_check(struct __sk_buff *skb, struct ls_scratch *sc,
						const struct ls_conf *conf, enum ls_dir dir,
						__u32 *off)
{
	struct ls_rec *r = &sc->rec;
	enum ls_reason why;
	struct ls_pre pre;
	__u32 len, at;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &pre, sizeof(pre)))
		return LS_R_peer_short;
	at = pre.off;
	if (pre.magic != LS_MAGIC || at < ETH_HLEN + sizeof(pre) || at > LS_REC_OFF_MAX)
		return LS_R_peer_junk;
	if (bpf_skb_load_bytes(skb, at, r, LS_REC_BASE))
		return LS_R_peer_short;
	why = rec_form(r, dir);
	if (why != LS_R_record_in)
		return why;
	len = r->nsum * sizeof(r->bound[0]);
	barrier_var(len);
	if (len > 0 && len <= sizeof(r->bound) &&
	    bpf_skb_load_bytes(skb, at + LS_REC_BASE, r->bound, len))
		return LS_R_peer_short;
	*off = at;
	return rec_authentic(r, conf);
}

/*
 * Anti-replay check (RFC 6479) of sc->rec, which is authentic. Returns LS_R_record_in,
 * or LS_R_peer_replay when its number was seen before or is older than the window. A
 * duplicate is no replay but LS_R_peer_again if one of the two is a retransmission
 * (R6): P asks for the newest record of each stream whenever something waits. *gap is
 * the first number missing before this one, 0 for none. The first number of a key
 * generation may be any, and a stream that has seen one accepts no older generation: frames from
 * before a rotation cannot be replayed.
 */
static __always_inline enum ls_reason replay_check(const struct ls_rec *r, __u64 *gap)
{
	__u32 stream = r->stream == LS_STREAM_USER ? LS_STREAM_MAX : r->stream;
	__u64 no = r->stream_no, word = no / 64, bit = 1ull << (no & 63);
	enum ls_reason why = r->flags & LS_REC_RETX ? LS_R_peer_again : LS_R_peer_replay;
	const __u64 words = LS_WINDOW / 64;
	struct ls_replay_win *w;
	__u64 from;

	*gap = 0;
	if (stream > LS_STREAM_MAX || (stream == LS_STREAM_MAX && r->stream != LS_STREAM_USER))
		return LS_R_peer_replay;
	w = bpf_map_lookup_elem(&ls_win, &stream);
	if (!w)
		return LS_R_peer_replay;
	bpf_spin_lock(&w->lock);
	if (w->key_gen != r->key_gen) {
		if ((__s32)(r->key_gen - w->key_gen) < 0 && w->key_gen)
			goto out;
		w->key_gen = r->key_gen;
		w->top = no;
		__builtin_memset(w->bits, 0, sizeof(w->bits));
		__builtin_memset(w->retx, 0, sizeof(w->retx));
	} else if (no > w->top) {
		from = w->top / 64;
		if (no != w->top + 1)
			*gap = w->top + 1;
		for (__u64 i = 1; i <= words; i++) {
			if (from + i > word)
				break;
			w->bits[(from + i) % words] = 0;
			w->retx[(from + i) % words] = 0;
		}
		w->top = no;
	} else if (word + words <= w->top / 64) {
		goto out;
	} else if (w->bits[word % words] & bit) {
		if (w->retx[word % words] & bit) {
			w->retx[word % words] &= ~bit;
			why = LS_R_peer_again;
		}
		goto out;
	}
	w->bits[word % words] |= bit;
	if (r->flags & LS_REC_RETX)
		w->retx[word % words] |= bit;
	why = LS_R_record_in;
out:
	bpf_spin_unlock(&w->lock);
	return ls_mutate & LS_MUTATE_REPLAY ? LS_R_record_in : why;
}

/* Passes sc->rec to user space. number: as in ls_ev. */
static __always_inline int rec_report(struct ls_scratch *sc, __u64 wakeup, __u32 number)
{
	const __u64 *from = (const __u64 *)&sc->rec;
	struct ls_ev_rec *ev;
	__u64 *to;

	if (!sc->rec.nsum) {
		ev = bpf_ringbuf_reserve(&ls_ring, offsetof(struct ls_ev_rec, rec) + LS_REC_BASE,
					 0);
		if (!ev)
			return -1;
		__builtin_memcpy(&ev->rec, &sc->rec, LS_REC_BASE);
	} else {
		ev = bpf_ringbuf_reserve(&ls_ring, sizeof(*ev), 0);
		if (!ev)
			return -1;
		to = (__u64 *)&ev->rec;
#pragma clang loop unroll(disable)
		for (__u32 i = 0; i < sizeof(ev->rec) / 8; i++)
			to[i] = from[i];
	}
	ev->type = LS_EV_REC;
	ev->number = number;
	ev->at = bpf_ktime_get_boot_ns();
	bpf_ringbuf_submit(ev, wakeup);
	return 0;
}

/* Fills in *r but for the sums, the segment's numbers and the tag. */
static __always_inline void rec_begin(struct ls_rec *r, const struct ls_conf *conf,
				      enum ls_rec_type type, enum ls_dir dir)
{
	__builtin_memset(r, 0, LS_REC_BASE);
	r->version = LS_ABI_VERSION;
	r->type = type;
	r->dir = dir;
	r->len = LS_REC_BASE;
	r->key_gen = conf->key_gen;
	r->epoch = conf->epoch;
}

/* The segment in sc->p, as it is now: in PVM numbering. */
static __always_inline void rec_segment(struct ls_scratch *sc)
{
	struct ls_pkt *p = &sc->p;
	struct ls_rec *r = &sc->rec;

	r->t = p->t;
	r->seq = p->seq;
	r->end = pay_pos(p) + p->paylen + (p->flags & LS_FIN);
	r->ack = p->ack;
	r->win = p->win;
	r->tcp_flags = p->flags;
	r->optlen = p->optlen;
	__builtin_memcpy(r->opts, p->tcp + LS_TCP_MIN, LS_OPTS_MAX);
}

static __always_inline __u32 sent_key(__u32 stream, __u64 no)
{
	return stream * LS_SENT + no % LS_SENT;
}

/* Gives *r the next number of this CPU's stream. S keeps it, without boundaries, for R6. */
static __always_inline int rec_number(struct ls_rec *r)
{
	__u32 key, stream = bpf_get_smp_processor_id();
	struct ls_tx_stream *newest = bpf_map_lookup_elem(&ls_lane, &stream);
	struct ls_sent *sent;

	if (!newest)
		return -1;
	r->stream = stream;
	r->stream_no = ++newest->no;
	if (r->dir != LS_DIR_S2P)
		return 0;
	key = sent_key(stream, r->stream_no);
	sent = bpf_map_lookup_elem(&ls_sent, &key);
	if (!sent)
		return -1;
	/* Other CPUs read it: no is 0 while the record is being written. */
	__sync_lock_test_and_set(&sent->no, 0);
	__builtin_memcpy(sent->rec, r, LS_REC_BASE);
	__sync_lock_test_and_set(&sent->no, r->stream_no);
	return 0;
}

static __always_inline void rec_sign(struct ls_rec *r, const struct ls_keys *keys)
{
	r->len = LS_REC_BASE + r->nsum * sizeof(r->bound[0]);
	r->tag = siphash(r, r->len, keys->sip_tx[0], keys->sip_tx[1]);
}

/*
 * Turns the frame into a peer frame with the signed sc->rec at off. The bytes between
 * ls_pre and the record stay: the device that completes a partial checksum still
 * writes there.
 */
static __always_inline int rec_put(struct __sk_buff *skb, struct ls_scratch *sc,
				   const struct ls_conf *conf, __u32 off)
{
	struct {
		__u8 dst[ETH_ALEN];
		__u8 src[ETH_ALEN];
		__be16 proto;
		struct ls_pre pre;
	} front;
	struct ls_rec *r = &sc->rec;
	__u32 len = r->len;

	__builtin_memcpy(front.dst, conf->peer_mac, ETH_ALEN);
	__builtin_memcpy(front.src, conf->own_mac, ETH_ALEN);
	front.proto = bpf_htons(LS_ETHERTYPE);
	front.pre.magic = LS_MAGIC;
	front.pre.off = off;

	/* The record's tuple has the VLANs. Popping a tag brings up one that is in the bytes. */
#pragma clang loop unroll(full)
	for (int i = 0; i < 2; i++)
		if (skb->vlan_present && bpf_skb_vlan_pop(skb))
			return -1;
	if (bpf_skb_change_tail(skb, off + len, 0))
		return -1;
	if (bpf_skb_store_bytes(skb, 0, &front, sizeof(front), 0))
		return -1;
	barrier_var(len);
	if (len < LS_REC_BASE || len > sizeof(*r) || bpf_skb_store_bytes(skb, off, r, len, 0))
		return -1;
	return 0;
}

/*
 * Numbers and signs sc->rec, turns the frame into a peer frame with it and sends that
 * to the peer. Returns a verdict, or 0 when it failed.
 */
static __always_inline int rec_send(struct __sk_buff *skb, struct ls_scratch *sc,
				    const struct ls_conf *conf, const struct ls_keys *keys,
				    __u32 off)
{
	if (rec_number(&sc->rec))
		return 0;
	rec_sign(&sc->rec, keys);
	if (rec_put(skb, sc, conf, off))
		return 0;
	return bpf_redirect(ls_peer, 0);
}

/* Where a record is put in a frame that was sc->p: after any checksum, at an even offset. */
static __always_inline __u32 rec_off(const struct ls_pkt *p)
{
	__u32 off = (p->l4_off + LS_TCP_MIN + 1) & ~1u;

	return off < LS_REC_OFF_MAX ? off : LS_REC_OFF_MAX;
}

#endif
