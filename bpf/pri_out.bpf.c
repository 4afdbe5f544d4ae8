//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* pri_out.bpf.c: ingress of the PVM's tap: the PVM's output, and released frames. */

/* Reports an ACK without payload to user space; it takes no slot. */
static __always_inline int pri_ack(struct __sk_buff *skb, struct ls_pkt *p, __u32 number)
{
	struct ls_ev *ev = ev_new(skb, p, LS_EV_PVM);

	if (!ev)
		return count(LS_R_no_ring, skb, TCX_DROP);
	ev->number = number;
	bpf_ringbuf_submit(ev, 0);
	return count(LS_R_held_ack, skb, TCX_DROP);
}

/*
 * Digests what is held, but for TCP's GSO frames: these wait for the SVM's anyway, and user space
 * sums up what it compares of them from the slot, with SIMD.
 */
static __always_inline int pri_digest(struct __sk_buff *skb, struct ls_scratch *sc,
				      const struct ls_keys *keys)
{
	if (sc->p.dgram || !skb->gso_size)
		return digest_dgram(skb, sc, keys);
	sc->digest.sum[0] = sc->digest.sum[1] = 0;
	return 0;
}

/*
 * Holds a segment, which has its digest and slot already unless slot is LS_SLOT_NONE.
 * Returns LS_R_held, or why it is lost.
 */
static __always_inline enum ls_reason pri_hold(struct __sk_buff *skb, struct ls_scratch *sc,
					       const struct ls_keys *keys, __u32 slot, __u32 number)
{
	struct ls_ev *ev = ev_new(skb, &sc->p, LS_EV_PVM);
	enum ls_reason why = LS_R_malformed;

	if (!ev) {
		if (slot != LS_SLOT_NONE)
			slot_free(slot);
		return LS_R_no_ring;
	}
	ev->number = number;
	sc->q.len = 0;
	if (sc->p.dgram)
		quote_find(skb, sc, 1);
	if (slot != LS_SLOT_NONE) {
		ev->slot = slot;
		why = LS_R_held;
	} else if (pri_digest(skb, sc, keys) >= 0) {
		why = slot_keep(skb);
		ev->slot = sc->slot;
	}
	ev->sum[0] = sc->digest.sum[0];
	ev->sum[1] = sc->digest.sum[1];
	if (why == LS_R_held && !sc->p.dgram && fast_opened(skb))
		ev->flags |= LS_EV_OPENED;
	/* A segment without a slot is reported too: it leaves a hole before what follows it. */
	if (why == LS_R_held || (why == LS_R_no_slot && !sc->p.dgram))
		bpf_ringbuf_submit(ev, 0);
	else
		bpf_ringbuf_discard(ev, 0);
	return why;
}

/* Turns a SYN that is held into an ANNOUNCE (R9) and sends it to the peer. */
static __always_inline int pri_announce(struct __sk_buff *skb, struct ls_scratch *sc,
					const struct ls_conf *conf, const struct ls_keys *keys)
{
	int verdict;

	rec_begin(&sc->rec, conf, LS_REC_ANNOUNCE, LS_DIR_P2S);
	rec_segment(sc);
	sc->rec.inc = sc->p.seq;
	verdict = rec_send(skb, sc, conf, keys, rec_off(&sc->p));
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_announced, skb, verdict);
}

/* Lets a frame out of the host, if the output lease is valid. */
static __always_inline int pri_leave(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_conf *conf, enum ls_reason reason)
{
	int bad;

	if (!lease_valid(conf))
		return count(LS_R_muted, skb, TCX_DROP);
	bad = has_edges(conf) ? edge_out(skb, sc, conf) : 0;
	if (bad)
		return count(bad > 0 ? LS_R_in_doubt : LS_R_rewrite_failed, skb, TCX_DROP);
	return count(reason, skb, TCX_NEXT);
}

static __always_inline int pri_tcp(struct __sk_buff *skb, struct ls_scratch *sc,
				   const struct ls_conf *conf, const struct ls_keys *keys)
{
	struct ls_pkt *p = &sc->p;
	enum ls_reason why;
	int verdict;

	if (strip_mptcp(skb, sc))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	verdict = fast_pvm(skb);
	if (verdict == LS_FAST_PASS)
		return pri_leave(skb, sc, conf, LS_R_fast_passed);
	if (verdict != LS_FAST_NOT)
		return verdict;
	if (!p->paylen && !(p->flags & (LS_SYN | LS_FIN | LS_RST)))
		return pri_ack(skb, p, sc->number);
	if (pri_not_open(p) && ring_crowded())
		return count(LS_R_crowded, skb, TCX_DROP);
	why = pri_hold(skb, sc, keys, sc->slot, sc->number);
	if (why == LS_R_held && (p->flags & (LS_SYN | LS_RST)) == LS_SYN)
		return pri_announce(skb, sc, conf, keys);
	return count(why, skb, TCX_DROP);
}

static __always_inline int pri_dgram(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_conf *conf, const struct ls_keys *keys)
{
	int verdict;

	if (rule_matches(&sc->p))
		return pri_leave(skb, sc, conf, LS_R_primary_only);
	verdict = bucket_pvm(skb);
	if (verdict == LS_FAST_PASS) {
		count(LS_R_fast_dgram, skb, 0);
		return pri_leave(skb, sc, conf, LS_R_fast_passed);
	}
	if (verdict != LS_FAST_NOT)
		return verdict;
	return count(pri_hold(skb, sc, keys, sc->slot, sc->number), skb, TCX_DROP);
}

SEC("tcx/ingress")
int ls_pri_out(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_keys *keys;
	__u32 mode;

	if (!conf || !sc)
		return count(LS_R_shut, skb, TCX_DROP);
	mode = mode_of(conf);
	if (skb->mark == ls_mark_rel) {
		/* It may have been released before the gate was shut. */
		if (mode != LS_MODE_HOLD && mode != LS_MODE_SOLO && !(ls_mutate & LS_MUTATE_MODE))
			return count(LS_R_shut, skb, TCX_DROP);
		skb->mark = 0;
		return pri_leave(skb, sc, conf, LS_R_released_out);
	}
	if (mode == LS_MODE_SOLO)
		return pri_leave(skb, sc, conf, LS_R_passed);
	keys = keys_in_use(conf);
	if (mode != LS_MODE_HOLD || !keys)
		return count(LS_R_shut, skb, TCX_DROP);

	switch (parse_out(skb)) {
	case LS_TCP:
		return pri_tcp(skb, sc, conf, keys);
	case LS_DGRAM:
		return pri_dgram(skb, sc, conf, keys);
	case LS_LINK:
		if (!lease_valid(conf))
			return count(LS_R_muted, skb, TCX_DROP);
		return count(LS_R_passed, skb, TCX_NEXT);
	default:
		return count(LS_R_malformed, skb, TCX_DROP);
	}
}
