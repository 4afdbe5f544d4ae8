//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sec_gate.bpf.c: egress of the SVM's tap: only mirrored frames come in. */

SEC("tcx/egress")
int ls_sec_gate(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_conn *conn;

	if (skb->mark == ls_mark_rel)
		return count(LS_R_released, skb, bpf_redirect(ls_tap, BPF_F_INGRESS));
	if (!conf || !sc)
		return count(LS_R_gated, skb, TCX_DROP);
	if (skb->mark == ls_mark_in) {
		skb->mark = 0;
		return count(LS_R_let_in, skb, TCX_NEXT);
	}
	if (mode_of(conf) != LS_MODE_SOLO)
		return count(LS_R_gated, skb, TCX_DROP);

	if (parse(skb, &sc->p, 0) == LS_TCP) {
		conn = bpf_map_lookup_elem(&ls_conn, &sc->p.t);
		if (conn && enter(skb, sc, conn, edge_of(conf, sc)))
			return count(LS_R_rewrite_failed, skb, TCX_DROP);
	}
	return count(LS_R_passed, skb, TCX_NEXT);
}
