/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * csum.h: changes TCP numbers in a frame and keeps its checksum right (R10).
 *
 * One bpf_csum_diff runs over the whole TCP header, so options at odd offsets need no
 * care. bpf_l4_csum_replace leaves a partial checksum alone: its field holds the sum of
 * the pseudo header, which does not change. Stores pass no BPF_F_RECOMPUTE_CSUM: the
 * change and the checksum field's cancel each other out, so the sum of a
 * CHECKSUM_COMPLETE skb stays right.
 */
#ifndef LS_CSUM_H
#define LS_CSUM_H

#include "maps.h"
#include "parse.h"

#define LS_OPT_EOL 0
#define LS_OPT_NOP 1
#define LS_OPT_SACK 5
#define LS_OPT_TS 8
#define LS_OPT_MD5 19
#define LS_OPT_AO 29
#define LS_OPT_MPTCP 30
#define LS_TCP_MIN 20
#define LS_TCP_MAX 60

static __always_inline void add32(__u8 *p, __u32 delta)
{
	__be32 v;

	__builtin_memcpy(&v, p, 4);
	v = bpf_htonl(bpf_ntohl(v) + delta);
	__builtin_memcpy(p, &v, 4);
}

/* One option of sc->tcp. Options that do not parse end the walk, as in receivers. */
static long opt_step(__u32 i, struct ls_scratch **ctx)
{
	struct ls_scratch *sc = *ctx;
	struct ls_walk *w = &sc->walk;
	__u8 *tcp = sc->tcp;
	__u32 at = w->at;
	__u32 kind, len;
	__be32 v;

	barrier_var(at);
	if (at >= w->end || at > LS_TCP_MAX - 1)
		return 1;
	kind = tcp[at];
	len = tcp[at + 1]; /* sc->tcp is longer than a header */
	if (kind == LS_OPT_NOP)
		len = 1;
	else if (kind == LS_OPT_EOL || len < 2)
		return 1;
	if (at + len > w->end)
		return 1;
	w->at = at + len;
	if (kind == LS_OPT_TS && len == 10) {
		if (at > LS_TCP_MAX - 10)
			return 1;
		__builtin_memcpy(&v, tcp + at + 2, 4);
		w->has_ts = 1;
		w->tsval = bpf_ntohl(v);
		add32(tcp + at + 2, w->d.tsval);
		__builtin_memcpy(&v, tcp + at + 6, 4);
		w->tsecr = bpf_ntohl(v);
		if (v)
			add32(tcp + at + 6, w->d.tsecr);
	} else if (kind == LS_OPT_SACK) {
		for (__u32 b = 2; b + 8 <= 34 && b + 8 <= len; b += 8) {
			if (at + b > LS_TCP_MAX - 8)
				return 1;
			add32(tcp + at + b, w->d.ack);
			add32(tcp + at + b + 4, w->d.ack);
		}
	} else if (kind == LS_OPT_MD5 || kind == LS_OPT_AO) {
		w->is_sealed = 1;
	} else if (kind == LS_OPT_MPTCP && w->d.strip) {
		for (__u32 b = 0; b < LS_OPTS_MAX && b < len; b++) {
			if (at + b > LS_TCP_MAX - 1)
				return 1;
			tcp[at + b] = LS_OPT_NOP;
		}
	}
	return 0;
}

/* Walks the options in sc->tcp, optlen bytes behind the fixed header, adding *d. */
static __always_inline struct ls_walk *opts_walk(struct ls_scratch *sc, __u32 optlen,
						 const struct ls_delta *d)
{
	struct ls_walk *w = &sc->walk;

	w->d = *d;
	w->at = LS_TCP_MIN;
	w->end = LS_TCP_MIN + optlen;
	w->has_ts = 0;
	w->is_sealed = 0;
	w->tsval = 0;
	w->tsecr = 0;
	if (optlen)
		bpf_loop(LS_OPTS_MAX, opt_step, &sc, 0);
	return w;
}

/*
 * Adds *d to the frame's TCP numbers, in sc->p and in the skb. Where TCP-MD5 or TCP-AO
 * signs the segment, timestamps alone are not changed: that would break the signature.
 * A global function, so that the verifier checks it once and not at every call.
 */
__noinline int translate(struct __sk_buff *skb, struct ls_scratch *sc, const struct ls_delta *delta)
{
	struct ls_delta d;
	struct ls_pkt *p;
	__u32 l4, optlen;
	__s64 diff;

	if (!sc || !delta)
		return -1;
	d = *delta;
	p = &sc->p;
	l4 = p->l4_off;
	optlen = p->optlen;
	if (!(p->flags & LS_ACK))
		d.ack = d.tsecr = 0;
	if (!(d.seq | d.ack | d.tsval | d.tsecr | d.strip))
		return 0;

	__builtin_memcpy(sc->tcp, p->tcp, sizeof(sc->tcp));
	add32(sc->tcp + 4, d.seq);
	add32(sc->tcp + 8, d.ack);
	opts_walk(sc, optlen, &d);
	if (sc->walk.is_sealed && !(d.seq | d.ack | d.strip))
		return 0;

	diff = bpf_csum_diff((__be32 *)p->tcp, LS_TCP_MAX, (__be32 *)sc->tcp, LS_TCP_MAX, 0);
	if (bpf_skb_store_bytes(skb, l4 + 4, sc->tcp + 4, 8, 0))
		return -1;
	barrier_var(optlen);
	if (optlen > 0 && optlen <= LS_OPTS_MAX &&
	    bpf_skb_store_bytes(skb, l4 + LS_TCP_MIN, sc->tcp + LS_TCP_MIN, optlen, 0))
		return -1;
	if (bpf_l4_csum_replace(skb, l4 + offsetof(struct tcphdr, check), 0, diff, 0))
		return -1;
	__builtin_memcpy(p->tcp, sc->tcp, sizeof(p->tcp));
	p->seq += d.seq;
	p->ack += d.ack;
	return 0;
}

/*
 * Blanks the MPTCP option of the SYN in sc->p. Each guest would answer with a random
 * key of its own, so their output could neither be compared nor taken over.
 */
static __always_inline int strip_mptcp(struct __sk_buff *skb, struct ls_scratch *sc)
{
	const struct ls_delta d = {.strip = 1};

	if (ls_mptcp || !(sc->p.flags & LS_SYN) || !sc->p.optlen)
		return 0;
	return translate(skb, sc, &d);
}

#endif
