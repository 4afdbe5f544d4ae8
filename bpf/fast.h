/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fast.h: the fast path (R27). P's kernel compares the common case itself: whole segments
 * of both guests that meet in order, with no flag but ACK, PSH and FIN and no option but
 * timestamps, and ACKs that grow.
 *
 * A connection has an owner. User space owns it at first, and hands it over with its state
 * (ls_fast_order) when nothing of it waits, at the earliest with its SYN|ACK. From then on it is
 * the kernel's: nothing is reported. Whatever is not the common case gives it back: the state stays
 * in the map, and the event that reports the frame is the sign for user space to fetch it. What
 * waits too long gives it back by a timer. User space can take it back at any time.
 *
 * What leaves is what package compare would have had leave: R1 (bytes), R2 (ACK, window,
 * timestamps). Under the lock nothing is called, so digests and copies are made before, and
 * frames are sent after.
 */
#ifndef LS_FAST_H
#define LS_FAST_H

#include "csum.h"
#include "digest.h"
#include "hold.h"
#include "maps.h"
#include "seq.h"

#define LS_TS_LEN 12	/* NOP, NOP, timestamps: as guests lay them out */
#define LS_CHECK_OFF 16 /* of the checksum in the TCP header */
#define LS_CLOCK_BOOTTIME 7

/* What fast_pvm and fast_record return beside verdicts. */
#define LS_FAST_NOT 1000
#define LS_FAST_PASS 1001

struct ls_fast {
	struct bpf_spin_lock lock;
	__u32 armed; /* the timer runs */
	__u32 has_timer;
	__u32 untold; /* the ring had no room to say that it is user space's again */
	struct bpf_timer timer;
	struct ls_fast_state s;
};

/* Not pinned: a daemon that starts owns all connections. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LS_CONNS);
	__type(key, struct ls_tuple);
	__type(value, struct ls_fast);
} ls_fast SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ls_fast_ctx);
} ls_fast_scratch SEC(".maps");

/* us that something waits before user space is asked */
volatile const __u32 ls_fast_wait = 10000;

volatile __u32 ls_fast_on; /* set by user space: the kernel may own connections */

static __always_inline __u64 fast_wait(void)
{
	return ls_fast_wait * 1000ull;
}

/* What a frame that leaves says, and of a held one where it is. */
struct ls_fast_out {
	__u32 slot; /* LS_SLOT_NONE: the template */
	__u32 len;
	__u32 l4;
	__u32 partial; /* the held frame has a partial checksum */
	__u32 seq;
	__u32 ack;
	__u32 win;
	__u32 ts; /* has timestamps: */
	__u32 tsval;
	__u32 tsecr;
};

/* The timestamps in TCP options of LS_TS_LEN bytes; 0: not laid out as usual. */
static __always_inline int fast_ts(const __u8 *opts, __u32 *tsval, __u32 *tsecr)
{
	__be32 v;

	if (opts[0] != LS_OPT_NOP || opts[1] != LS_OPT_NOP || opts[2] != LS_OPT_TS || opts[3] != 10)
		return 0;
	__builtin_memcpy(&v, opts + 4, 4);
	*tsval = bpf_ntohl(v);
	__builtin_memcpy(&v, opts + 8, 4);
	*tsecr = bpf_ntohl(v);
	return v != 0;
}

/* compare's side.update, for a window scale that is known. Returns whether anything grew. */
static __always_inline int acked_update(struct ls_acked *d, __u32 ack, __u32 win, __u32 scale,
					int ts, __u32 echo)
{
	__u32 edge = ack + (win << (scale & 15));
	int fresh = 0, grew = 0;

	win >>= 14;
	if (seq_after(ack, d->ack)) {
		d->ack = ack;
		d->win = win;
		fresh = grew = 1;
	} else if (ack == d->ack && win > d->win) {
		d->win = win;
		grew = 1;
	}
	if (seq_after(edge, d->edge)) {
		d->edge = edge;
		grew = 1;
	}
	if (ts && ack == d->ack && (fresh || !d->echoes || seq_after(echo, d->echo))) {
		d->echo = echo;
		d->echoes = 1;
	}
	return grew;
}

/* compare's ackState.minimum (R2): what may be acknowledged. Returns whether it has grown. */
static __always_inline int fast_minimum(const struct ls_fast_state *s, const struct ls_acked *pvm,
					const struct ls_acked *svm, __u32 *ack, __u32 *edge,
					__u32 *win)
{
	__u32 scale = s->scale & 15, w = 0;

	if (ls_mutate & LS_MUTATE_FAST_R2)
		svm = pvm;
	*ack = seq_after(pvm->ack, svm->ack) ? svm->ack : pvm->ack;
	if (seq_after(s->sent.ack, *ack))
		*ack = s->sent.ack;
	*edge = seq_after(pvm->edge, svm->edge) ? svm->edge : pvm->edge;
	if (seq_after(s->sent.edge, *edge))
		*edge = s->sent.edge;
	if (!seq_after(*ack, *edge)) {
		w = (*edge - *ack) >> scale;
		if (w > 0xffff)
			w = 0xffff;
	}
	*win = w;
	*edge = *ack + (w << scale);
	return seq_after(*ack, s->sent.ack) || seq_after(*edge, s->sent.edge);
}

/* Fills in what the frame that leaves acknowledges, and notes it as sent (transmit, stamp). */
static __always_inline void fast_transmit(struct ls_fast_state *s, struct ls_fast_out *o)
{
	const struct ls_acked *slow = &s->pvm;
	__u32 ack, edge, win;

	fast_minimum(s, &s->pvm, &s->svm, &ack, &edge, &win);
	o->ack = ack;
	o->win = win;
	if (seq_after(s->sent.edge, edge))
		edge = s->sent.edge;
	s->sent.ack = ack;
	s->sent.edge = edge;
	s->sent.win = win >> 14;
	s->sent.echoes = 0;
	o->ts = s->ts;
	if (!s->ts)
		return;
	if (seq_after(s->pvm.ack, s->svm.ack) ||
	    (s->svm.ack == s->pvm.ack && s->svm.echoes &&
	     (!s->pvm.echoes || seq_after(s->svm.echo, s->pvm.echo))))
		slow = &s->svm;
	if (slow->echoes)
		o->tsecr = slow->echo;
	if (seq_after(s->ts_sent, o->tsval))
		o->tsval = s->ts_sent;
	else
		s->ts_sent = o->tsval;
}

/* Is there something that only one of the guests has said? */
static __always_inline int fast_waits(const struct ls_fast_state *s)
{
	return s->nheld || s->nrecs || s->pvm.ack != s->svm.ack;
}

/* Under the lock: gives the connection to user space. Returns the number of the event. */
static __always_inline __u32 fast_yield(struct ls_fast_state *s)
{
	s->owner = LS_OWNER_USER;
	return ++s->number;
}

/* Under the lock: is the timer to be started? */
static __always_inline int fast_arm(struct ls_fast *f)
{
	if (f->armed || !fast_waits(&f->s))
		return 0;
	f->armed = 1;
	return 1;
}

static int fast_timeout(void *map, struct ls_tuple *key, struct ls_fast *f)
{
	__u64 now = bpf_ktime_get_boot_ns(), again = 0;
	struct ls_ev *ev;
	__u32 n = 0, tell;

	bpf_spin_lock(&f->lock);
	f->armed = 0;
	tell = f->untold;
	if (f->s.owner == LS_OWNER_KERNEL && fast_waits(&f->s)) {
		if (now - f->s.since >= fast_wait()) {
			n = fast_yield(&f->s);
			tell = 1;
		} else {
			again = fast_wait() - (now - f->s.since);
		}
	} else if (tell) {
		n = f->s.number;
	}
	f->untold = 0;
	bpf_spin_unlock(&f->lock);
	if (tell) {
		ev = bpf_ringbuf_reserve(&ls_ring, sizeof(*ev), 0);
		if (ev) {
			__builtin_memset(ev, 0, offsetof(struct ls_ev, hdr));
			ev->type = LS_EV_YIELD;
			ev->slot = LS_SLOT_NONE;
			ev->at = now;
			ev->t = *key;
			ev->number = n;
			bpf_ringbuf_submit(ev, 0);
			return 0;
		}
		again = fast_wait();
		bpf_spin_lock(&f->lock);
		f->untold = 1;
		bpf_spin_unlock(&f->lock);
	}
	if (again && !bpf_timer_start(&f->timer, again, 0)) {
		bpf_spin_lock(&f->lock);
		f->armed = 1;
		bpf_spin_unlock(&f->lock);
	}
	return 0;
}

static __always_inline void fast_start(struct ls_fast *f)
{
	if (!f->has_timer) {
		bpf_timer_init(&f->timer, &ls_fast, LS_CLOCK_BOOTTIME);
		bpf_timer_set_callback(&f->timer, fast_timeout);
		f->has_timer = 1;
	}
	bpf_timer_start(&f->timer, fast_wait(), 0);
}

/*
 * A frame or record that user space decides about. Returns the number of its event, 0 where
 * the connection has never been the kernel's.
 */
static __always_inline __u32 fast_give_up(const struct ls_tuple *t)
{
	struct ls_fast *f = bpf_map_lookup_elem(&ls_fast, t);
	__u32 n;

	if (!f)
		return 0;
	bpf_spin_lock(&f->lock);
	n = fast_yield(&f->s);
	bpf_spin_unlock(&f->lock);
	return n;
}

/*
 * Writes o's numbers into the TCP header at l4 of the frame, which has the one in sc->p.tcp,
 * and keeps its checksum right. Returns the difference of the checksum, or -1.
 */
static __always_inline __s64 fast_write(struct __sk_buff *skb, struct ls_scratch *sc,
					const struct ls_fast_out *o, __u32 l4)
{
	__be32 v;
	__be16 w;

	__builtin_memcpy(sc->tcp, sc->p.tcp, sizeof(sc->tcp));
	v = bpf_htonl(o->seq);
	__builtin_memcpy(sc->tcp + 4, &v, 4);
	v = bpf_htonl(o->ack);
	__builtin_memcpy(sc->tcp + 8, &v, 4);
	w = bpf_htons(o->win);
	__builtin_memcpy(sc->tcp + 14, &w, 2);
	if (o->ts) {
		v = bpf_htonl(o->tsval);
		__builtin_memcpy(sc->tcp + 24, &v, 4);
		v = bpf_htonl(o->tsecr);
		__builtin_memcpy(sc->tcp + 28, &v, 4);
	}
	if (bpf_skb_store_bytes(skb, l4 + 4, sc->tcp + 4, 12, 0))
		return -1;
	if (o->ts && bpf_skb_store_bytes(skb, l4 + LS_TCP_MIN, sc->tcp + LS_TCP_MIN, LS_TS_LEN, 0))
		return -1;
	return bpf_csum_diff((__be32 *)sc->p.tcp, LS_TCP_MAX, (__be32 *)sc->tcp, LS_TCP_MAX, 0);
}

/* The PVM's frame leaves as it passes, with o's numbers. */
static __always_inline int fast_pass(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_fast_out *o)
{
	__u32 l4 = sc->p.l4_off;
	__s64 diff = fast_write(skb, sc, o, l4);

	if (diff < 0 || bpf_l4_csum_replace(skb, l4 + LS_CHECK_OFF, 0, diff, 0))
		return -1;
	__builtin_memcpy(sc->p.tcp, sc->tcp, sizeof(sc->tcp));
	sc->p.seq = o->seq;
	sc->p.ack = o->ack;
	sc->p.win = o->win;
	return 0;
}

/*
 * The sum over a frame's bytes from l4 on, of which those behind its end are 0, on top of
 * sum. data has room for LS_SLOT_DATA bytes.
 */
static __always_inline __s64 fast_sum(__u8 *data, __u32 l4, __u32 len, __s64 sum)
{
#pragma clang loop unroll(full)
	for (__u32 i = 0; i < 4; i++) {
		__u32 at = l4 + i * LS_FAST_CHUNK, n;

		if (at >= len)
			break;
		n = (len - at + 3) & ~3u;
		barrier_var(n);
		if (n > LS_FAST_CHUNK)
			n = LS_FAST_CHUNK;
		barrier_var(at);
		if (at > LS_SLOT_DATA - LS_FAST_CHUNK)
			return -1;
		sum = bpf_csum_diff(NULL, 0, (__be32 *)(data + at), n, sum);
		if (sum < 0)
			return -1;
	}
	return sum;
}

/* May a frame with such a checksum take the place of one with the other? */
static __always_inline int fast_fits(int skb_partial, __u32 start, __u32 offset, int partial,
				     __u32 l4)
{
	return !skb_partial || (partial && start == l4 && offset == LS_CHECK_OFF);
}

/*
 * Turns the peer frame into the PVM's frame in data, with o's numbers, and sends it where
 * released frames go: the tap's ingress. Returns a verdict.
 */
static __always_inline int fast_emit(struct __sk_buff *skb, struct ls_scratch *sc, __u8 *data,
				     const struct ls_fast_out *o, int skb_partial)
{
	__u32 len = o->len, l4 = o->l4;
	__s64 diff, sum;
	__u16 check;

	barrier_var(l4);
	barrier_var(len);
	if (l4 < ETH_HLEN || l4 > LS_FAST_L4_MAX || len < l4 + LS_TCP_MIN || len > LS_SLOT_DATA - 4)
		goto lost;
	__builtin_memset(sc->p.tcp, 0, sizeof(sc->p.tcp));
	__builtin_memcpy(sc->p.tcp, data + l4, LS_TCP_MIN + LS_TS_LEN);
	if (!o->ts)
		__builtin_memset(sc->p.tcp + LS_TCP_MIN, 0, LS_TS_LEN);
	if (bpf_skb_change_tail(skb, len, 0))
		goto lost;
	if (bpf_skb_store_bytes(skb, 0, data, len, BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH))
		goto lost;
	diff = fast_write(skb, sc, o, l4);
	if (diff < 0)
		goto lost;
	if (!skb_partial && o->partial) {
		/* The field has the sum of the pseudo header. */
		__builtin_memset(data + len, 0, 4);
		sum = fast_sum(data, l4, len, diff);
		if (sum < 0)
			goto lost;
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		check = ~(sum + (sum >> 16));
		if (bpf_skb_store_bytes(skb, l4 + LS_CHECK_OFF, &check, sizeof(check), 0))
			goto lost;
	} else if (bpf_l4_csum_replace(skb, l4 + LS_CHECK_OFF, 0, diff, 0)) {
		goto lost;
	}
	skb->mark = ls_mark_rel;
	return count(LS_R_fast_out, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
lost:
	return count(LS_R_rewrite_failed, skb, TCX_DROP);
}

/* Has the frame in o's slot leave in place of the record in skb, and frees the slot. */
static __always_inline int fast_emit_slot(struct __sk_buff *skb, struct ls_scratch *sc,
					  const struct ls_fast_out *o, int skb_partial)
{
	struct ls_slot *slot = bpf_map_lookup_elem(&ls_slots, &o->slot);
	int verdict;

	if (!slot)
		return TCX_DROP;
	verdict = fast_emit(skb, sc, slot->data, o, skb_partial);
	__sync_lock_test_and_set(&slot->state, LS_SLOT_FREE);
	return verdict;
}

#endif
