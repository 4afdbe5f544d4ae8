/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fast_dgram.h: the fast path (R27) for UDP. P's kernel holds a datagram until the SVM's equal
 * one is known, or a digest record until the PVM's datagram comes, in the order of each.
 *
 * A flow is in the bucket that its hash says, which holds what waits of one flow at a time. The
 * kernel owns a bucket until something is not the common case: another order or other bytes, a
 * GSO datagram, two flows at once, a gap in the stream of records, or nothing for too long. Then
 * the whole bucket is user space's, which fetches what waits and says when nothing does any more.
 *
 * Events have the bucket's number, and are not counted: one that is on its way when user space
 * gives its bucket back takes it again. That may put datagrams in another order, and loses none.
 */
#ifndef LS_FAST_DGRAM_H
#define LS_FAST_DGRAM_H

#include "fast.h"
#include "quote.h"

#define LS_UDP_CHECK 6 /* offset of the checksum in the UDP header */

struct ls_bucket {
	struct bpf_spin_lock lock;
	__u32 armed; /* the timer runs */
	__u32 has_timer;
	__u32 pad;
	struct bpf_timer timer;
	struct ls_bucket_state s;
};

/* Not pinned, as ls_fast. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_BUCKETS);
	__type(key, __u32);
	__type(value, struct ls_bucket);
} ls_fast_udp SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ls_bucket_ctx);
} ls_fast_udp_ctx SEC(".maps");

/* FNV-1a over the tuple's words; core.Bucket. */
static __always_inline __u32 bucket_of(const struct ls_tuple *t)
{
	const __u32 *w = (const __u32 *)t;
	__u32 h = 2166136261u;

#pragma clang loop unroll(full)
	for (int i = 0; i < (int)(sizeof(*t) / 4); i++)
		h = (h ^ w[i]) * 16777619u;
	return (h ^ h >> 16) % LS_BUCKETS;
}

static __always_inline int same_flow(const struct ls_tuple *a, const struct ls_tuple *b)
{
	const __u32 *v = (const __u32 *)a, *w = (const __u32 *)b;
	__u32 diff = 0;

#pragma clang loop unroll(full)
	for (int i = 0; i < (int)(sizeof(*a) / 4); i++)
		diff |= v[i] ^ w[i];
	return !diff;
}

/* Is the flow in a bucket? Each of its datagrams has to be, so it is not asked what they are like.
 */
static __always_inline int in_bucket(const struct ls_tuple *t, __u16 frag)
{
	return t->proto == IPPROTO_UDP && !frag;
}

static __always_inline int same_dgram(const struct ls_bucket_dgram *d, __u32 seq, __u32 len,
				      const __u64 *sum)
{
	return d->seq == seq && d->paylen == len &&
	       ((d->sum[0] == sum[0] && d->sum[1] == sum[1]) || ls_mutate & LS_MUTATE_FAST_R1);
}

/* Under the lock: is the timer to be started? */
static __always_inline int bucket_arm(struct ls_bucket *b)
{
	if (b->armed || !b->s.n)
		return 0;
	b->armed = 1;
	return 1;
}

/* What waits too long is user space's, which is told until it has fetched it. */
static int bucket_timeout(void *map, __u32 *key, struct ls_bucket *b)
{
	__u64 now = bpf_ktime_get_boot_ns(), again = 0;
	struct ls_bucket_state *s = &b->s;
	struct ls_tuple t = {};
	struct ls_ev *ev;
	int tell = 0;

	bpf_spin_lock(&b->lock);
	b->armed = 0;
	if (s->n) {
		again = fast_wait();
		if (!s->user && now - s->since < again) {
			again -= now - s->since;
		} else {
			s->user = 1;
			t = s->t;
			tell = 1;
		}
		b->armed = 1;
	}
	bpf_spin_unlock(&b->lock);
	if (tell) {
		ev = bpf_ringbuf_reserve(&ls_ring, sizeof(*ev), 0);
		if (ev) {
			__builtin_memset(ev, 0, offsetof(struct ls_ev, hdr));
			ev->type = LS_EV_YIELD;
			ev->slot = LS_SLOT_NONE;
			ev->at = now;
			ev->t = t;
			ev->number = *key + 1;
			bpf_ringbuf_submit(ev, 0);
		}
	}
	if (again)
		bpf_timer_start(&b->timer, again, 0);
	return 0;
}

static __always_inline void bucket_start(struct ls_bucket *b)
{
	if (!b->has_timer) {
		bpf_timer_init(&b->timer, &ls_fast_udp, LS_CLOCK_BOOTTIME);
		bpf_timer_set_callback(&b->timer, bucket_timeout);
		b->has_timer = 1;
	}
	bpf_timer_start(&b->timer, fast_wait(), 0);
}

/* A datagram or record that user space decides about. Returns the number of its event. */
static __always_inline __u32 bucket_give_up(const struct ls_tuple *t, __u16 frag)
{
	__u32 i = bucket_of(t);
	struct ls_bucket *b;

	if (!in_bucket(t, frag))
		return 0;
	b = bpf_map_lookup_elem(&ls_fast_udp, &i);
	if (!b)
		return 0;
	bpf_spin_lock(&b->lock);
	b->s.user = 1;
	bpf_spin_unlock(&b->lock);
	return i + 1;
}

/*
 * Decides about a datagram of the PVM. Returns a verdict, or LS_FAST_NOT where user space decides:
 * then sc->number is that of the event, and sc->slot has the frame unless it is LS_SLOT_NONE.
 */
__noinline int bucket_pvm(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_bucket_dgram *d, *e;
	int pass = 0, arm = 0, kept = 0;
	struct ls_bucket_state *s;
	struct ls_keys *keys;
	struct ls_bucket *b;
	struct ls_pkt *p;
	__u32 i;

	if (!sc || !conf)
		return LS_FAST_NOT;
	p = &sc->p;
	sc->slot = LS_SLOT_NONE;
	sc->number = 0;
	sc->q.len = 0;
	if (!in_bucket(&p->t, p->frag))
		return LS_FAST_NOT;
	i = bucket_of(&p->t);
	b = bpf_map_lookup_elem(&ls_fast_udp, &i);
	keys = keys_in_use(conf);
	if (!b || !keys)
		return LS_FAST_NOT;
	sc->number = i + 1;
	s = &b->s;
	if (!ls_fast_on || s->user || skb->gso_size || p->len > LS_FAST_LEN ||
	    p->l4_off > LS_FAST_L4_MAX || p->t.vlan || digest_dgram(skb, sc, keys) < 0)
		goto slow;
	if (!(s->n && s->svm)) { /* else it will rarely be held */
		if (slot_keep(skb) != LS_R_held)
			goto slow;
		kept = 1;
	}
	d = &sc->dgram;
	__builtin_memset(d, 0, sizeof(*d));
	d->at = bpf_ktime_get_boot_ns();
	d->sum[0] = sc->digest.sum[0];
	d->sum[1] = sc->digest.sum[1];
	d->slot = sc->slot;
	d->seq = p->seq;
	d->paylen = p->paylen;
	d->frame_len = p->len;
	d->l3_off = p->l3_off;
	d->l4_off = p->l4_off;
	d->pay_off = p->pay_off;
	if (has_partial(skb, &d->csum_start, &d->csum_offset))
		d->flags = LS_EV_PARTIAL;

	bpf_spin_lock(&b->lock);
	if (!ls_fast_on || s->user || (s->n && !same_flow(&s->t, &p->t)))
		goto yield;
	if (s->n && s->svm) {
		e = &s->wait[s->head % LS_BUCKET_MAX];
		if (!same_dgram(e, d->seq, d->paylen, d->sum))
			goto yield;
		s->head++;
		s->n--;
		s->frames++;
		s->since = d->at;
		pass = 1;
	} else {
		if (!kept || s->n >= LS_BUCKET_MAX)
			goto yield;
		if (!s->n) {
			s->t = p->t;
			s->since = d->at;
			s->svm = 0;
		}
		s->wait[(s->head + s->n) % LS_BUCKET_MAX] = *d;
		s->n++;
		kept = 0; /* it is the bucket's */
	}
	arm = bucket_arm(b);
	bpf_spin_unlock(&b->lock);

	if (arm)
		bucket_start(b);
	if (!pass)
		return count(LS_R_fast_held, skb, TCX_DROP);
	if (kept) { /* its record came meanwhile */
		slot_free(sc->slot);
		sc->slot = LS_SLOT_NONE;
	}
	return LS_FAST_PASS;
slow:
	bpf_spin_lock(&b->lock);
yield:
	s->user = 1;
	bpf_spin_unlock(&b->lock);
	return LS_FAST_NOT;
}

/*
 * Turns the peer frame into the PVM's datagram d, whose frame is in data, and sends it where
 * released frames go. Returns a verdict.
 */
static __always_inline int bucket_emit(struct __sk_buff *skb, __u8 *data,
				       const struct ls_bucket_dgram *d, int skb_partial)
{
	__u32 len = d->frame_len, l4 = d->l4_off;
	__u16 check;
	__s64 sum;

	barrier_var(l4);
	barrier_var(len);
	if (l4 < ETH_HLEN || l4 > LS_FAST_L4_MAX || len < l4 + 8 || len > LS_SLOT_DATA - 4)
		goto lost;
	if (bpf_skb_change_tail(skb, len, 0) ||
	    bpf_skb_store_bytes(skb, 0, data, len, BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH))
		goto lost;
	if (!skb_partial && d->flags & LS_EV_PARTIAL) {
		/* The field has the sum of the pseudo header. */
		__builtin_memset(data + len, 0, 4);
		sum = fast_sum(data, l4, len, 0);
		if (sum < 0)
			goto lost;
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		check = ~(sum + (sum >> 16));
		if (!check) /* 0 says that there is none */
			check = 0xffff;
		if (bpf_skb_store_bytes(skb, l4 + LS_UDP_CHECK, &check, sizeof(check), 0))
			goto lost;
	}
	skb->mark = ls_mark_rel;
	count(LS_R_fast_dgram, skb, 0);
	return count(LS_R_fast_out, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
lost:
	return count(LS_R_rewrite_failed, skb, TCX_DROP);
}

/*
 * Decides about the record of a datagram in sc->rec, which the frame is. Returns a verdict, or
 * LS_FAST_NOT where user space decides: then sc->number is that of the event.
 */
__noinline int bucket_record(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	int skb_partial, emit = 0, arm, verdict;
	__u64 now = bpf_ktime_get_boot_ns();
	struct ls_bucket_dgram *d, *e;
	__u16 start = 0, offset = 0;
	struct ls_bucket_state *s;
	struct ls_slot *slot;
	struct ls_bucket *b;
	struct ls_rec *r;
	__u32 i;

	if (!sc || !conf)
		return LS_FAST_NOT;
	r = &sc->rec;
	sc->number = 0;
	if (!in_bucket(&r->t, r->frag))
		return LS_FAST_NOT;
	i = bucket_of(&r->t);
	b = bpf_map_lookup_elem(&ls_fast_udp, &i);
	if (!b)
		return LS_FAST_NOT;
	sc->number = i + 1;
	s = &b->s;
	skb_partial = has_partial(skb, &start, &offset);
	d = &sc->dgram;
	__builtin_memset(d, 0, sizeof(*d));
	d->at = now;
	d->sum[0] = r->sum[0];
	d->sum[1] = r->sum[1];
	d->slot = LS_SLOT_NONE;
	d->seq = r->seq;
	d->paylen = r->end - r->seq;
	d->epoch = r->epoch;

	bpf_spin_lock(&b->lock);
	if (!ls_fast_on || s->user || r->t.vlan || r->epoch != conf->epoch ||
	    (s->n && !same_flow(&s->t, &r->t)))
		goto yield;
	if (s->n && !s->svm) {
		e = &s->wait[s->head % LS_BUCKET_MAX];
		if (!same_dgram(e, d->seq, d->paylen, d->sum) ||
		    (skb_partial && (!(e->flags & LS_EV_PARTIAL) || start != e->l4_off ||
				     offset != LS_UDP_CHECK)) ||
		    (e->flags & LS_EV_PARTIAL &&
		     (e->csum_start != e->l4_off || e->csum_offset != LS_UDP_CHECK)))
			goto yield;
		*d = *e;
		s->head++;
		s->n--;
		s->frames++;
		emit = 1;
	} else {
		if (s->n >= LS_BUCKET_MAX)
			goto yield;
		if (!s->n) {
			s->t = r->t;
			s->svm = 1;
		}
		s->wait[(s->head + s->n) % LS_BUCKET_MAX] = *d;
		s->n++;
	}
	s->since = now;
	arm = bucket_arm(b);
	bpf_spin_unlock(&b->lock);

	if (arm)
		bucket_start(b);
	count(LS_R_fast_in, skb, 0);
	if (!emit)
		return TCX_DROP;
	i = d->slot;
	slot = bpf_map_lookup_elem(&ls_slots, &i);
	if (!slot)
		return TCX_DROP;
	verdict = bucket_emit(skb, slot->data, d, skb_partial);
	__sync_lock_test_and_set(&slot->state, LS_SLOT_FREE);
	return verdict;
yield:
	s->user = 1;
	bpf_spin_unlock(&b->lock);
	return LS_FAST_NOT;
}

/* Under the lock: gives what waits to user space. */
static __always_inline void bucket_fetch(struct ls_bucket_state *s, struct ls_bucket_ctx *c)
{
	volatile __u64 *to = (volatile __u64 *)&c->s; /* too long for the compiler's memcpy */
	const __u64 *from = (const __u64 *)s;

	s->user = 1;
#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < sizeof(*s) / 8; i++)
		to[i] = from[i];
	c->done = 1;
	s->n = 0;
	s->frames = 0;
}

static long bucket_sweep(__u64 i, void *arg)
{
	__u32 zero = 0, key = i;
	struct ls_bucket_ctx *c = bpf_map_lookup_elem(&ls_fast_udp_ctx, &zero);
	struct ls_bucket *b;

	if (!c)
		return 1;
	key += c->index;
	b = bpf_map_lookup_elem(&ls_fast_udp, &key);
	if (!b)
		return 1;
	bpf_spin_lock(&b->lock);
	if (b->s.n)
		bucket_fetch(&b->s, c);
	bpf_spin_unlock(&b->lock);
	if (!c->done)
		return 0;
	c->index = key;
	return 1;
}

/* User space's orders about who owns a bucket, as ls_fast_order's. */
SEC("tc")
int ls_bucket_order(struct __sk_buff *skb)
{
	__u32 key = 0;
	struct ls_bucket_ctx *c = bpf_map_lookup_elem(&ls_fast_udp_ctx, &key);
	struct ls_bucket *b;

	if (!c || bpf_skb_load_bytes(skb, 0, c, sizeof(*c)))
		return TCX_DROP;
	c->done = 0;
	if (c->op == LS_BUCKET_SWEEP) {
		bpf_loop(LS_BUCKETS, bucket_sweep, NULL, 0);
	} else {
		key = c->index;
		b = bpf_map_lookup_elem(&ls_fast_udp, &key);
		if (b) {
			bpf_spin_lock(&b->lock);
			if (c->op == LS_BUCKET_TAKE) {
				bucket_fetch(&b->s, c);
			} else if (b->s.user && !b->s.n) {
				b->s.user = 0;
				c->done = 1;
			}
			bpf_spin_unlock(&b->lock);
		}
	}
	bpf_skb_store_bytes(skb, 0, c, sizeof(*c), 0);
	return TCX_NEXT;
}

#endif
