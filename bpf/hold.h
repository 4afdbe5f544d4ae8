/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * hold.h: frames kept in slots, and the events that report them to user space.
 *
 * Order: reserve the event, claim a slot, copy, mark it READY, submit. User space
 * makes a slot FREE again. Nothing waits: without an event or a slot the frame is
 * not kept, and the caller drops and counts it.
 *
 * A commit without flags wakes the reader only if that has read everything before it.
 * After one with BPF_RB_NO_WAKEUP it therefore wakes nobody, and the ring fills up. So
 * on P every commit, of discarded events too, may wake the reader. On S copies do not,
 * but for one in many, and everything else forces the wake-up.
 */
#ifndef LS_HOLD_H
#define LS_HOLD_H

#include <bpf/bpf_core_read.h>

#include "maps.h"
#include "parse.h"

#define LS_PROBES 32	 /* slots tried before giving up */
#define LS_QUIET_MAX 128 /* copies without a wake-up; a GSO frame counts for 16 */
#define LS_CHECKSUM_PARTIAL 3
#define LS_GSO_DODGY (1 << 1) /* SKB_GSO_DODGY: user space made it */
#define LS_GSO_UFO (1 << 16)  /* SKB_GSO_UDP */
#define LS_FEATURE_GSO 16     /* NETIF_F_GSO_SHIFT: features above it are GSO types */

/* The few fields of the kernel's structures that __sk_buff does not have. */
struct net_device {
	__u64 features;
	__u64 vlan_features;
} __attribute__((preserve_access_index));

struct skb_shared_info {
	unsigned int gso_type;
} __attribute__((preserve_access_index));

struct sk_buff {
	struct net_device *dev;
	__u8 ip_summed : 2;
	__u16 csum_start;
	__u16 csum_offset;
	unsigned int end;
	unsigned char *head;
	unsigned char *data;
} __attribute__((preserve_access_index));

extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym;
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym;

/* What kinds of segments the frame is to be cut into: SKB_GSO_*. */
static __always_inline __u32 gso_type(struct sk_buff *kskb)
{
	struct skb_shared_info *info = bpf_rdonly_cast(
		kskb->head + kskb->end, bpf_core_type_id_kernel(struct skb_shared_info));

	return info->gso_type;
}

/* Has the frame a partial checksum? Then also where, from the frame's start. */
static __always_inline int has_partial(struct __sk_buff *skb, __u16 *start, __u16 *offset)
{
	struct sk_buff *kskb = bpf_cast_to_kern_ctx(skb);

	if (BPF_CORE_READ_BITFIELD(kskb, ip_summed) != LS_CHECKSUM_PARTIAL)
		return 0;
	*start = kskb->csum_start - (kskb->data - kskb->head);
	*offset = kskb->csum_offset;
	return 1;
}

/*
 * Anybody can open connections halfway at no cost, and all connections share the
 * ring: once half of it is used, events of connections that are not open are refused.
 * The ends of a handshake retransmit what was dropped.
 */
static __always_inline int ring_crowded(void)
{
	return !(ls_mutate & LS_MUTATE_FLOOD) &&
	       bpf_ringbuf_query(&ls_ring, BPF_RB_AVAIL_DATA) >
		       bpf_ringbuf_query(&ls_ring, BPF_RB_RING_SIZE) / 2;
}

/* P: does the frame open a connection, or end one that the remote has not opened? */
static __always_inline int pri_not_open(const struct ls_pkt *p)
{
	struct ls_cli *c;

	if (p->flags & LS_SYN)
		return 1;
	if (!(p->flags & (LS_RST | LS_FIN)))
		return 0;
	c = bpf_map_lookup_elem(&ls_cli, &p->t);
	return !c || c->tcp_flags & (LS_SYN | LS_RST);
}

static __always_inline int state_swap(__u32 *state, __u32 from, __u32 to)
{
	return __sync_val_compare_and_swap(state, from, to) == from;
}

/* 0: TCP, 1: datagrams, 4: SYNs, which are never GSO. */
static __always_inline __u32 slot_class(const struct ls_pkt *p)
{
	if (p->dgram)
		return 1;
	return p->flags & LS_SYN && !(ls_mutate & LS_MUTATE_FLOOD) ? 4 : 0;
}

/*
 * Finds a FREE element of an array of n slots of either size, makes it FILLING and
 * returns it. Datagrams have the first quarter and TCP the rest, so that neither
 * starves the other; SYNs have only the second quarter. Each CPU has a cursor for each
 * class, from which the next search starts. Another CPU's cursor, or a flood of SYNs, may
 * have filled a whole run of slots ahead of it, so half of the probes are spread evenly
 * over all slots of the class, from a random place.
 */
static __always_inline struct ls_slot *slot_claim(void *map, __u32 n, const struct ls_pkt *p,
						  __u32 *cursor, __u32 *index)
{
	__u32 first = 0, share = n / LS_DGRAM_SHARE, at = *cursor, step = 1;
	struct ls_slot *s;

	if (p->dgram) {
		n = share ? share : 1;
	} else if (slot_class(p) && share) {
		first = share;
		n = share;
	} else {
		first = share;
		n -= share;
	}

#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < LS_PROBES; i++) {
		__u32 key;

		if (i == LS_PROBES / 2 && n > LS_PROBES) { /* else all are probed */
			at = bpf_get_prandom_u32() % n;
			step = n / (LS_PROBES / 2);
		}
		key = first + at % n;
		at += step;
		s = bpf_map_lookup_elem(map, &key);
		if (!s)
			break;
		if (s->state == LS_SLOT_FREE &&
		    __sync_val_compare_and_swap(&s->state, LS_SLOT_FREE, LS_SLOT_FILLING) ==
			    LS_SLOT_FREE) {
			*cursor = key - first + 1;
			*index = key;
			return s;
		}
	}
	*cursor = bpf_get_prandom_u32();
	return NULL;
}

/* Copies the frame into a claimed slot with room for cap bytes and publishes it. */
static __always_inline int slot_fill(struct __sk_buff *skb, struct ls_slot *s, __u32 len, __u32 cap)
{
	int ok;

	barrier_var(len);
	ok = len > 0 && len <= cap && !bpf_skb_load_bytes(skb, 0, s->data, len);
	s->len = len;
	__sync_lock_test_and_set(&s->state, ok ? LS_SLOT_READY : LS_SLOT_FREE); /* full barrier */
	return ok;
}

/*
 * Keeps the frame, parsed into the scratch memory, in a slot, which sc->slot tells then. Returns
 * LS_R_held, or why it could not. A global function, like parse_in.
 */
__noinline int slot_keep(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	__u32 len = skb->len, index = 0;
	struct ls_slot *s;

	if (!sc)
		return LS_R_no_slot;
	sc->slot = LS_SLOT_NONE;
	if (len <= LS_SLOT_DATA) {
		s = slot_claim(&ls_slots, ls_nslots, &sc->p, &sc->cursor[slot_class(&sc->p)],
			       &index);
		if (!s || !slot_fill(skb, s, len, LS_SLOT_DATA))
			return LS_R_no_slot;
		sc->slot = index;
		return LS_R_held;
	}
	if (len > LS_GSLOT_DATA)
		return LS_R_too_long;
	s = slot_claim(&ls_gslots, ls_ngslots, &sc->p, &sc->cursor[2 + !!sc->p.dgram], &index);
	if (!s || !slot_fill(skb, s, len, LS_GSLOT_DATA))
		return LS_R_no_slot;
	sc->slot = index | LS_SLOT_GSO;
	return LS_R_held;
}

/* Makes a slot FREE that the caller has claimed. */
static __always_inline void slot_free(__u32 index)
{
	struct ls_slot *s = bpf_map_lookup_elem(&ls_slots, &index);

	if (s)
		__sync_lock_test_and_set(&s->state, LS_SLOT_FREE);
}

/*
 * Reserves an event and fills in what comes from the frame itself. NULL: the ring is
 * full. The caller submits or discards it.
 */
static __always_inline struct ls_ev *ev_new(struct __sk_buff *skb, const struct ls_pkt *p,
					    enum ls_ev_type type)
{
	struct ls_ev *ev = bpf_ringbuf_reserve(&ls_ring, sizeof(*ev), 0);
	struct sk_buff *kskb;
	__u32 hdr;

	if (!ev)
		return NULL;
	__builtin_memset(ev, 0, offsetof(struct ls_ev, hdr)); /* of hdr only hdr_len bytes count */
	ev->type = type;
	ev->slot = LS_SLOT_NONE;
	ev->at = bpf_ktime_get_boot_ns();
	ev->t = p->t;
	ev->seq = p->seq;
	ev->ack = p->ack;
	ev->paylen = p->paylen;
	ev->win = p->win;
	ev->tcp_flags = p->flags;
	ev->gso_size = skb->gso_size;
	ev->l3_off = p->l3_off;
	ev->l4_off = p->l4_off;
	ev->pay_off = p->pay_off;
	ev->tci = p->tci;
	ev->frag = p->frag;
	ev->frame_len = p->len;
	if (p->dgram)
		ev->flags |= LS_EV_DGRAM;
	if (p->tci && skb->vlan_proto == bpf_htons(ETH_P_8021AD))
		ev->flags |= LS_EV_8021AD;

	kskb = bpf_cast_to_kern_ctx(skb);
	if (ev->gso_size && gso_type(kskb) & LS_GSO_UFO)
		ev->flags |= LS_EV_UFO;
	if (has_partial(skb, &ev->csum_start, &ev->csum_offset))
		ev->flags |= LS_EV_PARTIAL;

	hdr = p->dgram ? 0 : p->pay_off; /* a datagram leaves as it is in its slot */
	barrier_var(hdr);
	if (hdr > 0 && hdr <= LS_HDR_MAX && !bpf_skb_load_bytes(skb, 0, ev->hdr, hdr))
		ev->hdr_len = hdr;
	return ev;
}

/* How to submit a copy: user space reads it when slots run out, or when P asks for it. */
static __always_inline __u64 copy_wakeup(struct ls_scratch *sc, __u32 slot)
{
	sc->quiet += slot & LS_SLOT_GSO ? 16 : 1;
	if (sc->quiet < LS_QUIET_MAX)
		return BPF_RB_NO_WAKEUP;
	sc->quiet = 0;
	return BPF_RB_FORCE_WAKEUP;
}

#endif
