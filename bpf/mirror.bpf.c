//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

SEC("tcx/egress")
int ls_mirror(struct __sk_buff *skb)
{
	return count(LS_R_shut, skb, TCX_DROP);
}
