/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* fast_decide.h: what the fast path (R27) decides about a segment of the PVM, a digest record and
 * an order. */
#ifndef LS_FAST_DECIDE_H
#define LS_FAST_DECIDE_H

#include "fast_open.h"

/* Is what both guests' frames need to have for the kernel to decide there? */
static __always_inline int fast_common(const struct ls_fast *f, __u32 flags, __u32 optlen,
				       const struct ls_tuple *t)
{
	return ls_fast_on && f->s.owner == LS_OWNER_KERNEL &&
	       (flags & ~(LS_PSH | LS_FIN)) == LS_ACK && optlen == (f->s.ts ? LS_TS_LEN : 0) &&
	       !t->vlan;
}

/* Is the SVM's segment the PVM's: the same bytes (R1), at the same position, and a FIN or none
 * (R3)? */
static __always_inline int fast_same(const struct ls_fast_held *h, __u32 seq, __u32 end,
				     __u32 flags, const __u64 *sum)
{
	__u32 fin = h->tcp_flags & LS_FIN;

	return h->seq == seq && h->seq + h->paylen + fin == end &&
	       (fin == (flags & LS_FIN) || ls_mutate & LS_MUTATE_FAST_R3) &&
	       ((h->sum[0] == sum[0] && h->sum[1] == sum[1]) || ls_mutate & LS_MUTATE_FAST_R1);
}

/*
 * Decides about a segment of the PVM. Returns a verdict, or LS_FAST_NOT where user space
 * decides: then *number is that of the event, and *slot has the frame unless it is
 * LS_SLOT_NONE.
 */
__noinline int fast_pvm(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_keys *keys;
	struct ls_pkt *p;
	struct ls_fast *f;
	struct ls_fast_out o = {.slot = LS_SLOT_NONE};
	struct ls_fast_held *h;
	int grew, pass = 0, arm = 0, kept = 0;
	__u32 end, ack, edge, win, tsval, i, fin;
	struct ls_fast_state *s;
	struct ls_acked d;
	struct ls_fast_rec *r;

	if (!sc || !conf)
		return LS_FAST_NOT;
	keys = keys_in_use(conf);
	p = &sc->p;
	h = &sc->held;
	sc->slot = LS_SLOT_NONE;
	sc->number = 0;
	fin = p->flags & LS_FIN;
	end = p->seq + p->paylen + fin;
	f = bpf_map_lookup_elem(&ls_fast, &p->t);
	if (!f)
		return LS_FAST_NOT;
	s = &f->s;
	o.ts = !!p->optlen;
	if (!fast_common(f, p->flags, p->optlen, &p->t) || skb->gso_size || p->len > LS_FAST_LEN ||
	    p->l4_off > LS_FAST_L4_MAX || (p->flags & LS_PSH && !p->paylen) ||
	    (o.ts && !fast_ts(p->tcp + LS_TCP_MIN, &o.tsval, &o.tsecr)))
		goto slow;
	if (!keys)
		goto slow;
	__builtin_memset(h, 0, sizeof(*h));
	h->at = bpf_ktime_get_boot_ns();
	if (has_partial(skb, &h->csum_start, &h->csum_offset))
		h->flags = LS_EV_PARTIAL;
	if (end != p->seq) {
		if (digest(skb, sc, keys, 0) < 0)
			goto slow;
		if (!s->nrecs) { /* else it will rarely be held */
			if (slot_keep(skb) != LS_R_held)
				goto slow;
			kept = 1;
		}
		h->sum[0] = sc->digest.sum[0];
		h->sum[1] = sc->digest.sum[1];
		h->slot = sc->slot;
		h->seq = p->seq;
		h->paylen = p->paylen;
		h->ack = p->ack;
		h->tsval = o.tsval;
		h->frame_len = p->len;
		h->win = p->win;
		h->tcp_flags = p->flags;
		h->l3_off = p->l3_off;
		h->l4_off = p->l4_off;
		h->pay_off = p->pay_off;
	} else {
		__u32 hdr = p->pay_off;

		barrier_var(hdr);
		if (hdr < 1 || hdr > LS_FAST_TMPL || bpf_skb_load_bytes(skb, 0, sc->piece.b, hdr))
			goto slow;
	}

	bpf_spin_lock(&f->lock);
	if (s->owner != LS_OWNER_KERNEL || p->seq != s->pvm_end || s->ts != o.ts)
		goto yield;
	if (s->marks & LS_FAST_SYN || (end != p->seq && s->marks & LS_FAST_FIN_PVM))
		goto yield;
	d = s->pvm;
	grew = acked_update(&d, p->ack, p->win, s->scale, o.ts, o.tsecr);
	tsval = o.tsval;
	if (end == p->seq) {
		if (!grew) /* a duplicate */
			goto yield;
		if (!fast_waits(s))
			s->since = h->at;
		s->pvm = d;
		s->pure = p->ack;
		s->has_pure = 1;
		s->tmpl_len = p->pay_off;
		s->tmpl_l4 = p->l4_off;
		s->tmpl_partial = h->flags & LS_EV_PARTIAL && h->csum_start == p->l4_off &&
						  h->csum_offset == LS_CHECK_OFF
					  ? LS_FAST_PARTIAL
				  : h->flags & LS_EV_PARTIAL ? LS_FAST_ODD
							     : 0;
		__builtin_memcpy(s->tmpl, sc->piece.b, LS_FAST_TMPL);
		if (fast_minimum(s, &s->pvm, &s->svm, &ack, &edge, &win)) {
			o.seq = s->released;
			fast_transmit(s, &o);
			s->acks++;
			pass = 1;
		}
	} else if (s->nrecs) {
		r = &s->recs[0];
		if (!fast_same(h, r->seq, r->end, r->tcp_flags, r->sum))
			goto yield;
		s->recs[0] = s->recs[1];
		s->recs[1] = s->recs[2];
		s->recs[2] = s->recs[3];
		s->nrecs--;
		s->pvm = d;
		s->pvm_end = s->released = end;
		s->since = h->at;
		o.seq = p->seq;
		fast_transmit(s, &o);
		s->frames++;
		s->bytes += p->paylen;
		pass = 1;
	} else {
		i = s->nheld;
		if (!kept || i >= LS_FAST_MAX || fast_minimum(s, &d, &s->svm, &ack, &edge, &win))
			goto yield; /* with an ACK that is due before the data */
		if (!fast_waits(s))
			s->since = h->at;
		s->held[i] = *h;
		s->nheld = i + 1;
		s->pvm = d;
		s->pvm_end = end;
		kept = 0; /* it is the state's */
	}
	if (fin)
		s->marks |= LS_FAST_FIN_PVM;
	s->ts_last = tsval;
	arm = fast_arm(f);
	bpf_spin_unlock(&f->lock);

	if (arm)
		fast_start(f);
	if (!pass)
		return count(LS_R_fast_held, skb, TCX_DROP);
	if (kept) { /* its record came meanwhile */
		slot_free(sc->slot);
		sc->slot = LS_SLOT_NONE;
	}
	if (fast_pass(skb, sc, &o))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return LS_FAST_PASS;
yield:
	sc->number = fast_yield(s);
	bpf_spin_unlock(&f->lock);
	return LS_FAST_NOT;
slow:
	bpf_spin_lock(&f->lock);
	sc->number = fast_yield(s);
	bpf_spin_unlock(&f->lock);
	return LS_FAST_NOT;
}

/*
 * Decides about a digest record in sc->rec, which the frame is. Returns a verdict, or
 * LS_FAST_NOT where user space decides: then sc->number is that of the event.
 */
__noinline int fast_record(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_rec *r;
	struct ls_fast *f;
	struct ls_fast_out o = {.slot = LS_SLOT_NONE};
	__u32 ack, edge, win, tsval, tsecr = 0, i, len;
	__u16 start = 0, offset = 0;
	__u64 now = bpf_ktime_get_boot_ns();
	int skb_partial, grew, emit = 0, arm;
	struct ls_fast_state *s;
	struct ls_fast_held *h;
	struct ls_acked d;
	__u8 *data;

	if (!sc || !conf)
		return LS_FAST_NOT;
	r = &sc->rec;
	data = sc->piece.b;
	len = r->end - r->seq;
	sc->number = 0;
	f = bpf_map_lookup_elem(&ls_fast, &r->t);
	if (!f)
		return LS_FAST_NOT;
	s = &f->s;
	o.ts = !!r->optlen;
	skb_partial = has_partial(skb, &start, &offset);
	if (r->tcp_flags == (LS_SYN | LS_ACK))
		return fast_answer(skb);
	if (!fast_common(f, r->tcp_flags, r->optlen, &r->t) || r->epoch != conf->epoch ||
	    (o.ts && !fast_ts(r->opts, &tsval, &tsecr)))
		goto slow;

	bpf_spin_lock(&f->lock);
	if (s->owner != LS_OWNER_KERNEL || r->seq != s->svm_end || s->ts != o.ts ||
	    s->inherited != (r->flags & LS_REC_INHERITED) || (!s->inherited && s->inc != r->inc) ||
	    s->marks & LS_FAST_SYN || (len && s->marks & LS_FAST_FIN_SVM))
		goto yield;
	d = s->svm;
	grew = acked_update(&d, r->ack, r->win, s->scale, o.ts, tsecr);
	if (len && s->nheld) {
		h = &s->held[0];
		if (!fast_same(h, r->seq, r->end, r->tcp_flags, r->sum))
			goto yield;
		o.partial = h->flags & LS_EV_PARTIAL;
		if (!fast_fits(skb_partial, start, offset, o.partial, h->l4_off) ||
		    (o.partial && (h->csum_start != h->l4_off || h->csum_offset != LS_CHECK_OFF)))
			goto yield;
		o.slot = h->slot;
		o.len = h->pay_off + h->paylen; /* without padding */
		o.l4 = h->l4_off;
		o.seq = h->seq;
		o.tsval = h->tsval;
		o.tsecr = s->pvm.echo;
		s->frames++;
		s->bytes += h->paylen;
		s->held[0] = s->held[1];
		s->held[1] = s->held[2];
		s->held[2] = s->held[3];
		s->nheld--;
		s->svm = d;
		s->svm_end = s->released = r->end;
		emit = 1;
	} else {
		i = s->nrecs;
		if (len ? i >= LS_FAST_MAX : !grew) /* a duplicate ACK */
			goto yield;
		if (fast_minimum(s, &s->pvm, &d, &ack, &edge, &win)) {
			/* An ACK is due, and there has to be one of the PVM's to make it of. */
			o.partial = s->tmpl_partial == LS_FAST_PARTIAL;
			if (!s->has_pure || seq_after(ack, s->pure) ||
			    s->tmpl_partial == LS_FAST_ODD ||
			    !fast_fits(skb_partial, start, offset, o.partial, s->tmpl_l4))
				goto yield;
			o.len = s->tmpl_len;
			o.l4 = s->tmpl_l4;
			o.seq = s->released;
			o.tsval = s->ts_last;
			o.tsecr = s->pvm.echo;
			__builtin_memcpy(data, s->tmpl, LS_FAST_TMPL);
			s->acks++;
			emit = 1;
		}
		s->svm = d;
		if (len) {
			if (i >= LS_FAST_MAX) /* for the verifier */
				goto yield;
			s->recs[i].at = now;
			s->recs[i].sum[0] = r->sum[0];
			s->recs[i].sum[1] = r->sum[1];
			s->recs[i].seq = r->seq;
			s->recs[i].end = r->end;
			s->recs[i].ack = r->ack;
			s->recs[i].win = r->win;
			s->recs[i].tcp_flags = r->tcp_flags;
			s->recs[i].optlen = r->optlen;
			s->recs[i].epoch = r->epoch;
			__builtin_memcpy(s->recs[i].opts, r->opts, LS_TS_LEN);
			s->nrecs = i + 1;
			s->svm_end = r->end;
		}
	}
	if (r->tcp_flags & LS_FIN)
		s->marks |= LS_FAST_FIN_SVM;
	s->since = now;
	s->records++;
	if (emit)
		fast_transmit(s, &o);
	arm = fast_arm(f);
	bpf_spin_unlock(&f->lock);

	if (arm)
		fast_start(f);
	count(LS_R_fast_in, skb, 0);
	if (!emit)
		return TCX_DROP;
	if (o.slot == LS_SLOT_NONE)
		return fast_emit(skb, sc, data, &o, skb_partial);
	return fast_emit_slot(skb, sc, &o, skb_partial);
yield:
	sc->number = fast_yield(s);
	bpf_spin_unlock(&f->lock);
	return LS_FAST_NOT;
slow:
	sc->number = fast_give_up(&r->t);
	return LS_FAST_NOT;
}

/*
 * User space's orders about who owns a connection: a frame that is a struct ls_fast_ctx, given
 * to the program by BPF_PROG_RUN. No program of type syscall, which may take no lock before
 * Linux 6.7.
 */
SEC("tc")
int ls_fast_order(struct __sk_buff *skb)
{
	__u32 key = 0;
	struct ls_fast_ctx *c = bpf_map_lookup_elem(&ls_fast_scratch, &key);
	__u64 now = bpf_ktime_get_boot_ns();
	struct ls_fast *f;
	int arm = 0;

	if (!c || bpf_skb_load_bytes(skb, 0, c, sizeof(*c)))
		return TCX_DROP;
	c->done = 0;
	f = bpf_map_lookup_elem(&ls_fast, &c->t);
	if (f) {
		bpf_spin_lock(&f->lock);
		if (c->op == LS_FAST_TAKE) {
			f->s.owner = LS_OWNER_USER;
			f->untold = 0;
			c->s = f->s;
			c->done = 1;
		} else if (f->s.owner == LS_OWNER_USER && f->s.number == c->s.number) {
			f->s = c->s;
			f->s.owner = LS_OWNER_KERNEL;
			f->s.since = now;
			f->untold = 0;
			c->done = 1;
			arm = fast_arm(f);
		}
		bpf_spin_unlock(&f->lock);
		if (arm)
			fast_start(f);
	}
	bpf_skb_store_bytes(skb, 0, c, sizeof(*c), 0);
	return TCX_NEXT;
}

#endif
