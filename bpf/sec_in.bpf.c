//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

SEC("tcx/ingress")
int ls_sec_in(struct __sk_buff *skb)
{
	return count(LS_R_shut, skb, TCX_DROP);
}
