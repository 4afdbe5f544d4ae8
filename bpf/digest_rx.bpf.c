//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* digest_rx.bpf.c: ingress of the peer device on P: records of the SVM's output. */

/* R20: an echo proves that S had not begun to take over when P sent it. */
static __always_inline void lease_renew(struct ls_conf *conf, __u64 asked)
{
	__u64 until = asked + conf->lease_duration, old = conf->lease_until;

	/* One attempt: another CPU's echo is as good, and else only user space writes it. */
	if (until > old)
		__sync_val_compare_and_swap(&conf->lease_until, old, until);
}

/* Turns the frame into a NACK of its stream's records from first on (R6). */
static __always_inline int nack(struct __sk_buff *skb, struct ls_scratch *sc,
				const struct ls_conf *conf, __u64 first, __u32 off)
{
	struct ls_keys *keys = keys_in_use(conf);
	__u64 last = sc->rec.stream_no - 1;
	__u32 stream = sc->rec.stream;
	int verdict;

	if (!keys)
		return TCX_DROP;
	rec_begin(&sc->rec, conf, LS_REC_NACK, LS_DIR_P2S);
	sc->rec.stride = stream;
	sc->rec.sum[0] = first;
	sc->rec.sum[1] = last;
	verdict = rec_send(skb, sc, conf, keys, off);
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_nack_out, skb, verdict);
}

SEC("tcx/ingress")
int ls_digest_rx(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	enum ls_reason why;
	__u32 off = 0, number = 0;
	int verdict;
	__u64 gap;

	if (!conf || !sc || mode_of(conf) != LS_MODE_HOLD)
		return count(LS_R_shut, skb, TCX_DROP);
	if (!is_peer_frame(skb))
		return count(LS_R_peer_junk, skb, TCX_DROP);
	why = rec_check(skb, sc, conf, LS_DIR_S2P, &off);
	if (why != LS_R_record_in)
		return count(why, skb, TCX_DROP);
	why = replay_check(&sc->rec, &gap);
	if (why != LS_R_record_in)
		return count(why, skb, TCX_DROP);
	if (sc->rec.type == LS_REC_DATA) {
		if (gap) {
			number = fast_give_up(&sc->rec.t);
		} else {
			verdict = fast_record(skb);
			number = sc->number;
			if (verdict != LS_FAST_NOT)
				return verdict;
		}
	} else if (sc->rec.type == LS_REC_DGRAM) {
		if (gap) {
			number = bucket_give_up(&sc->rec.t, sc->rec.frag);
		} else {
			verdict = bucket_record(skb);
			number = sc->number;
			if (verdict != LS_FAST_NOT)
				return verdict;
		}
	}
	if (sc->rec.type == LS_REC_ECHO) {
		lease_renew(conf, sc->rec.sum[0]);
		*(volatile __u64 *)&conf->echoed = bpf_ktime_get_boot_ns();
		count(LS_R_echo_in, skb, 0);
	} else if (sc->rec.type == LS_REC_DATA && sc->rec.tcp_flags & LS_SYN && ring_crowded()) {
		count(LS_R_crowded, skb, 0); /* P repeats the announcement, and S this record */
	} else {
		count(rec_report(sc, 0, number) ? LS_R_no_ring : LS_R_record_in, skb, 0);
	}
	if (gap && sc->rec.stream != LS_STREAM_USER && !(ls_mutate & LS_MUTATE_R6))
		return nack(skb, sc, conf, gap, off);
	return TCX_DROP;
}
