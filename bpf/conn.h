/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* conn.h: what is known of a connection's offset (R9, R11). */
#ifndef LS_CONN_H
#define LS_CONN_H

#include "csum.h"
#include "maps.h"
#include "parse.h"
#include "seq.h"

/* An offset is taken for known when the remote acks up to this much of the SVM's stream. */
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

/* The tuple's entry, made when there is none. */
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

/* Notes that the pair was made. Returns 1 when both parts belong together. */
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
 * Takes the SVM's SYN or SYN|ACK in sc->p. The ISN that is known already is the
 * same SYN said again, or a simultaneous open's answer: same incarnation.
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

/* Takes the PVM's SYN or SYN|ACK, announced in sc->rec, in the same way. */
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
 * Does the remote's segment show that it knows the SVM's ISN by the offset? It
 * does when its ack, translated, lies in the SVM's stream. A RST ends what would
 * begin here; a SYN|ACK answers the guest's own SYN only.
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

/* May there be connections that were taken over? Asked before anything is looked up. */
static __always_inline int has_edges(const struct ls_conf *conf)
{
	return *(const volatile __u32 *)&conf->edges;
}

/* Makes the half-open connection one that is never evicted. NULL: table full. */
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
	if (conf && has_edges(conf)) /* what was taken over was another connection's */
		bpf_map_delete_elem(&ls_edge, &p->t);
	if (made)
		__sync_fetch_and_or(&h->state, LS_CONN_DONE);
	return made;
}

/*
 * Notes a segment of either side. A guest that goes on speaking was not reset:
 * anybody may send it a RST that it does not believe.
 */
static __always_inline void conn_touch(struct ls_conn *c, const struct ls_pkt *p, int from_guest,
				       __u64 now)
{
	__u32 set = 0, old = c->cli_ack;

	c->last = now;
	if (p->flags & LS_RST)
		set = LS_CONN_RST;
	else if (p->flags & LS_FIN)
		set = from_guest ? LS_CONN_GFIN : LS_CONN_RFIN;
	if (set & ~c->state)
		__sync_fetch_and_or(&c->state, set);
	if (from_guest && !set && c->state & LS_CONN_RST)
		__sync_fetch_and_and(&c->state, ~(__u32)LS_CONN_RST);
	/* One try: when another CPU was faster, its ack is as new. */
	if (!from_guest && p->flags & LS_ACK && seq_after(p->ack, old))
		__sync_val_compare_and_swap(&c->cli_ack, old, p->ack);
}

/* The edge of a connection, on a host that took over; NULL: there is none. */
static __always_inline struct ls_conn *edge_of(const struct ls_conf *conf, const struct ls_tuple *t)
{
	if (!has_edges(conf) || ls_mutate & LS_MUTATE_EDGE)
		return NULL;
	return bpf_map_lookup_elem(&ls_edge, t);
}

/*
 * Does the remote's segment in sc->p echo a timestamp with c's guard? One from before
 * the takeover must not seem older than it is: the guest would take the guard for a
 * round trip.
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

/* Notes the first timestamp that left with c's guard, behind translate(). */
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
 * Gives the guest's frame in sc->p the numbers that the remote knows: c's, and those of
 * the edge behind it (NULL: none). again: the frame is a copy, which has the PVM's
 * numbers, so of c's the guard alone.
 */
static __always_inline int leave(struct __sk_buff *skb, struct ls_scratch *sc, struct ls_conn *c,
				 const struct ls_conn *edge, int again)
{
	struct ls_delta d = {};

	conn_touch(c, &sc->p, 1, bpf_ktime_get_boot_ns());
	d.tsval = guard_of(c);
	if (!again) {
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

/* Gives the remote's frame in sc->p the guest's numbers, likewise. */
static __always_inline int enter(struct __sk_buff *skb, struct ls_scratch *sc, struct ls_conn *c,
				 const struct ls_conn *edge)
{
	struct ls_delta d = {};

	conn_touch(c, &sc->p, 0, bpf_ktime_get_boot_ns());
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
