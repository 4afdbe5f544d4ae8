/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rec.h: frames of the peer link: checked when they come, made in place of a frame. */
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

/*
 * Copies the record of a peer frame to sc->rec and checks it. Returns
 * LS_R_record_in, or why it is refused. *off is where the record stands.
 */
static __always_inline enum ls_reason rec_check(struct __sk_buff *skb, struct ls_scratch *sc,
						const struct ls_conf *conf,
						const struct ls_keys *keys, enum ls_dir dir,
						__u32 *off)
{
	struct ls_rec *r = &sc->rec;
	struct ls_pre pre;
	__u32 len, at;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &pre, sizeof(pre)))
		return LS_R_peer_short;
	if (pre.magic != LS_MAGIC)
		return LS_R_peer_junk;
	at = pre.off;
	if (at < ETH_HLEN + sizeof(pre) || at > LS_REC_OFF_MAX)
		return LS_R_peer_junk;
	if (bpf_skb_load_bytes(skb, at, r, LS_REC_BASE))
		return LS_R_peer_short;
	if (r->version != LS_ABI_VERSION)
		return LS_R_peer_version;
	if (r->dir != dir)
		return LS_R_peer_type;
	if (dir == LS_DIR_P2S && r->type != LS_REC_ANNOUNCE && r->type != LS_REC_ASK)
		return LS_R_peer_type;
	if (dir == LS_DIR_S2P && r->type != LS_REC_DATA && r->type != LS_REC_ANSWER)
		return LS_R_peer_type;
	len = r->nsum * sizeof(r->bound[0]);
	if (r->nsum > LS_BOUND_MAX || r->len != LS_REC_BASE + len || r->optlen > LS_OPTS_MAX)
		return LS_R_peer_short;
	barrier_var(len);
	if (len > 0 && len <= sizeof(r->bound) &&
	    bpf_skb_load_bytes(skb, at + LS_REC_BASE, r->bound, len))
		return LS_R_peer_short;
	if (siphash(r, LS_REC_BASE + len, keys->sip_rx) != r->tag)
		return LS_R_peer_tag;
	if (r->term != conf->term)
		return LS_R_peer_term;
	/* The peer may have begun the next epoch a moment before this host did (R17). */
	if (r->epoch != conf->epoch && r->epoch != conf->epoch + 1)
		return LS_R_peer_epoch;
	*off = at;
	return LS_R_record_in;
}

/* Hands sc->rec to user space. */
static __always_inline int rec_tell(struct ls_scratch *sc, __u64 wakeup)
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
	ev->pad = 0;
	ev->at = bpf_ktime_get_boot_ns();
	bpf_ringbuf_submit(ev, wakeup);
	return 0;
}

/* Begins sc->rec: everything but the sums, the segment's numbers and the tag. */
static __always_inline void rec_begin(struct ls_rec *r, const struct ls_conf *conf,
				      enum ls_rec_type type, enum ls_dir dir)
{
	__builtin_memset(r, 0, LS_REC_BASE);
	r->version = LS_ABI_VERSION;
	r->type = type;
	r->dir = dir;
	r->len = LS_REC_BASE;
	r->term = conf->term;
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

/* Numbers and signs sc->rec. */
static __always_inline int rec_sign(struct ls_rec *r, const struct ls_keys *keys)
{
	__u32 key = 0, len = LS_REC_BASE + r->nsum * sizeof(r->bound[0]);
	__u64 *no = bpf_map_lookup_elem(&ls_lane, &key);

	if (!no)
		return -1;
	r->len = len;
	r->lane = bpf_get_smp_processor_id();
	r->lane_no = ++*no;
	r->tag = siphash(r, len, keys->sip_tx);
	return 0;
}

/*
 * Makes the frame a peer frame with sc->rec at off and sends it to the peer. What
 * stands between ls_pre and the record stays: a partial checksum is still written
 * there by the device that completes it. Returns a verdict, or 0 when it failed.
 */
static __always_inline int rec_send(struct __sk_buff *skb, struct ls_scratch *sc,
				    const struct ls_conf *conf, const struct ls_keys *keys,
				    __u32 off)
{
	struct {
		__u8 dst[ETH_ALEN];
		__u8 src[ETH_ALEN];
		__be16 proto;
		struct ls_pre pre;
	} front;
	struct ls_rec *r = &sc->rec;
	__u32 len;

	__builtin_memcpy(front.dst, conf->peer_mac, ETH_ALEN);
	__builtin_memcpy(front.src, conf->own_mac, ETH_ALEN);
	front.proto = bpf_htons(LS_ETHERTYPE);
	front.pre.magic = LS_MAGIC;
	front.pre.off = off;

	if (rec_sign(r, keys))
		return 0;
	len = r->len;
	if (skb->vlan_present && bpf_skb_vlan_pop(skb)) /* the record's tuple has the VLAN */
		return 0;
	if (bpf_skb_change_tail(skb, off + len, 0))
		return 0;
	if (bpf_skb_store_bytes(skb, 0, &front, sizeof(front), 0))
		return 0;
	barrier_var(len);
	if (len < LS_REC_BASE || len > sizeof(*r) || bpf_skb_store_bytes(skb, off, r, len, 0))
		return 0;
	return bpf_redirect(ls_peer, 0);
}

/* Where a record stands in a frame that was sc->p: behind the fixed TCP header, even. */
static __always_inline __u32 rec_off(const struct ls_pkt *p)
{
	return (p->l4_off + LS_TCP_MIN + 1) & ~1u;
}

#endif
