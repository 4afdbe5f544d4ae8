/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * parse.h: what kind of frame this is and, for TCP, everything the programs ask
 * about it. Frames from taps are not linear, so headers are copied out.
 */
#ifndef LS_PARSE_H
#define LS_PARSE_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "maps.h"

#define LS_ETH_LLDP 0x88cc
#define LS_ETH_RARP 0x8035

enum ls_tcp_flag {
	LS_FIN = 1,
	LS_SYN = 2,
	LS_RST = 4,
	LS_ACK = 16,
};

enum ls_class {
	LS_TCP,	  /* IPv4 or IPv6 without extension headers, whole, TCP */
	LS_LINK,  /* ARP, ND, MLD, IGMP, LLDP, RARP: leaves from the PVM, not compared */
	LS_OTHER, /* anything else that is well-formed */
	LS_BAD,	  /* headers cut short or contradicting themselves */
};

/* ICMPv6: ND is 133..137, MLD 130..132 and 143. */
static __always_inline int icmp6_is_link(struct __sk_buff *skb, __u32 off)
{
	__u8 type;

	if (bpf_skb_load_bytes(skb, off, &type, 1))
		return LS_BAD;
	return (type >= 130 && type <= 137) || type == 143 ? LS_LINK : LS_OTHER;
}

/* Copies the TCP header out; seg is what the IP header says TCP has. */
static __always_inline enum ls_class parse_tcp(struct __sk_buff *skb, struct ls_pkt *p, __u32 l4,
					       __u32 seg, int from_guest)
{
	struct tcphdr *th = (struct tcphdr *)p->tcp;
	__u32 hlen, optlen;

	if (seg < sizeof(*th) || bpf_skb_load_bytes(skb, l4, th, sizeof(*th)))
		return LS_BAD;
	hlen = th->doff * 4;
	if (hlen < sizeof(*th) || hlen > seg)
		return LS_BAD;
	optlen = hlen - sizeof(*th);
	if (optlen > LS_OPTS_MAX)
		return LS_BAD;
	if (optlen > 0 && bpf_skb_load_bytes(skb, l4 + sizeof(*th), p->tcp + sizeof(*th), optlen))
		return LS_BAD;
	p->l4_off = l4;
	p->pay_off = l4 + hlen;
	p->optlen = optlen;
	p->paylen = seg - hlen;
	p->seq = bpf_ntohl(th->seq);
	p->ack = bpf_ntohl(th->ack_seq);
	p->win = bpf_ntohs(th->window);
	p->flags = p->tcp[13];
	p->t.gport = bpf_ntohs(from_guest ? th->source : th->dest);
	p->t.rport = bpf_ntohs(from_guest ? th->dest : th->source);
	return LS_TCP;
}

static __always_inline enum ls_class parse_ip4(struct __sk_buff *skb, struct ls_pkt *p,
					       int from_guest)
{
	__u8 *src = from_guest ? p->t.guest : p->t.remote;
	__u8 *dst = from_guest ? p->t.remote : p->t.guest;
	struct iphdr ip;
	__u32 hlen, len;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return LS_BAD;
	hlen = ip.ihl * 4;
	len = bpf_ntohs(ip.tot_len);
	if (ip.version != 4 || hlen < sizeof(ip) || len < hlen || ETH_HLEN + len > p->len)
		return LS_BAD;
	p->t.proto = ip.protocol;
	if (ip.protocol == IPPROTO_IGMP)
		return LS_LINK;
	if (ip.protocol != IPPROTO_TCP || ip.frag_off & bpf_htons(0x3fff))
		return LS_OTHER;
	src[10] = src[11] = dst[10] = dst[11] = 0xff;
	__builtin_memcpy(src + 12, &ip.saddr, 4);
	__builtin_memcpy(dst + 12, &ip.daddr, 4);
	return parse_tcp(skb, p, ETH_HLEN + hlen, len - hlen, from_guest);
}

static __always_inline enum ls_class parse_ip6(struct __sk_buff *skb, struct ls_pkt *p,
					       int from_guest)
{
	__u8 *src = from_guest ? p->t.guest : p->t.remote;
	__u8 *dst = from_guest ? p->t.remote : p->t.guest;
	__u32 l4 = ETH_HLEN + sizeof(struct ipv6hdr);
	struct ipv6hdr ip;
	__u32 len;
	__u8 hop[2];

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return LS_BAD;
	len = bpf_ntohs(ip.payload_len);
	if (ip.version != 6 || l4 + len > p->len)
		return LS_BAD;
	p->t.proto = ip.nexthdr;
	switch (ip.nexthdr) {
	case IPPROTO_TCP:
		__builtin_memcpy(src, &ip.saddr, 16);
		__builtin_memcpy(dst, &ip.daddr, 16);
		return parse_tcp(skb, p, l4, len, from_guest);
	case IPPROTO_ICMPV6:
		return icmp6_is_link(skb, l4);
	case IPPROTO_HOPOPTS: /* MLD has the router alert option */
		if (bpf_skb_load_bytes(skb, l4, hop, sizeof(hop)))
			return LS_BAD;
		if (hop[0] == IPPROTO_ICMPV6)
			return icmp6_is_link(skb, l4 + (hop[1] + 1) * 8);
		return LS_OTHER;
	}
	return LS_OTHER;
}

/* Fills *p. from_guest: the sender is the guest, else the receiver is. */
static __always_inline enum ls_class parse(struct __sk_buff *skb, struct ls_pkt *p, int from_guest)
{
	__be16 proto;

	__builtin_memset(p, 0, sizeof(*p));
	p->len = skb->len;
	p->l3_off = ETH_HLEN;
	if (skb->vlan_present) {
		p->tci = skb->vlan_tci;
		p->t.vlan = p->tci & 0xfff;
	}
	if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto)))
		return LS_BAD;
	switch (bpf_ntohs(proto)) {
	case ETH_P_IP:
		return parse_ip4(skb, p, from_guest);
	case ETH_P_IPV6:
		return parse_ip6(skb, p, from_guest);
	case ETH_P_ARP:
	case LS_ETH_RARP:
	case LS_ETH_LLDP:
		return LS_LINK;
	}
	return LS_OTHER;
}

/* Position of the payload's first byte: a SYN comes before it. */
static __always_inline __u32 pay_pos(const struct ls_pkt *p)
{
	return p->seq + !!(p->flags & LS_SYN);
}

#endif
