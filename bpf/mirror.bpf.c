//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mirror.bpf.c: egress of the PVM's tap: what the guest is about to receive. */

/* SYN, FIN and RST of the remote begin and end what user space tracks. */
static __always_inline int mirror_tell(struct __sk_buff *skb, struct ls_pkt *p)
{
	struct ls_ev *ev;

	if (parse(skb, p, 0) != LS_TCP || !(p->flags & (LS_SYN | LS_FIN | LS_RST)))
		return 0;
	ev = ev_new(skb, p, LS_EV_CLIENT);
	if (!ev)
		return -1;
	bpf_ringbuf_submit(ev, 0);
	return 0;
}

SEC("tcx/egress")
int ls_mirror(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	__u32 mode;

	if (skb->mark == ls_mark_rel)
		return count(LS_R_released, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
	if (!conf || !sc)
		return count(LS_R_shut, skb, TCX_DROP);
	mode = mode_of(conf);
	if (mode == LS_MODE_SOLO)
		return count(LS_R_passed, skb, TCX_NEXT);
	if (mode != LS_MODE_HOLD)
		return count(LS_R_shut, skb, TCX_DROP);

	/* Neither guest hears what user space could not be told. */
	if (mirror_tell(skb, &sc->p))
		return count(LS_R_no_ring, skb, TCX_DROP);
	/* A clone that was lost heals by the remote's retransmission. */
	if (bpf_clone_redirect(skb, ls_peer, 0))
		return count(LS_R_mirror_failed, skb, TCX_NEXT);
	return count(LS_R_mirrored, skb, TCX_NEXT);
}
