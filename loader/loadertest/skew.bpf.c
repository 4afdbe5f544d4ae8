//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * skew.bpf.c: makes a namespace's TCP look as if another kernel had chosen its
 * ISNs and timestamps. Two namespaces share the kernel's secrets, so without it
 * a wrong rewriter would pass every test. Attached to the guest's own end of
 * its link: the skew is added to what it sends and taken from what it receives.
 *
 * Knows the option layouts that Linux sends, which is what runs in the tests.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define SEQ 1 /* words of the TCP header */
#define ACKNO 2
#define FLAGS 3
#define OPTS 5
#define WORDS 15
#define F_SYN 0x00020000
#define F_ACK 0x00100000

struct key {
	__u8 remote[16];
	__u32 ports; /* guest's, then remote's */
};

struct skew {
	__u32 isn; /* as the guest chose it */
	__u32 seq;
	__u32 ts;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct key);
	__type(value, struct skew);
} skews SEC(".maps");

__u64 skewed; /* segments changed */
__u64 unskewed;
__u64 wrapping; /* connections whose skewed ISN is just below 2^32 */
__u32 behind;	/* ticks that the guest's clock has lost */
__u32 wrap_seq; /* new connections: positions before the ISN's stream wraps; 0: any */
__u32 wrap_ts;	/* ticks before its timestamps do */

struct seg {
	__u32 l4, words;
	struct key k;
	__u32 old[WORDS], new[WORDS];
};

static __always_inline int parse(struct __sk_buff *skb, struct seg *s, int out)
{
	__u8 ip[40] = {}, ext[2], proto;
	__u32 ports[1];

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, ip, 20))
			return -1;
		proto = ip[9];
		s->l4 = ETH_HLEN + (ip[0] & 15) * 4;
		__builtin_memcpy(s->k.remote, out ? ip + 16 : ip + 12, 4);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, ip, 40))
			return -1;
		proto = ip[6];
		s->l4 = ETH_HLEN + 40;
		__builtin_memcpy(s->k.remote, out ? ip + 24 : ip + 8, 16);
		if (proto == IPPROTO_HOPOPTS || proto == IPPROTO_DSTOPTS) {
			if (bpf_skb_load_bytes(skb, s->l4, ext, sizeof(ext)))
				return -1;
			proto = ext[0];
			s->l4 += (ext[1] + 1) * 8;
		}
	} else {
		return -1;
	}
	if (proto != IPPROTO_TCP || bpf_skb_load_bytes(skb, s->l4, s->old, 20))
		return -1;
	s->words = bpf_ntohl(s->old[FLAGS]) >> 28;
	if (s->words > 5 && s->words <= WORDS) {
		__u32 n = (s->words - 5) * 4;

		barrier_var(n); /* the verifier forgets the words' range otherwise */
		if (n < 4 || n > 40 || bpf_skb_load_bytes(skb, s->l4 + 20, s->old + 5, n))
			return -1;
	}
	ports[0] = bpf_ntohl(s->old[0]);
	s->k.ports = out ? ports[0] : ports[0] << 16 | ports[0] >> 16;
	__builtin_memcpy(s->new, s->old, sizeof(s->new));
	return 0;
}

static __always_inline void add(__u32 *w, __u32 n)
{
	*w = bpf_htonl(bpf_ntohl(*w) + n);
}

static __always_inline int is(const struct seg *s, __u32 i, __u32 word)
{
	return i < s->words && bpf_ntohl(s->old[i]) == word;
}

/* The timestamps of a SYN stand behind the MSS, with or without SACK-permitted. */
static __always_inline int syn_ts(const struct seg *s)
{
	return is(s, OPTS + 1, 0x0402080a) || is(s, OPTS + 1, 0x0101080a);
}

static __always_inline void store(struct __sk_buff *skb, struct seg *s)
{
	__u32 n = s->words * 4;
	__s64 diff = bpf_csum_diff(s->old, sizeof(s->old), s->new, sizeof(s->new), 0);

	barrier_var(n);
	if (n < 20 || n > sizeof(s->new))
		return;
	bpf_skb_store_bytes(skb, s->l4, s->new, n, 0);
	bpf_l4_csum_replace(skb, s->l4 + 16, 0, diff, 0);
}

SEC("tcx/egress") int skew_out(struct __sk_buff *skb)
{
	struct seg s = {};
	struct skew *w, fresh = {};
	__u32 flags;

	if (parse(skb, &s, 1))
		return -1;
	flags = bpf_ntohl(s.old[FLAGS]);
	w = bpf_map_lookup_elem(&skews, &s.k);
	if (flags & F_SYN && (!w || w->isn != bpf_ntohl(s.old[SEQ]))) {
		fresh.isn = bpf_ntohl(s.old[SEQ]);
		fresh.seq = bpf_get_prandom_u32();
		fresh.ts = bpf_get_prandom_u32();
		if (fresh.ts & 1) {
			fresh.seq = -(bpf_get_prandom_u32() % 100000) - fresh.isn;
			__sync_fetch_and_add(&wrapping, 1);
		}
		if (wrap_seq)
			fresh.seq = -wrap_seq - fresh.isn;
		if (wrap_ts && syn_ts(&s))
			fresh.ts = behind - wrap_ts - bpf_ntohl(s.old[OPTS + 2]);
		bpf_map_update_elem(&skews, &s.k, &fresh, BPF_ANY);
		w = &fresh;
	}
	if (!w)
		return -1;
	add(&s.new[SEQ], w->seq);
	if (is(&s, OPTS, 0x0101080a))
		add(&s.new[OPTS + 1], w->ts - behind);
	else if (flags & F_SYN && syn_ts(&s))
		add(&s.new[OPTS + 2], w->ts - behind);
	store(skb, &s);
	__sync_fetch_and_add(&skewed, 1);
	return -1;
}

static __always_inline void sack(struct seg *s, __u32 seq, const __u32 at)
{
	__u32 head;

	if (at >= s->words)
		return;
	head = bpf_ntohl(s->old[at]);
	if (head >> 8 != 0x010105)
		return;
#pragma unroll
	for (__u32 i = 1; i <= 8; i++)
		if (at + i < WORDS && i <= ((head & 0xff) - 2) / 4)
			add(&s->new[at + i], seq);
}

/* An ICMP error quotes a segment as others know it. No options, as Linux sends them. */
static __always_inline void quoted(struct __sk_buff *skb)
{
	int v6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	__u32 ip = v6 ? 40 : 20, icmp = ETH_HLEN + ip, inner = icmp + 8;
	__u32 words[2], seq;
	struct key k = {};
	struct skew *w;
	__u8 proto = 0, type = 0;

	bpf_skb_load_bytes(skb, ETH_HLEN + (v6 ? 6 : 9), &proto, 1);
	bpf_skb_load_bytes(skb, icmp, &type, 1);
	if (v6 ? proto != IPPROTO_ICMPV6 || type > 4
	       : proto != IPPROTO_ICMP || (type != 3 && type != 11))
		return;
	if (bpf_skb_load_bytes(skb, inner + (v6 ? 6 : 9), &proto, 1) || proto != IPPROTO_TCP)
		return;
	if (v6 ? bpf_skb_load_bytes(skb, inner + 24, k.remote, 16)
	       : bpf_skb_load_bytes(skb, inner + 16, k.remote, 4))
		return;
	if (bpf_skb_load_bytes(skb, inner + ip, words, sizeof(words)))
		return;
	k.ports = bpf_ntohl(words[0]);
	w = bpf_map_lookup_elem(&skews, &k);
	if (!w)
		return;
	seq = bpf_htonl(bpf_ntohl(words[1]) - w->seq);
	bpf_skb_store_bytes(skb, inner + ip + 4, &seq, sizeof(seq), 0);
	bpf_l4_csum_replace(skb, icmp + 2, words[1], seq, sizeof(seq));
	__sync_fetch_and_add(&unskewed, 1);
}

SEC("tcx/ingress") int skew_in(struct __sk_buff *skb)
{
	struct seg s = {};
	struct skew *w;

	if (parse(skb, &s, 0)) {
		quoted(skb);
		return -1;
	}
	w = bpf_map_lookup_elem(&skews, &s.k);
	if (!w || !(bpf_ntohl(s.old[FLAGS]) & F_ACK))
		return -1;
	add(&s.new[ACKNO], -w->seq);
	if (is(&s, OPTS, 0x0101080a)) {
		if (s.old[OPTS + 2])
			add(&s.new[OPTS + 2], behind - w->ts);
		sack(&s, -w->seq, OPTS + 3);
	} else {
		if (bpf_ntohl(s.old[FLAGS]) & F_SYN && syn_ts(&s) && s.old[OPTS + 3])
			add(&s.new[OPTS + 3], behind - w->ts);
		sack(&s, -w->seq, OPTS);
	}
	store(skb, &s);
	__sync_fetch_and_add(&unskewed, 1);
	return -1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
