//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sec_gate.bpf.c: egress of the SVM's tap: lets only mirrored frames in. */

/*
 * As how many frames the tap will count this one when its reader takes it (R13). If the
 * reader does not support frames of this kind (e1000 has no TSO), the kernel segments
 * it after this program, as skb_gso_ok() and its callers decide (seen in 6.18).
 */
static __always_inline __u32 tap_frames(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct sk_buff *kskb = bpf_cast_to_kern_ctx(skb);
	__u32 type, size = skb->gso_size, len;
	struct net_device *dev = kskb->dev;
	__u64 takes;

	if (!size || ls_mutate & LS_MUTATE_DRAIN)
		return 1;
	type = gso_type(kskb) &
	       ~LS_GSO_DODGY; /* not a kind: it only asks for a check of the headers */
	takes = dev->features;
	if (skb->vlan_present || is_vlan(skb->protocol))
		takes &= dev->vlan_features;
	if ((takes >> LS_FEATURE_GSO & type) == type)
		return 1;
	if (skb->gso_segs && type == gso_type(kskb))
		return skb->gso_segs;
	/* In a frame that user space made the segments are not counted yet. */
	if (parse_in(skb) == LS_BAD)
		return 1;
	len = sc->p.paylen;
	if (type & LS_GSO_UFO)
		len += 8; /* fragments: the UDP header is in the first one */
	return len > size ? (len + size - 1) / size : 1;
}

/* Translates a frame for an SVM that took over to the SVM's numbers. */
static __always_inline int sec_enter(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_conf *conf)
{
	struct ls_conn *conn;

	switch (parse_in(skb)) {
	case LS_TCP:
		if (strip_mptcp(skb, sc))
			return -1;
		conn = bpf_map_lookup_elem(&ls_conn, &sc->p.t);
		return conn ? enter(skb, sc, conn, edge_of(conf, &sc->p.t)) : 0;
	case LS_DGRAM:
		if (!quote_find(skb, sc, 0))
			return 0;
		conn = bpf_map_lookup_elem(&ls_conn, &sc->q.t);
		return conn ? quote_enter(skb, sc, conn, edge_of(conf, &sc->q.t)) : 0;
	default:
		return 0;
	}
}

SEC("tcx/egress")
int ls_sec_gate(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	enum ls_reason why;
	__u32 mode;

	if (skb->mark == ls_mark_rel)
		return count(LS_R_released, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
	if (!conf || !sc)
		return count(LS_R_gated, skb, TCX_DROP);
	mode = mode_of(conf);
	if (skb->mark == ls_mark_park && (mode == LS_MODE_RUN || mode == LS_MODE_PARK)) {
		/* It is as it came. What it acknowledges are the PVM's numbers. */
		why = ls_mutate & LS_MUTATE_PARK ? LS_R_delivered : sec_deliver(skb, sc);
		if (why != LS_R_delivered)
			return count(why, skb, TCX_DROP);
		skb->mark = ls_mark_in;
	}
	if (skb->mark == ls_mark_in && mode != LS_MODE_SHUT && mode != LS_MODE_QUIET) {
		skb->mark = 0;
		return count_as(LS_R_let_in, skb, tap_frames(skb, sc), TCX_NEXT);
	}
	if (mode != LS_MODE_SOLO)
		return count(LS_R_gated, skb, TCX_DROP);
	if (skb->mark == ls_mark_park)
		skb->mark = 0;
	if (sec_enter(skb, sc, conf))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_passed, skb, TCX_NEXT);
}
