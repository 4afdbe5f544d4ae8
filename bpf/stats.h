/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* stats.h: every return from a program goes through count(). */
#ifndef LS_STATS_H
#define LS_STATS_H

#include "maps.h"

static __always_inline int count_bytes(enum ls_reason reason, __u64 bytes, int verdict)
{
	__u32 key = reason;
	struct ls_count *c = bpf_map_lookup_elem(&ls_stats, &key);

	if (c) {
		c->packets++;
		c->bytes += bytes;
	}
	return verdict;
}

/* Counts one frame as several. */
static __always_inline int count_as(enum ls_reason reason, struct __sk_buff *skb, __u32 frames,
				    int verdict)
{
	__u32 key = reason;
	struct ls_count *c = bpf_map_lookup_elem(&ls_stats, &key);

	if (c)
		c->packets += frames - 1;
	return count_bytes(reason, skb->len, verdict);
}

/* Counts one frame, with the bytes it has now, and returns the verdict. */
static __always_inline int count(enum ls_reason reason, struct __sk_buff *skb, int verdict)
{
	return count_bytes(reason, skb->len, verdict);
}

#endif
