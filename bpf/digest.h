/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * digest.h: the additive, keyed digest of a stream.
 *
 *   D_lane(range) = sum over 4096-byte blocks b of m_lane(b) * sum of w[i] * k_lane[i mod 1024]
 *
 * modulo 2^64, where w are the little-endian 32-bit words of the stream at
 * positions that are multiples of 4, bytes outside the range read as 0, and
 * m_lane(b) = mix(b ^ mix_lane) | 1 with b = position / 4096 (20 bits).
 *
 * The verifier dictates the shape: bpf_loop over pieces that end at a block or at a
 * boundary, each copied to scratch at its alignment with zeros around it, 16 words a
 * turn. Plain nested loops exceed a million instructions (6.18), and so does a loop
 * with its state on the stack, where each turn is a new state: it is kept in the
 * scratch map.
 */
#ifndef LS_DIGEST_H
#define LS_DIGEST_H

#include "maps.h"
#include "parse.h"

#define LS_STEP 64 /* bytes of stream a turn of the inner loop takes */

/* Pieces of a 64 KiB frame: one per block touched and one per boundary. */
#define LS_PIECES (65536 / LS_BLOCK + 2 + LS_BOUND_MAX)

struct ls_run {
	struct __sk_buff *skb;
	struct ls_scratch *sc;
	const struct ls_keys *keys;
};

static __always_inline __u64 digest_mix(__u64 x)
{
	x ^= x >> 31;
	x *= 0x9E3779B97F4A7C15ull;
	x ^= x >> 29;
	x *= 0xBF58476D1CE4E5B9ull;
	x ^= x >> 32;
	return x;
}

/*
 * Multiplies the words of piece->b, up to byte end, by the keys from first on
 * into piece->sum. A global function, so that the verifier checks it once and not in
 * every state of the loop over pieces.
 */
__noinline int digest_words(struct ls_piece *piece, const struct ls_keys *keys, __u32 first,
			    __u32 end)
{
	__u64 a = 0, b = 0;

	if (!piece || !keys)
		return -1;
#pragma clang loop unroll(disable)
	for (__u32 at = 0; at < LS_BLOCK + LS_STEP; at += LS_STEP) {
		const __u32 *w = (const __u32 *)(piece->b + at);
		__u32 key = first + at / 4;
		const __u64 *k0, *k1;

		if (at >= end)
			break;
		barrier_var(key);
		if (key > LS_KEYS_PER_LANE)
			break;
		k0 = keys->k[0] + key;
		k1 = keys->k[1] + key;
#pragma clang loop unroll(full)
		for (int i = 0; i < LS_STEP / 4; i++) {
			a += w[i] * k0[i];
			barrier_var(a);
			b += w[i] * k1[i];
			barrier_var(b);
		}
	}
	piece->sum[0] = a;
	piece->sum[1] = b;
	return 0;
}

/* Adds the digest of the next n bytes, which lie within one block. */
static __always_inline int digest_piece(struct ls_run *r, __u32 n)
{
	struct ls_piece *piece = &r->sc->piece;
	struct ls_digest *d = &r->sc->digest;
	__u64 block = d->pos / LS_BLOCK;
	__u32 lead = d->pos & 3;
	__u32 end;

	if (n < 1 || n > LS_BLOCK)
		return -1;
	*(__u32 *)piece->b = 0;
	if (bpf_skb_load_bytes(r->skb, d->off, piece->b + lead, n))
		return -1;
	end = lead + n;
	barrier_var(end);
	if (end > LS_BLOCK + 3)
		return -1;
	__builtin_memset(piece->b + end, 0, LS_STEP);
	if (digest_words(piece, r->keys, (d->pos & (LS_BLOCK - 1)) >> 2, end))
		return -1;
	d->sum[0] += piece->sum[0] * (digest_mix(block ^ r->keys->mix[0]) | 1);
	d->sum[1] += piece->sum[1] * (digest_mix(block ^ r->keys->mix[1]) | 1);
	d->off += n;
	d->pos += n;
	d->left -= n;
	return 0;
}

static long digest_step(__u32 i, struct ls_run *r)
{
	struct ls_digest *d = &r->sc->digest;
	__u32 n = LS_BLOCK - (d->pos & (LS_BLOCK - 1));
	__u32 at = d->nsum;

	if (!d->left)
		return 1;
	if (n > d->left)
		n = d->left;
	if (d->stride && n > d->next)
		n = d->next;
	barrier_var(n);
	if (digest_piece(r, n))
		return 1;
	if (!d->stride)
		return 0;
	d->next -= n;
	if (d->next || !d->left) /* at the payload's end the whole sum serves as boundary */
		return 0;
	if (at >= LS_BOUND_MAX)
		return 1;
	r->sc->rec.bound[at][0] = d->sum[0];
	r->sc->rec.bound[at][1] = d->sum[1];
	d->nsum = at + 1;
	d->next = d->stride;
	return 0;
}

/*
 * Bytes between boundaries for a GSO frame: the smallest multiple of the segment
 * size that gives at most LS_BOUND_MAX boundaries inside the payload. Each costs time on
 * both hosts; where one is missing P itself digests up to half a stride. The small
 * frames at a connection's start have a boundary at every segment.
 */
static __always_inline __u32 digest_stride(__u32 gso_size, __u32 paylen)
{
	__u32 segs;

	if (!gso_size || paylen <= gso_size)
		return 0;
	segs = (paylen - 1) / gso_size; /* boundaries with a multiple of 1 */
	return gso_size * (segs / (LS_BOUND_MAX + 1) + 1);
}

/*
 * Digests sc->p's payload into sc->digest.sum and, with a stride, the sums at the
 * boundaries into sc->rec.bound. Returns the number of boundaries or -1.
 */
static __always_inline int digest(struct __sk_buff *skb, struct ls_scratch *sc,
				  const struct ls_keys *keys, __u32 stride)
{
	struct ls_run r = {.skb = skb, .sc = sc, .keys = keys};
	struct ls_digest *d = &sc->digest;

	d->off = sc->p.pay_off;
	d->pos = pay_pos(&sc->p);
	d->left = sc->p.paylen;
	d->stride = d->next = stride;
	d->nsum = 0;
	d->sum[0] = d->sum[1] = 0;
	if (d->left)
		bpf_loop(LS_PIECES, digest_step, &r, 0);
	return d->left ? -1 : (int)d->nsum;
}

#endif
