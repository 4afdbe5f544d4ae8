/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* conn.h: what is known of a connection's offset (R9, R11). */
#ifndef LS_CONN_H
#define LS_CONN_H

#include "csum.h"
#include "maps.h"
#include "parse.h"
#include "seq.h"

/* An offset is final once the remote's ack lies within so many bytes of the SVM's ISN. */
#define LS_ACK_SPAN (1u << 30)

/* SVM numbering is PVM numbering plus these. */
struct ls_offset {
	__u32 off;
	__u32 ts_off;
	__u32 inc; /* ISN of the PVM */
};

/* Do both parts belong to one connection? See struct ls_half. */
static __always_inline int half_paired(const struct ls_half *h)
{
	const __u32 parts = LS_CONN_PVM | LS_CONN_SVM;
	const __u32 active = LS_CONN_ACTIVE | LS_CONN_PACTIVE;
	__u32 state = h->state;

	if ((state & parts) != parts)
		return 0;
	if (h->isn_pvm == h->used_pvm && h->isn_svm == h->used_svm)
		return 1;
	if ((state & active) == active)
		return h->isn_pvm != h->used_pvm && h->isn_svm != h->used_svm;
	return h->cli_pvm == h->cli_svm;
}

static __always_inline void half_offset(const struct ls_half *h, struct ls_offset *o)
{
	const __u32 both = LS_CONN_PTS | LS_CONN_STS;

	o->inc = h->isn_pvm;
	o->off = h->isn_svm - h->isn_pvm;
	o->ts_off = (h->state & both) == both ? h->ts_svm - h->ts_pvm : 0;
}

static __always_inline void conn_offset(const struct ls_conn *c, struct ls_offset *o)
{
	o->inc = c->inc;
	o->off = c->off;
	o->ts_off = c->ts_off;
}

/* The tuple's entry, created if there is none. */
static __always_inline struct ls_half *half_get(const struct ls_tuple *t)
{
	struct ls_half *h = bpf_map_lookup_elem(&ls_half, t);

	if (!h) {
		struct ls_half none = {};

		bpf_map_update_elem(&ls_half, t, &none, BPF_NOEXIST);
		h = bpf_map_lookup_elem(&ls_half, t);
	}
	return h;
}

/* Notes the pair as made, if both parts belong together. Returns 1 then. */
static __always_inline int half_pair(struct ls_half *h)
{
	if (!half_paired(h))
		return 0;
	h->used_pvm = h->isn_pvm;
	h->used_svm = h->isn_svm;
	return 1;
}

/* Finds the timestamp among a SYN's options; *tsval is 0 without one. */
static __always_inline int find_ts(struct ls_scratch *sc, const __u8 *opts, __u32 optlen,
				   __u32 *tsval)
{
	const struct ls_delta none = {};
	struct ls_walk *w;

	__builtin_memcpy(sc->tcp + LS_TCP_MIN, opts, LS_OPTS_MAX);
	w = opts_walk(sc, optlen, &none);
	*tsval = w->tsval;
	return w->has_ts;
}

/*
 * Stores the SVM's SYN or SYN|ACK in sc->p. One with the ISN that is known already is
 * a retransmission, or the answer of a simultaneous open: the same incarnation.
 */
static __always_inline void half_svm(struct ls_scratch *sc, struct ls_half *h, __u64 now)
{
	struct ls_pkt *p = &sc->p;
	int answers = p->flags & LS_ACK;
	__u32 cli = answers ? p->ack - 1 : 0;
	__u32 set = LS_CONN_SVM, tsval;

	h->last = now;
	if (!(h->state & LS_CONN_SVM) || h->isn_svm != p->seq ||
	    (answers && !(h->state & LS_CONN_ACTIVE) && h->cli_svm != cli)) {
		__sync_fetch_and_and(&h->state, ~(__u32)(LS_CONN_SVM | LS_CONN_STS |
							 LS_CONN_ACTIVE | LS_CONN_DONE));
		if (find_ts(sc, p->tcp + LS_TCP_MIN, p->optlen, &tsval))
			set |= LS_CONN_STS;
		h->isn_svm = p->seq;
		h->cli_svm = 0;
		h->ts_svm = tsval;
	}
	if (answers)
		h->cli_svm = cli;
	else
		set |= LS_CONN_ACTIVE;
	h->win = p->win;
	h->tcp_flags = p->flags;
	h->optlen = p->optlen;
	__builtin_memcpy(h->opts, p->tcp + LS_TCP_MIN, LS_OPTS_MAX);
	if (ls_mutate & LS_MUTATE_R9) {
		h->isn_pvm = h->used_pvm = h->used_svm = p->seq;
		set |= LS_CONN_PVM;
	}
	__sync_fetch_and_or(&h->state, set);
}

/* Stores the PVM's SYN or SYN|ACK, announced in sc->rec, in the same way. */
static __always_inline void half_pvm(struct ls_scratch *sc, struct ls_half *h, __u64 now)
{
	struct ls_rec *r = &sc->rec;
	int answers = r->tcp_flags & LS_ACK;
	__u32 cli = answers ? r->ack - 1 : 0;
	__u32 set = LS_CONN_PVM, tsval;

	h->last = now;
	if (!(h->state & LS_CONN_PVM) || h->isn_pvm != r->seq ||
	    (answers && !(h->state & LS_CONN_PACTIVE) && h->cli_pvm != cli)) {
		__sync_fetch_and_and(&h->state,
				     ~(__u32)(LS_CONN_PVM | LS_CONN_PTS | LS_CONN_PACTIVE));
		if (find_ts(sc, r->opts, r->optlen, &tsval))
			set |= LS_CONN_PTS;
		h->isn_pvm = r->seq;
		h->cli_pvm = 0;
		h->ts_pvm = tsval;
	}
	if (answers)
		h->cli_pvm = cli;
	else
		set |= LS_CONN_PACTIVE;
	__sync_fetch_and_or(&h->state, set);
}

/*
 * Does the remote's segment acknowledge the SVM's SYN? It does if its ack, translated,
 * lies in the SVM's stream. A RST does not establish anything, and a SYN|ACK only
 * answers the guest's own SYN.
 */
static __always_inline int half_is_acked(const struct ls_half *h, const struct ls_pkt *p,
					 const struct ls_offset *o)
{
	__u32 acked = p->ack + o->off - h->isn_svm;

	if (h->state & LS_CONN_DONE || !(p->flags & LS_ACK) || p->flags & LS_RST)
		return 0;
	if (p->flags & LS_SYN && !(h->state & LS_CONN_ACTIVE))
		return 0;
	return acked > 0 && acked <= LS_ACK_SPAN;
}

/*
 * What is added to the timestamp that the remote's segment echoes, in a handshake. A guest
 * takes no echo of a later time than that of its last SYN or SYN|ACK (Linux 6.18; in
 * SYN-SENT it answers with a RST). The PVM's second one may be later than the SVM's by the
 * ticks that their timers differ by.
 */
static __always_inline __u32 half_echo(struct ls_scratch *sc, const struct ls_half *h,
				       const struct ls_offset *o)
{
	const __u32 both = LS_CONN_PTS | LS_CONN_STS;
	const struct ls_delta none = {};
	struct ls_walk *w;
	__u32 newest;

	if ((h->state & both) != both || !find_ts(sc, h->opts, h->optlen, &newest))
		return o->ts_off;
	__builtin_memcpy(sc->tcp, sc->p.tcp, sizeof(sc->tcp));
	w = opts_walk(sc, sc->p.optlen, &none);
	if (!w->has_ts || !seq_after(w->tsecr + o->ts_off, newest))
		return o->ts_off;
	return newest - w->tsecr;
}

/* May ls_edge have entries? Spares the look-ups where nothing was taken over. */
static __always_inline int has_edges(const struct ls_conf *conf)
{
	return *(const volatile __u32 *)&conf->edges;
}

/* Copies the half-open connection to ls_conn, which evicts nothing. NULL: table full. */
static __always_inline struct ls_conn *half_promote(struct ls_half *h, const struct ls_pkt *p,
						    const struct ls_offset *o)
{
	const __u32 ts = LS_CONN_PTS | LS_CONN_STS;
	const struct ls_conf *conf = config();
	struct ls_conn c = {
		.off = o->off,
		.ts_off = o->ts_off,
		.inc = o->inc,
		.state = h->state & LS_CONN_ACTIVE,
		.cli_ack = p->ack,
		.isn_svm = h->isn_svm,
	};
	struct ls_conn *made;

	if ((h->state & ts) == ts)
		c.state |= LS_CONN_TS;
	bpf_map_update_elem(&ls_conn, &p->t, &c, BPF_NOEXIST);
	made = bpf_map_lookup_elem(&ls_conn, &p->t);
	if (conf && has_edges(conf)) /* the entry is of an earlier connection */
		bpf_map_delete_elem(&ls_edge, &p->t);
	if (made)
		__sync_fetch_and_or(&h->state, LS_CONN_DONE);
	return made;
}

/*
 * Notes a segment of either side; edge is added to the remote's acks. A guest that goes on sending
 * ignored the RST: anybody can forge one. Whether the remote has received the guest's FIN is not
 * known from its numbers, but it repeats what is not acknowledged: an ack of less, or one that
 * crossed the FIN, counts up to then.
 */
static __always_inline void conn_touch(struct ls_conn *c, const struct ls_pkt *p, int from_guest,
				       __u32 edge, __u64 now)
{
	__u32 set = 0, old = c->cli_ack, ack = p->ack + edge;

	c->last = now;
	if (p->flags & LS_RST)
		set = LS_CONN_RST;
	else if (p->flags & LS_FIN)
		set = from_guest ? LS_CONN_GFIN : LS_CONN_RFIN;
	if (from_guest && !set && c->state & LS_CONN_RST)
		__sync_fetch_and_and(&c->state, ~(__u32)LS_CONN_RST);
	if (from_guest && (set == LS_CONN_GFIN || (p->paylen && c->state & LS_CONN_GFIN)))
		set |= LS_CONN_UNACKED;
	if (set & ~c->state)
		__sync_fetch_and_or(&c->state, set);
	if (!from_guest && p->flags & LS_ACK && c->state & LS_CONN_UNACKED)
		__sync_fetch_and_and(&c->state, ~(__u32)LS_CONN_UNACKED);
	/* One attempt: if another CPU was faster, its ack is as new. */
	if (!from_guest && p->flags & LS_ACK && seq_after(ack, old))
		__sync_val_compare_and_swap(&c->cli_ack, old, ack);
}

static __always_inline __u32 distance(__u32 d)
{
	return d < -d ? d : -d;
}

/*
 * Decides on a connection in doubt by a segment of the guest. What it sends lies near what
 * the remote has acknowledged: translated, or, after a checkpoint of which nobody knows,
 * as it is. Returns whether it is clear which of them.
 */
static __always_inline int conn_settle(struct ls_conn *c, const struct ls_pkt *p)
{
	__u32 at = p->seq - c->cli_ack;
	__u32 as_is = distance(at), translated = distance(at - c->off);

	if (c->off && as_is > translated / 4 && translated > as_is / 4)
		return 0;
	if (as_is < translated) {
		c->off = 0;
		c->ts_off = 0;
	}
	__sync_fetch_and_and(&c->state, ~(__u32)LS_CONN_DOUBT);
	return 1;
}

/* The edge of a connection, on a host that took over; NULL: there is none. */
static __always_inline struct ls_conn *edge_of(const struct ls_conf *conf, const struct ls_tuple *t)
{
	if (!has_edges(conf) || ls_mutate & LS_MUTATE_EDGE)
		return NULL;
	return bpf_map_lookup_elem(&ls_edge, t);
}

/*
 * Does the remote's segment in sc->p echo a timestamp that carries c's guard? From an
 * older echo the guard must not be subtracted: the guest would measure it as part of
 * the round-trip time.
 */
static __always_inline int echoes_guard(struct ls_scratch *sc, struct ls_conn *c)
{
	const struct ls_delta none = {};
	struct ls_walk *w;

	if (c->state & LS_CONN_ECHOES)
		return 1;
	if (!c->ts_first)
		return 0;
	__builtin_memcpy(sc->tcp, sc->p.tcp, sizeof(sc->tcp));
	w = opts_walk(sc, sc->p.optlen, &none);
	if (!w->has_ts || seq_after(c->ts_first, w->tsecr))
		return 0;
	__sync_fetch_and_or(&c->state, LS_CONN_ECHOES);
	return 1;
}

/* Notes the first timestamp that left with c's guard. Called after translate(). */
static __always_inline void guard_used(struct ls_scratch *sc, struct ls_conn *c,
				       const struct ls_delta *d)
{
	if (c->guard && !c->ts_first && sc->walk.has_ts)
		__sync_val_compare_and_swap(&c->ts_first, 0, (sc->walk.tsval + d->tsval) ?: 1);
}

static __always_inline __u32 guard_of(const struct ls_conn *c)
{
	return ls_mutate & LS_MUTATE_GUARD ? 0 : c->guard;
}

/*
 * Translates the guest's frame in sc->p to the numbers that the remote knows, by c and
 * by the edge after it (NULL: none). retx: the frame is a copy that user space
 * retransmits; it has the PVM's numbers already and only needs c's guard. Returns 1 if the frame
 * may not leave, as nobody knows in which numbers it is, and -1 if it could not be changed.
 */
static __always_inline int leave(struct __sk_buff *skb, struct ls_scratch *sc, struct ls_conn *c,
				 const struct ls_conn *edge, int retx)
{
	struct ls_delta d = {};

	conn_touch(c, &sc->p, 1, 0, bpf_ktime_get_boot_ns());
	if (c->state & LS_CONN_DOUBT && !retx && !conn_settle(c, &sc->p))
		return 1;
	d.tsval = guard_of(c);
	if (!retx) {
		d.seq = -c->off;
		d.tsval -= c->ts_off;
	}
	if (edge) {
		d.seq -= edge->off;
		d.tsval -= edge->ts_off;
	}
	if (translate(skb, sc, &d))
		return -1;
	guard_used(sc, c, &d);
	return 0;
}

/* Translates the remote's frame in sc->p to the guest's numbers, likewise. */
static __always_inline int enter(struct __sk_buff *skb, struct ls_scratch *sc, struct ls_conn *c,
				 const struct ls_conn *edge)
{
	struct ls_delta d = {};

	conn_touch(c, &sc->p, 0, edge ? edge->off : 0, bpf_ktime_get_boot_ns());
	d.ack = c->off;
	d.tsecr = c->ts_off;
	if (c->guard && echoes_guard(sc, c))
		d.tsecr -= guard_of(c);
	if (edge) {
		d.ack += edge->off;
		d.tsecr += edge->ts_off;
	}
	return translate(skb, sc, &d);
}

#endif
