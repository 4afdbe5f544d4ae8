//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * impair.bpf.c: a bad peer link. Stands in a namespace between the two hosts and
 * loses, repeats and reorders what goes through it, or drops chosen frames.
 *
 * Reordered is what takes the way through user space, which holds it for a while.
 * What is hit depends on a seed and on the frame's place in the sequence alone.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../../bpf/abi.h"

#define DROP 2
#define TYPES 16

/* Of one direction, per mille. */
struct rule {
	__u32 loss;
	__u32 dup;
	__u32 reorder;
	__u32 seed;
	__u64 next; /* place in the sequence */
};

/* What to drop in one direction: records by type, mirrored TCP by flags. */
struct filter {
	__u32 types; /* 1 << type */
	__u8 mask;   /* (flags & mask) == flags; 0: no TCP */
	__u8 flags;
	__u8 pure; /* only without payload */
	__u8 pad;
	__s64 budget; /* frames still to drop */
};

struct counts {
	__u64 seen;
	__u64 lost;
	__u64 dup;
	__u64 reordered;
	__u64 filtered;
	__u64 types[TYPES]; /* seen, by record type; 0: mirrored frames */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct rule);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct filter);
} filters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct counts);
} counted SEC(".maps");

/* Devices by direction: where a frame leaves, and the entrance of the long way. */
volatile const __u32 out[2];
volatile const __u32 slow[2];

/* Type of a record, 0 of any other frame. */
static __always_inline __u32 record_type(struct __sk_buff *skb)
{
	struct ls_pre pre;
	__u8 type;

	if (skb->protocol != bpf_htons(LS_ETHERTYPE) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, &pre, sizeof(pre)) ||
	    bpf_skb_load_bytes(skb, pre.off + offsetof(struct ls_rec, type), &type, 1))
		return 0;
	return type % TYPES;
}

static __always_inline int tcp_matches(struct __sk_buff *skb, const struct filter *f)
{
	__u32 l4, len;
	__u8 tcp[14];

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) ||
		    ip.protocol != IPPROTO_TCP)
			return 0;
		l4 = ETH_HLEN + ip.ihl * 4;
		len = bpf_ntohs(ip.tot_len) - ip.ihl * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.nexthdr != IPPROTO_TCP)
			return 0;
		l4 = ETH_HLEN + sizeof(ip);
		len = bpf_ntohs(ip.payload_len);
	} else {
		return 0;
	}
	if (bpf_skb_load_bytes(skb, l4, tcp, sizeof(tcp)) || (tcp[13] & f->mask) != f->flags)
		return 0;
	return !f->pure || len == (tcp[12] >> 4) * 4;
}

static __always_inline int filtered(struct __sk_buff *skb, __u32 key, __u32 type)
{
	struct filter *f = bpf_map_lookup_elem(&filters, &key);

	if (!f || f->budget <= 0)
		return 0;
	if (type ? !(f->types & 1 << type) : !f->mask || !tcp_matches(skb, f))
		return 0;
	return __sync_fetch_and_add(&f->budget, -1) > 0;
}

/* splitmix64 */
static __always_inline __u64 mix(__u64 x)
{
	x *= 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static __always_inline int impair(struct __sk_buff *skb, const __u32 dir)
{
	__u32 key = dir, type = record_type(skb);
	struct rule *r = bpf_map_lookup_elem(&rules, &key);
	struct counts *c = bpf_map_lookup_elem(&counted, &key);
	__u64 dice;

	if (!r || !c)
		return DROP;
	__sync_fetch_and_add(&c->seen, 1);
	__sync_fetch_and_add(&c->types[type % TYPES], 1);
	if (filtered(skb, dir, type)) {
		__sync_fetch_and_add(&c->filtered, 1);
		return DROP;
	}
	dice = mix(__sync_fetch_and_add(&r->next, 1) + ((__u64)r->seed << 32));
	if (dice % 1000 < r->loss) {
		__sync_fetch_and_add(&c->lost, 1);
		return DROP;
	}
	if ((dice >> 20) % 1000 < r->dup) {
		__sync_fetch_and_add(&c->dup, 1);
		bpf_clone_redirect(skb, out[dir], 0);
	}
	if ((dice >> 40) % 1000 < r->reorder) {
		__sync_fetch_and_add(&c->reordered, 1);
		return bpf_redirect(slow[dir], 0);
	}
	return bpf_redirect(out[dir], 0);
}

SEC("tcx/ingress") int impair_p2s(struct __sk_buff *skb)
{
	return impair(skb, LS_DIR_P2S);
}

SEC("tcx/ingress") int impair_s2p(struct __sk_buff *skb)
{
	return impair(skb, LS_DIR_S2P);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
