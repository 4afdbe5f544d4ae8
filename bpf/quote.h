/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * quote.h: translates the segment that an ICMP error quotes. A guest ignores errors that
 * do not quote one of its own sequence numbers.
 */
#ifndef LS_QUOTE_H
#define LS_QUOTE_H

#include "conn.h"
#include "csum.h"
#include "digest.h"
#include "parse.h"

#define LS_QUOTE_MIN 8	  /* bytes that every router quotes: ports and sequence number */
#define LS_QUOTE_ACK 12	  /* with so many the ACK is quoted */
#define LS_QUOTE_FLAGS 14 /* the flags */
#define LS_QUOTE_CSUM 18  /* the checksum */
#define LS_QUOTE_EXT 4	  /* IPv6 extension headers that are walked */

/* Types of errors; linux/icmp.h needs the C library. Those of ICMPv6 are below 128. */
enum ls_icmp {
	LS_ICMP_UNREACHABLE = 3,
	LS_ICMP_QUENCH = 4,
	LS_ICMP_REDIRECT = 5,
	LS_ICMP_EXCEEDED = 11,
	LS_ICMP_PARAMETER = 12,
	LS_ICMP_QUERY6 = 128,
};

#define LS_ICMP_CSUM 2 /* where ICMP's checksum is */

static __always_inline int is_icmp_error(const struct ls_pkt *p)
{
	if (!p->dgram || p->frag)
		return 0;
	if (p->t.proto == IPPROTO_ICMPV6)
		return p->t.gport < LS_ICMP_QUERY6;
	if (p->t.proto != IPPROTO_ICMP)
		return 0;
	return (p->t.gport >= LS_ICMP_UNREACHABLE && p->t.gport <= LS_ICMP_REDIRECT) ||
	       p->t.gport == LS_ICMP_EXCEEDED || p->t.gport == LS_ICMP_PARAMETER;
}

/*
 * Reads the quoted IP header at *at, with its sender as t's guest, and advances *at past
 * it. Returns 1 when TCP follows.
 */
static __always_inline int quote_ip4(struct __sk_buff *skb, struct ls_tuple *t, __u32 *at)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, *at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_TCP || bpf_ntohs(ip.frag_off) & 0x1fff)
		return 0;
	t->guest[10] = t->guest[11] = t->remote[10] = t->remote[11] = 0xff;
	__builtin_memcpy(t->guest + 12, &ip.saddr, 4);
	__builtin_memcpy(t->remote + 12, &ip.daddr, 4);
	*at += ip.ihl * 4;
	return 1;
}

static __always_inline int quote_ip6(struct __sk_buff *skb, struct ls_tuple *t, __u32 *at)
{
	struct ipv6hdr ip;
	__u8 ext[4], proto;

	if (bpf_skb_load_bytes(skb, *at, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	__builtin_memcpy(t->guest, &ip.saddr, 16);
	__builtin_memcpy(t->remote, &ip.daddr, 16);
	*at += sizeof(ip);
	proto = ip.nexthdr;
#pragma clang loop unroll(disable)
	for (int i = 0; i < LS_QUOTE_EXT; i++) {
		if (proto != IPPROTO_HOPOPTS && proto != IPPROTO_DSTOPTS &&
		    proto != IPPROTO_FRAGMENT)
			break;
		if (bpf_skb_load_bytes(skb, *at, ext, sizeof(ext)))
			return 0;
		if (proto == IPPROTO_FRAGMENT && (ext[2] << 8 | ext[3]) & 0xfff8)
			return 0;
		*at += proto == IPPROTO_FRAGMENT ? 8 : (ext[1] + 1) * 8;
		proto = ext[0];
	}
	return proto == IPPROTO_TCP;
}

/*
 * Finds the TCP header that the datagram in sc->p quotes, if it is an ICMP error, and
 * fills sc->q. from_guest: the guest sends the error, so the quoted segment is the
 * remote's. Returns 1 when there is one.
 */
__noinline int quote_find(struct __sk_buff *skb, struct ls_scratch *sc, int from_guest)
{
	struct ls_quote *q;
	__be16 ports[2];
	__u32 at, end, len;
	int tcp;

	if (!sc)
		return 0;
	q = &sc->q;
	__builtin_memset(q, 0, sizeof(*q));
	if (!is_icmp_error(&sc->p))
		return 0;
	at = sc->p.l4_off + 8;
	end = sc->p.pay_off + sc->p.paylen;
	if (sc->p.t.proto == IPPROTO_ICMP)
		tcp = quote_ip4(skb, &q->t, &at);
	else
		tcp = quote_ip6(skb, &q->t, &at);
	if (!tcp || at + LS_QUOTE_MIN > end)
		return 0;
	len = end - at;
	if (len > LS_TCP_MAX)
		len = LS_TCP_MAX;
	barrier_var(len);
	if (len < LS_QUOTE_MIN || len > LS_TCP_MAX || bpf_skb_load_bytes(skb, at, q->tcp, len))
		return 0;
	/* Payload may be quoted too: it is not part of the options. */
	if (len > 12) {
		__u32 hlen = (q->tcp[12] >> 4) * 4;

		if (hlen < LS_TCP_MIN)
			return 0;
		if (len > hlen)
			len = hlen;
	}
	__builtin_memcpy(ports, q->tcp, sizeof(ports));
	q->t.gport = bpf_ntohs(ports[0]);
	q->t.rport = bpf_ntohs(ports[1]);
	if (from_guest) {
		__u8 sender[16];

		__builtin_memcpy(sender, q->t.guest, sizeof(sender));
		__builtin_memcpy(q->t.guest, q->t.remote, sizeof(sender));
		__builtin_memcpy(q->t.remote, sender, sizeof(sender));
		q->t.gport = bpf_ntohs(ports[1]);
		q->t.rport = bpf_ntohs(ports[0]);
	}
	q->t.vlan = sc->p.t.vlan;
	q->t.vlan2 = sc->p.t.vlan2;
	q->t.proto = IPPROTO_TCP;
	q->off = at;
	q->len = len;
	return 1;
}

/*
 * Adds *delta to the numbers in sc->q, there and in the skb, as far as they are quoted.
 * The quoted checksum is updated, so ICMP's, which covers both, still holds. If it is
 * not quoted, ICMP's is updated instead. An option that is cut off stays unchanged.
 */
__noinline int quote_move(struct __sk_buff *skb, struct ls_scratch *sc,
			  const struct ls_delta *delta)
{
	struct ls_delta d;
	struct ls_quote *q;
	__u32 len;
	__s64 diff;

	if (!sc || !delta)
		return -1;
	d = *delta;
	q = &sc->q;
	len = q->len;
	/* If the flags are not quoted, an ACK number other than 0 counts as valid. */
	if (len < LS_QUOTE_FLAGS ? len < LS_QUOTE_ACK || !*(__u32 *)(q->tcp + 8)
				 : !(q->tcp[13] & LS_ACK))
		d.ack = d.tsecr = 0;
	if (!(d.seq | d.ack | d.tsval | d.tsecr) || ls_mutate & LS_MUTATE_QUOTE)
		return 0;
	__builtin_memset(sc->tcp, 0, sizeof(sc->tcp));
	barrier_var(len);
	if (len < LS_QUOTE_MIN || len > LS_TCP_MAX || bpf_skb_load_bytes(skb, q->off, sc->tcp, len))
		return -1;
	__builtin_memcpy(q->tcp, sc->tcp, sizeof(q->tcp));
	add32(sc->tcp + 4, d.seq);
	add32(sc->tcp + 8, d.ack);
	opts_walk(sc, len > LS_TCP_MIN ? len - LS_TCP_MIN : 0, &d);
	diff = bpf_csum_diff((__be32 *)q->tcp, LS_TCP_MAX, (__be32 *)sc->tcp, LS_TCP_MAX, 0);
	if (len >= LS_QUOTE_CSUM) {
		__u64 sum = (__u32)diff;
		__u16 check;

		__builtin_memcpy(&check, sc->tcp + 16, sizeof(check));
		sum += (__u16)~check;
		sum = (sum >> 16) + (sum & 0xffff);
		sum = (sum >> 16) + (sum & 0xffff);
		sum = (sum >> 16) + (sum & 0xffff);
		check = ~sum;
		__builtin_memcpy(sc->tcp + 16, &check, sizeof(check));
	} else if (bpf_l4_csum_replace(skb, sc->p.l4_off + LS_ICMP_CSUM, 0, diff, 0)) {
		return -1;
	}
	barrier_var(len);
	if (len < LS_QUOTE_MIN || len > LS_TCP_MAX ||
	    bpf_skb_store_bytes(skb, q->off, sc->tcp, len, 0))
		return -1;
	__builtin_memcpy(q->tcp, sc->tcp, sizeof(q->tcp));
	return 0;
}

/*
 * Translates what the error in sc->p, addressed to the guest, quotes to the guest's
 * numbers, by c and by the edge before it. NULL: none.
 */
static __always_inline int quote_enter(struct __sk_buff *skb, struct ls_scratch *sc,
				       const struct ls_conn *c, const struct ls_conn *edge)
{
	struct ls_delta d = {};

	if (c) {
		d.seq = c->off;
		d.tsval = c->ts_off;
		if (c->ts_first)
			d.tsval -= guard_of(c);
	}
	if (edge) {
		d.seq += edge->off;
		d.tsval += edge->ts_off;
	}
	return quote_move(skb, sc, &d);
}

/* Translates what the guest's error in sc->p quotes to the numbers that the remote knows. */
static __always_inline int quote_leave(struct __sk_buff *skb, struct ls_scratch *sc,
				       const struct ls_conn *c, const struct ls_conn *edge)
{
	struct ls_delta d = {};

	if (c) {
		d.ack = -c->off;
		d.tsecr = -c->ts_off;
		if (c->state & LS_CONN_ECHOES)
			d.tsecr += guard_of(c);
	}
	if (edge) {
		d.ack -= edge->off;
		d.tsecr -= edge->ts_off;
	}
	return quote_move(skb, sc, &d);
}

/* Translates a frame of P's guest as it leaves the host (R22), and returns what leave() does. Not
 * inlined: it has several callers.
 */
static __noinline int edge_out(struct __sk_buff *skb, struct ls_scratch *sc,
			       const struct ls_conf *conf)
{
	enum ls_class class = parse_out(skb);
	struct ls_conn *e;

	if (class == LS_DGRAM && quote_find(skb, sc, 1)) {
		e = edge_of(conf, &sc->q.t);
		if (!e)
			return 0;
		return quote_leave(skb, sc, e, NULL);
	}
	if (class != LS_TCP)
		return 0;
	e = edge_of(conf, &sc->p.t);
	if (!e)
		return 0;
	if (sc->p.flags & LS_SYN && e->isn_svm != sc->p.seq) { /* another connection */
		bpf_map_delete_elem(&ls_edge, &sc->p.t);
		return 0;
	}
	return leave(skb, sc, e, NULL, 0);
}

/* Translates a frame for P's guest, parsed into sc->p, before anything else uses it (R22). */
static __always_inline int edge_in(struct __sk_buff *skb, struct ls_scratch *sc,
				   const struct ls_conf *conf, enum ls_class class)
{
	struct ls_conn *e;

	if (!has_edges(conf))
		return 0;
	if (class == LS_TCP) {
		e = edge_of(conf, &sc->p.t);
		if (!e)
			return 0;
		return enter(skb, sc, e, NULL);
	}
	if (class != LS_DGRAM || !quote_find(skb, sc, 0))
		return 0;
	e = edge_of(conf, &sc->q.t);
	if (!e)
		return 0;
	return quote_enter(skb, sc, e, NULL);
}

/* The offset of the connection that sc->q belongs to. Returns 0 when none is known. */
static __always_inline int quote_offset(const struct ls_scratch *sc, struct ls_offset *o)
{
	struct ls_conn *c = bpf_map_lookup_elem(&ls_conn, &sc->q.t);
	struct ls_half *h;

	if (c) {
		conn_offset(c, o);
		return 1;
	}
	h = bpf_map_lookup_elem(&ls_half, &sc->q.t);
	if (!h || !half_paired(h))
		return 0;
	half_offset(h, o);
	return 1;
}

/*
 * Digests a datagram. The checksum that the guest's own error quotes is left out: it
 * may have been a partial one, which is not updated with the numbers (csum.h), and it
 * follows from the rest.
 */
static __always_inline int digest_dgram(struct __sk_buff *skb, struct ls_scratch *sc,
					const struct ls_keys *keys)
{
	const __u16 none = 0;
	int quoted = sc->q.len >= LS_QUOTE_CSUM;
	__u32 at = sc->q.off + 16;
	int n;

	if (quoted && bpf_skb_store_bytes(skb, at, &none, sizeof(none), 0))
		return -1;
	n = digest(skb, sc, keys, 0);
	if (quoted && bpf_skb_store_bytes(skb, at, sc->q.tcp + 16, sizeof(none), 0))
		return -1;
	return n;
}

#endif
