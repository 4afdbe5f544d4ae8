//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* digest_rx.bpf.c: ingress of the peer device on P: what S says of its guest. */

SEC("tcx/ingress")
int ls_digest_rx(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_keys *keys;
	enum ls_reason why;
	__u32 off;

	if (!conf || !sc || mode_of(conf) != LS_MODE_HOLD)
		return count(LS_R_shut, skb, TCX_DROP);
	if (!is_peer_frame(skb))
		return count(LS_R_peer_junk, skb, TCX_DROP);
	keys = keys_in_use(conf);
	if (!keys)
		return count(LS_R_shut, skb, TCX_DROP);
	why = rec_check(skb, sc, conf, keys, LS_DIR_S2P, &off);
	if (why == LS_R_record_in && rec_tell(sc, 0))
		why = LS_R_no_ring;
	return count(why, skb, TCX_DROP);
}
