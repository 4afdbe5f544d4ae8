//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * peer_xdp.bpf.c: XDP on P's peer device: drops early what is not authentic peer
 * traffic. ls_digest_rx repeats the check, and checks for replays. S has no such
 * program: the frames that it receives are rewritten, and XDP does not see that a
 * checksum is partial.
 */

static __always_inline int xdp_authentic(struct xdp_md *xdp, struct ls_scratch *sc,
					 const struct ls_conf *conf)
{
	struct ls_rec *r = &sc->rec;
	__be16 proto;
	struct ls_pre pre;
	__u32 len;

	if (bpf_xdp_load_bytes(xdp, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto)) ||
	    proto != bpf_htons(LS_ETHERTYPE) ||
	    bpf_xdp_load_bytes(xdp, ETH_HLEN, &pre, sizeof(pre)) || pre.magic != LS_MAGIC ||
	    pre.off < ETH_HLEN + sizeof(pre) || pre.off > LS_REC_OFF_MAX ||
	    bpf_xdp_load_bytes(xdp, pre.off, r, LS_REC_BASE) ||
	    rec_form(r, LS_DIR_S2P) != LS_R_record_in)
		return 0;
	len = r->nsum * sizeof(r->bound[0]);
	barrier_var(len);
	if (len > 0 && len <= sizeof(r->bound) &&
	    bpf_xdp_load_bytes(xdp, pre.off + LS_REC_BASE, r->bound, len))
		return 0;
	return rec_authentic(r, conf) == LS_R_record_in;
}

SEC("xdp")
int ls_peer_xdp(struct xdp_md *xdp)
{
	__u64 len = bpf_xdp_get_buff_len(xdp);
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();

	if (!conf || !sc || !xdp_authentic(xdp, sc, conf))
		return count_bytes(LS_R_xdp_dropped, len, XDP_DROP);
	return count_bytes(LS_R_xdp_passed, len, XDP_PASS);
}
