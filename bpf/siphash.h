/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * siphash.h: SipHash-2-4, 64 bits (Aumasson and Bernstein, 2012), over the bytes
 * of a record behind its tag. Their number is a multiple of 8.
 */
#ifndef LS_SIPHASH_H
#define LS_SIPHASH_H

#include "abi.h"

#define LS_SIP_WORDS ((sizeof(struct ls_rec) - 8) / 8)

struct ls_sip {
	__u64 a, b, c, d;
};

static __always_inline __u64 rotl64(__u64 x, int n)
{
	return x << n | x >> (64 - n);
}

static __always_inline void sip_round(struct ls_sip *s)
{
	s->a += s->b;
	s->b = rotl64(s->b, 13) ^ s->a;
	s->a = rotl64(s->a, 32);
	s->c += s->d;
	s->d = rotl64(s->d, 16) ^ s->c;
	s->a += s->d;
	s->d = rotl64(s->d, 21) ^ s->a;
	s->c += s->b;
	s->b = rotl64(s->b, 17) ^ s->c;
	s->c = rotl64(s->c, 32);
}

static __always_inline void sip_word(struct ls_sip *s, __u64 m)
{
	s->d ^= m;
	sip_round(s);
	sip_round(s);
	s->a ^= m;
}

/*
 * Tag of a record of len bytes, LS_REC_BASE <= len <= sizeof(*rec). A global function: the
 * verifier walks it once in a program.
 */
__noinline __u64 siphash(const struct ls_rec *rec, __u32 len, __u64 key0, __u64 key1)
{
	const __u64 *w = (const __u64 *)rec + 1;
	__u32 words = (len - 8) / 8;
	struct ls_sip s = {
		.a = key0 ^ 0x736f6d6570736575ull,
		.b = key1 ^ 0x646f72616e646f6dull,
		.c = key0 ^ 0x6c7967656e657261ull,
		.d = key1 ^ 0x7465646279746573ull,
	};

	if (!rec)
		return 0;
#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < LS_SIP_WORDS; i++) {
		if (i >= words)
			break;
		sip_word(&s, w[i]);
	}
	sip_word(&s, (__u64)(len - 8) << 56);
	s.c ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.a ^ s.b ^ s.c ^ s.d;
}

#endif
