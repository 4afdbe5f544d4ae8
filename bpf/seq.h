/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* seq.h: arithmetic on TCP sequence numbers, which wrap. */
#ifndef LS_SEQ_H
#define LS_SEQ_H

#include <linux/types.h>

static __always_inline int seq_after(__u32 a, __u32 b)
{
	return (__s32)(a - b) > 0;
}

#endif
