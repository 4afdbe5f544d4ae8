/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fast_open.h: connections that the fast path (R27) has from the PVM's SYN|ACK on. User space is
 * told of that, and that the kernel owns the connection.
 */
#ifndef LS_FAST_OPEN_H
#define LS_FAST_OPEN_H

#include "fast.h"

#define LS_SYN_OPTS 20	       /* bytes of options in a SYN|ACK of Linux */
#define LS_SYN_BUSY (64 << 10) /* of events that user space has not read */

static const struct ls_fast ls_fast_fresh;

/* 8 bytes of a SYN|ACK's options. */
static __always_inline __u64 syn_opts(const __u8 *opts, __u32 at)
{
	__u64 v;

	__builtin_memcpy(&v, opts + at, sizeof(v));
	return v;
}

/*
 * Are the options of a SYN|ACK those that Linux sends to one that offers all of them: MSS, SACK
 * permitted, timestamps and window scale? The offset of 10 words leaves no room for others, nor for
 * AccECN's flag.
 */
static __always_inline int syn_usual(const __u8 *tcp)
{
	const __u8 *o = tcp + LS_TCP_MIN;

	return tcp[12] == 10 << 4 && tcp[13] == (LS_SYN | LS_ACK) && o[0] == 2 && o[1] == 4 &&
	       o[4] == 4 && o[5] == 2 && o[6] == LS_OPT_TS && o[7] == 10 && o[16] == LS_OPT_NOP &&
	       o[17] == 3 && o[18] == 3 && (o[12] | o[13] | o[14] | o[15]);
}

/*
 * Makes the connection of a SYN|ACK of the PVM, which is in sc->slot, the kernel's, if it is a
 * usual one. Returns whether it is. While user space has a lot to read, as in a flood of SYNs, it
 * is not (R11); nor if its ports were another connection's just now, of which user space may have
 * something to let leave first.
 */
__noinline int fast_opened(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_fast_state *s;
	struct ls_fast_held *h;
	__be32 tsval, tsecr;
	struct ls_cli *c;
	struct ls_fast *f;
	struct ls_pkt *p;
	__u8 *o;

	if (!sc)
		return 0;
	p = &sc->p;
	h = &sc->held;
	o = p->tcp + LS_TCP_MIN;
	if (!ls_fast_on || !syn_usual(p->tcp) || p->paylen || p->t.vlan ||
	    p->l4_off > LS_FAST_L4_MAX || sc->slot >= LS_SLOT_GSO ||
	    bpf_ringbuf_query(&ls_ring, BPF_RB_AVAIL_DATA) > LS_SYN_BUSY)
		return 0;
	c = bpf_map_lookup_elem(&ls_cli, &p->t);
	if ((c && c->reused) || bpf_map_update_elem(&ls_fast, &p->t, &ls_fast_fresh, BPF_NOEXIST))
		return 0;
	f = bpf_map_lookup_elem(&ls_fast, &p->t);
	if (!f)
		return 0;
	__builtin_memcpy(&tsval, o + 8, 4);
	__builtin_memcpy(&tsecr, o + 12, 4);
	__builtin_memset(h, 0, sizeof(*h));
	h->at = bpf_ktime_get_boot_ns();
	if (has_partial(skb, &h->csum_start, &h->csum_offset))
		h->flags = LS_EV_PARTIAL;
	h->sum[0] = syn_opts(o, 0);
	h->sum[1] = syn_opts(o, 12);
	h->slot = sc->slot;
	h->seq = p->seq;
	h->ack = p->ack;
	h->frame_len = p->len;
	h->win = p->win;
	h->tcp_flags = p->flags;
	h->l3_off = p->l3_off;
	h->l4_off = p->l4_off;
	h->pay_off = p->pay_off;
	s = &f->s;
	bpf_spin_lock(&f->lock);
	s->owner = LS_OWNER_KERNEL;
	s->inc = s->released = s->svm_end = p->seq;
	s->pvm_end = p->seq + 1;
	s->ts = 1;
	s->ts_sent = s->ts_last = bpf_ntohl(tsval);
	s->scale = o[19] > 14 ? 14 : o[19];
	s->marks = LS_FAST_SYN;
	/* What fast_transmit notes: only a SYN|ACK of the SVM with the same numbers is decided
	 * here. */
	s->pvm.ack = p->ack;
	s->pvm.edge = p->ack + p->win; /* a SYN's window is not scaled */
	s->pvm.win = p->win >> 14;
	s->sent = s->pvm;
	s->pvm.echo = bpf_ntohl(tsecr);
	s->pvm.echoes = 1;
	s->svm = s->pvm;
	s->held[0] = *h;
	s->nheld = 1;
	s->since = h->at;
	f->armed = 1;
	bpf_spin_unlock(&f->lock);
	fast_start(f);
	return 1;
}

/*
 * Decides about the record of the SVM's SYN|ACK, as fast_record does about others: the PVM's leaves
 * as it is if both say the same, but for the time (R3).
 */
__noinline int fast_answer(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_fast_out o = {};
	__u16 start = 0, offset = 0;
	struct ls_fast_state *s;
	struct ls_fast_held *h;
	struct ls_fast *f;
	struct ls_rec *r;
	int skb_partial;

	if (!sc || !conf)
		return LS_FAST_NOT;
	r = &sc->rec;
	f = bpf_map_lookup_elem(&ls_fast, &r->t);
	if (!f)
		return LS_FAST_NOT;
	s = &f->s;
	h = &s->held[0];
	skb_partial = has_partial(skb, &start, &offset);
	bpf_spin_lock(&f->lock);
	if (!ls_fast_on || s->owner != LS_OWNER_KERNEL || !(s->marks & LS_FAST_SYN) ||
	    r->epoch != conf->epoch || r->flags & LS_REC_INHERITED || r->inc != s->inc ||
	    r->seq != h->seq || r->end != h->seq + 1 || r->ack != h->ack || r->win != h->win)
		goto yield;
	if ((r->optlen != LS_SYN_OPTS || syn_opts(r->opts, 0) != h->sum[0] ||
	     syn_opts(r->opts, 12) != h->sum[1]) &&
	    !(ls_mutate & LS_MUTATE_FAST_R3))
		goto yield;
	o.partial = h->flags & LS_EV_PARTIAL;
	if (!fast_fits(skb_partial, start, offset, o.partial, h->l4_off) ||
	    (o.partial && (h->csum_start != h->l4_off || h->csum_offset != LS_CHECK_OFF)))
		goto yield;
	o.slot = h->slot;
	o.len = h->pay_off; /* without padding */
	o.l4 = h->l4_off;
	o.seq = h->seq;
	o.ack = h->ack;
	o.win = h->win;
	s->marks = 0;
	s->nheld = 0;
	s->released = s->svm_end = r->end;
	s->frames++;
	s->records++;
	bpf_spin_unlock(&f->lock);

	count(LS_R_fast_in, skb, 0);
	return fast_emit_slot(skb, sc, &o, skb_partial);
yield:
	sc->number = fast_yield(s);
	bpf_spin_unlock(&f->lock);
	return LS_FAST_NOT;
}

#endif
