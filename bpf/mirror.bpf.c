//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mirror.bpf.c: egress of the PVM's tap: frames that the guest is about to receive. */

/*
 * Keeps the remote's newest segment: P sends it to S again when the SVM seems to have
 * missed it (R6), and a restarted daemon learns from it what the remote has received
 * (R23). A SYN replaces what was there; a segment that others overtook is ignored. The
 * ack of a SYN means nothing and that of a RST may be forged, so any segment replaces
 * those.
 */
static __always_inline void mirror_note(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct ls_pkt *p = &sc->p;
	struct ls_cli *c = bpf_map_lookup_elem(&ls_cli, &p->t);
	__u32 hdr = p->pay_off;
	int fresh = !c;
	__u64 now;

	if (c && !(p->flags & (LS_SYN | LS_RST)) &&
	    (!(p->flags & LS_ACK) ||
	     ((c->tcp_flags & (LS_ACK | LS_RST)) == LS_ACK && seq_after(c->ack, p->ack))))
		return;
	if (fresh) {
		c = &sc->cli;
		__builtin_memset(c, 0, sizeof(*c));
	}
	now = bpf_ktime_get_boot_ns();
	if (p->flags & LS_SYN && !(c->tcp_flags & LS_SYN))
		c->reused = !fresh && now - c->at < LS_REUSED_NS;
	c->at = now;
	c->seq = pay_pos(p) + p->paylen;
	c->ack = p->ack;
	c->win = p->win;
	c->tcp_flags = p->flags;
	c->flags = p->tci && skb->vlan_proto == bpf_htons(ETH_P_8021AD) ? LS_EV_8021AD : 0;
	c->l4_off = p->l4_off;
	c->tci = p->tci;
	c->hdr_len = 0;
	barrier_var(hdr);
	if (hdr > 0 && hdr <= LS_HDR_MAX && !bpf_skb_load_bytes(skb, 0, c->hdr, hdr))
		c->hdr_len = hdr;
	if (fresh)
		bpf_map_update_elem(&ls_cli, &p->t, c, BPF_NOEXIST);
}

/*
 * Reports the remote's SYN, FIN and RST, by which user space tracks connections. Returns
 * LS_R_mirrored, or why neither guest may receive the frame.
 */
static __always_inline enum ls_reason mirror_report(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct ls_pkt *p = &sc->p;
	struct ls_ev *ev;

	if (pri_not_open(p) && ring_crowded())
		return LS_R_crowded;
	mirror_note(skb, sc);
	if (!(p->flags & (LS_SYN | LS_FIN | LS_RST)))
		return LS_R_mirrored;
	ev = ev_new(skb, p, LS_EV_CLIENT);
	if (!ev)
		return LS_R_no_ring;
	bpf_ringbuf_submit(ev, 0);
	return LS_R_mirrored;
}

/*
 * Changes that a frame needs before either guest receives it. Returns 1 for a TCP
 * segment, 0 for anything else, -1 when it failed.
 */
static __always_inline int mirror_take(struct __sk_buff *skb, struct ls_scratch *sc,
				       const struct ls_conf *conf)
{
	enum ls_class class = parse_in(skb);

	if (edge_in(skb, sc, conf, class))
		return -1;
	if (class != LS_TCP)
		return 0;
	return strip_mptcp(skb, sc) ? -1 : 1;
}

SEC("tcx/egress")
int ls_mirror(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	enum ls_reason why;
	__u32 mode;
	int took;

	if (skb->mark == ls_mark_rel)
		return count(LS_R_released, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
	if (!conf || !sc)
		return count(LS_R_shut, skb, TCX_DROP);
	mode = mode_of(conf);
	if (skb->mark == ls_mark_in) { /* it has the guest's numbers already */
		skb->mark = 0;
		if (mode != LS_MODE_HOLD)
			return count(LS_R_shut, skb, TCX_DROP);
		return count(LS_R_sacked, skb, TCX_NEXT);
	}
	if (mode != LS_MODE_SOLO && mode != LS_MODE_HOLD)
		return count(LS_R_shut, skb, TCX_DROP);
	took = mirror_take(skb, sc, conf);
	if (took < 0)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	if (mode == LS_MODE_SOLO) {
		/* The next primary needs to know what the remote has received (R8). */
		if (took)
			mirror_note(skb, sc);
		return count(LS_R_passed, skb, TCX_NEXT);
	}

	/* A frame that user space must know of and does not reaches neither guest. */
	why = took ? mirror_report(skb, sc) : LS_R_mirrored;
	if (why != LS_R_mirrored)
		return count(why, skb, TCX_DROP);
	/* A lost clone is recovered by the remote's retransmission. */
	if (bpf_clone_redirect(skb, ls_peer, 0))
		return count(LS_R_mirror_failed, skb, TCX_NEXT);
	return count(LS_R_mirrored, skb, TCX_NEXT);
}
