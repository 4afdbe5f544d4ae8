/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * parse.h: classifies frames and parses their headers into struct ls_pkt. Frames from
 * taps are not linear, so headers are copied out.
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
#define LS_LLC_MAX 1500 /* an ethertype up to it is the length of what follows */

enum ls_tcp_flag {
	LS_FIN = 1,
	LS_SYN = 2,
	LS_RST = 4,
	LS_PSH = 8,
	LS_ACK = 16,
};

enum ls_class {
	LS_TCP,	  /* whole TCP segment */
	LS_LINK,  /* ARP, ND, MLD, IGMP, LLDP, RARP: leaves from the PVM, not compared */
	LS_DGRAM, /* anything else that is well-formed: compared as a datagram */
	LS_BAD,	  /* headers cut short or contradicting themselves */
};

/* Describes a datagram in *p: len bytes at off are digested from position pos on. */
static __always_inline enum ls_class parse_dgram(struct ls_pkt *p, __u32 l4, __u32 off, __u32 len,
						 __u32 pos)
{
	p->dgram = 1;
	p->l4_off = l4;
	p->pay_off = off;
	p->paylen = len;
	p->seq = pos;
	return LS_DGRAM;
}

/* A fragment is digested at its own position; its ports are not used, only the first has them. */
static __always_inline enum ls_class parse_frag(struct ls_pkt *p, __u32 off, __u32 len, __u32 pos,
						int more)
{
	p->frag = pos | more;
	return parse_dgram(p, off, off, len, pos);
}

/* Copies the TCP header out; seg is TCP's length by the IP header. */
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

/*
 * Parses what follows the IP headers, seg bytes at l4. The checksum of UDP and ICMP is
 * not digested: it follows from the rest, and may be partial.
 */
static __always_inline enum ls_class parse_l4(struct __sk_buff *skb, struct ls_pkt *p, __u32 l4,
					      __u32 seg, int from_guest)
{
	__be16 ports[2];
	__u8 type[2];

	switch (p->t.proto) {
	case IPPROTO_TCP:
		if (l4 > LS_L4_MAX)
			break;
		return parse_tcp(skb, p, l4, seg, from_guest);
	case IPPROTO_UDP:
		if (seg < 8 || bpf_skb_load_bytes(skb, l4, ports, sizeof(ports)))
			return LS_BAD;
		p->t.gport = bpf_ntohs(ports[!from_guest]);
		p->t.rport = bpf_ntohs(ports[from_guest]);
		return parse_dgram(p, l4, l4 + 8, seg - 8, 0);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if (seg < 4 || bpf_skb_load_bytes(skb, l4, type, sizeof(type)))
			return LS_BAD;
		p->t.gport = type[0];
		p->t.rport = type[1];
		return parse_dgram(p, l4, l4 + 4, seg - 4, 4);
	}
	return parse_dgram(p, l4, l4, seg, 0);
}

static __always_inline enum ls_class parse_ip4(struct __sk_buff *skb, struct ls_pkt *p,
					       int from_guest)
{
	__u8 *src = from_guest ? p->t.guest : p->t.remote;
	__u8 *dst = from_guest ? p->t.remote : p->t.guest;
	__u32 l3 = p->l3_off;
	struct iphdr ip;
	__u32 hlen, len, frag;

	if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)))
		return LS_BAD;
	hlen = ip.ihl * 4;
	len = bpf_ntohs(ip.tot_len);
	if (ip.version != 4 || hlen < sizeof(ip) || len < hlen || l3 + len > p->len)
		return LS_BAD;
	p->t.proto = ip.protocol;
	if (ip.protocol == IPPROTO_IGMP)
		return LS_LINK;
	src[10] = src[11] = dst[10] = dst[11] = 0xff;
	__builtin_memcpy(src + 12, &ip.saddr, 4);
	__builtin_memcpy(dst + 12, &ip.daddr, 4);
	frag = bpf_ntohs(ip.frag_off);
	if (frag & 0x3fff)
		return parse_frag(p, l3 + hlen, len - hlen, (frag & 0x1fff) * 8, !!(frag & 0x2000));
	return parse_l4(skb, p, l3 + hlen, len - hlen, from_guest);
}

/* ND is 133..137, MLD 130..132 and 143. Solicitations set neigh_req. */
static __always_inline int parse_icmp6_link(struct __sk_buff *skb, struct ls_pkt *p, __u32 l4)
{
	__u64 *from = (__u64 *)p->t.guest;
	__u8 type;

	if (bpf_skb_load_bytes(skb, l4, &type, 1))
		return 0;
	if (type != 143 && (type < 130 || type > 137))
		return 0;
	/* Duplicate address detection has no sender address. */
	if (type == 135 && (from[0] | from[1]))
		p->neigh_req = !bpf_skb_load_bytes(skb, l4 + 8, p->t.remote, 16);
	return 1;
}

#define LS_EXT_MAX 8 /* IPv6 extension headers that are walked */

static __always_inline enum ls_class parse_ip6(struct __sk_buff *skb, struct ls_pkt *p,
					       int from_guest)
{
	__u8 *src = from_guest ? p->t.guest : p->t.remote;
	__u8 *dst = from_guest ? p->t.remote : p->t.guest;
	__u32 at = p->l3_off + sizeof(struct ipv6hdr);
	struct ipv6hdr ip;
	__u32 end, frag;
	int routed = 0;
	__u8 ext[4];

	if (bpf_skb_load_bytes(skb, p->l3_off, &ip, sizeof(ip)))
		return LS_BAD;
	end = at + bpf_ntohs(ip.payload_len);
	if (ip.version != 6 || end > p->len)
		return LS_BAD;
	__builtin_memcpy(src, &ip.saddr, 16);
	__builtin_memcpy(dst, &ip.daddr, 16);
	p->t.proto = ip.nexthdr;
#pragma clang loop unroll(disable)
	for (int i = 0; i < LS_EXT_MAX; i++) {
		__u8 proto = p->t.proto;

		if (proto != IPPROTO_HOPOPTS && proto != IPPROTO_DSTOPTS &&
		    proto != IPPROTO_ROUTING && proto != IPPROTO_FRAGMENT)
			break;
		if (at + 8 > end || bpf_skb_load_bytes(skb, at, ext, sizeof(ext)))
			return LS_BAD;
		p->t.proto = ext[0];
		if (proto == IPPROTO_FRAGMENT) {
			at += 8;
			frag = ext[2] << 8 | ext[3];
			if (frag & 0xfff9)
				return parse_frag(p, at, end - at, frag & 0xfff8, frag & 1);
			continue;
		}
		routed |= proto == IPPROTO_ROUTING;
		at += (ext[1] + 1) * 8;
		if (at > end)
			return LS_BAD;
	}
	if (p->t.proto == IPPROTO_ICMPV6 && parse_icmp6_link(skb, p, at))
		return LS_LINK;
	/* The pseudo header has the final destination, not the header's: not translatable. */
	if (routed)
		return parse_dgram(p, at, at, end - at, 0);
	return parse_l4(skb, p, at, end - at, from_guest);
}

static __always_inline enum ls_class parse_arp(struct __sk_buff *skb, struct ls_pkt *p)
{
	struct {
		__be16 htype, ptype;
		__u8 hlen, plen;
		__be16 op;
		__u8 sha[ETH_ALEN], spa[4], tha[ETH_ALEN], tpa[4];
	} arp;

	if (bpf_skb_load_bytes(skb, p->l3_off, &arp, sizeof(arp)))
		return LS_LINK;
	if (arp.op != bpf_htons(1) || arp.ptype != bpf_htons(ETH_P_IP) || arp.hlen != ETH_ALEN ||
	    arp.plen != 4)
		return LS_LINK;
	/* Probes have no sender address, announcements ask for their own. */
	if (!(arp.spa[0] | arp.spa[1] | arp.spa[2] | arp.spa[3]) ||
	    !__builtin_memcmp(arp.spa, arp.tpa, 4))
		return LS_LINK;
	p->t.guest[10] = p->t.guest[11] = p->t.remote[10] = p->t.remote[11] = 0xff;
	__builtin_memcpy(p->t.guest + 12, arp.spa, 4);
	__builtin_memcpy(p->t.remote + 12, arp.tpa, 4);
	p->neigh_req = 1;
	return LS_LINK;
}

static __always_inline int is_vlan(__be16 proto)
{
	return proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD);
}

/* Fills *p. from_guest: the sender is the guest, else the receiver is. */
static __always_inline enum ls_class parse(struct __sk_buff *skb, struct ls_pkt *p, int from_guest)
{
	int tagged = skb->vlan_present;
	__u32 l3 = ETH_HLEN, len;
	struct ethhdr eth;
	__be16 proto, tag[2];

	__builtin_memset(p, 0, sizeof(*p));
	p->len = skb->len;
	if (tagged) {
		p->tci = skb->vlan_tci;
		p->t.vlan = p->tci & 0xfff;
	}
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return LS_BAD;
	__builtin_memcpy(p->mac, eth.h_source, ETH_ALEN);
	proto = eth.h_proto;
#pragma clang loop unroll(full)
	for (int i = 0; i < 2; i++) {
		if (!is_vlan(proto))
			break;
		if (bpf_skb_load_bytes(skb, l3, tag, sizeof(tag)))
			return LS_BAD;
		if (tagged)
			p->t.vlan2 = bpf_ntohs(tag[0]) & 0xfff;
		else
			p->t.vlan = bpf_ntohs(tag[0]) & 0xfff;
		tagged = 1;
		proto = tag[1];
		l3 += 4;
	}
	p->l3_off = l3;
	switch (bpf_ntohs(proto)) {
	case ETH_P_IP:
		return parse_ip4(skb, p, from_guest);
	case ETH_P_IPV6:
		return parse_ip6(skb, p, from_guest);
	case ETH_P_ARP:
		return parse_arp(skb, p);
	case LS_ETH_RARP:
	case LS_ETH_LLDP:
		return LS_LINK;
	}
	p->t.proto = LS_PROTO_ETH;
	p->t.gport = bpf_ntohs(proto);
	__builtin_memcpy(p->t.guest + 10, from_guest ? eth.h_source : eth.h_dest, ETH_ALEN);
	__builtin_memcpy(p->t.remote + 10, from_guest ? eth.h_dest : eth.h_source, ETH_ALEN);
	len = p->len - l3;
	if (bpf_ntohs(proto) <= LS_LLC_MAX) {
		if (bpf_ntohs(proto) > len)
			return LS_BAD;
		len = bpf_ntohs(proto);
	}
	return parse_dgram(p, l3, l3, len, 0);
}

/*
 * parse_in and parse_out parse a frame for the guest, or of the guest, into the scratch memory's p.
 * They return an enum ls_class. Global functions: the verifier walks each once in a program,
 * whatever ways lead there.
 */
__noinline int parse_in(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();

	return sc ? parse(skb, &sc->p, 0) : LS_BAD;
}

__noinline int parse_out(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();

	return sc ? parse(skb, &sc->p, 1) : LS_BAD;
}

/* Position of the payload's first byte: a SYN comes before it. */
static __always_inline __u32 pay_pos(const struct ls_pkt *p)
{
	return p->seq + !!(p->flags & LS_SYN);
}

/* Does a primary-only rule match this datagram? */
static __always_inline int rule_matches(const struct ls_pkt *p)
{
#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < LS_RULES_MAX; i++) {
		struct ls_rule *r;

		if (i >= ls_nrules)
			break;
		r = bpf_map_lookup_elem(&ls_rules, &i);
		if (r && r->proto == p->t.proto && (!r->gport || r->gport == p->t.gport) &&
		    (!r->rport || r->rport == p->t.rport))
			return 1;
	}
	return 0;
}

#endif
