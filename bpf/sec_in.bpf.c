//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sec_in.bpf.c: ingress of the peer device on S: mirrored frames, and P's records. */

/*
 * Makes the record of the SYN in h, in PVM numbering: the answer to an announcement.
 * A repeated announcement thus makes up for a lost one and for a lost record.
 */
static __always_inline void sec_syn_record(struct ls_scratch *sc, const struct ls_conf *conf,
					   const struct ls_half *h)
{
	struct ls_delta d = {};
	struct ls_rec *r = &sc->rec;
	struct ls_tuple t = r->t;
	struct ls_offset o;

	half_offset(h, &o);
	rec_begin(r, conf, LS_REC_DATA, LS_DIR_S2P);
	r->t = t;
	r->inc = o.inc;
	r->seq = o.inc;
	r->end = o.inc + 1;
	r->ack = h->tcp_flags & LS_ACK ? h->cli_svm + 1 : 0;
	r->win = h->win;
	r->tcp_flags = h->tcp_flags;
	r->optlen = h->optlen;
	d.tsval = -o.ts_off;
	__builtin_memcpy(sc->tcp + LS_TCP_MIN, h->opts, LS_OPTS_MAX);
	opts_walk(sc, h->optlen, &d);
	__builtin_memcpy(r->opts, sc->tcp + LS_TCP_MIN, LS_OPTS_MAX);
}

static __always_inline int sec_announce(struct __sk_buff *skb, struct ls_scratch *sc,
					const struct ls_conf *conf, const struct ls_keys *keys,
					__u32 off)
{
	struct ls_conn *conn = bpf_map_lookup_elem(&ls_conn, &sc->rec.t);
	struct ls_half *h;
	int verdict;

	if (ls_mutate & LS_MUTATE_R9)
		return count(LS_R_record_in, skb, TCX_DROP);
	if (conn && conn->inc == sc->rec.seq)
		return count(LS_R_record_in, skb, TCX_DROP);
	h = half_get(&sc->rec.t);
	if (!h)
		return count(LS_R_conn_full, skb, TCX_DROP);
	half_pvm(sc, h, bpf_ktime_get_boot_ns());
	/* The SVM's SYN is void once it is the PVM's copy; the epoch may be the copy's already. */
	if (!half_pair(h) || conf->mode == LS_MODE_PARK)
		return count(LS_R_record_in, skb, TCX_DROP);
	sec_syn_record(sc, conf, h);
	verdict = rec_send(skb, sc, conf, keys, off);
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_record_out, skb, verdict);
}

struct ls_resend {
	struct __sk_buff *skb;
	struct ls_scratch *sc;
	const struct ls_conf *conf;
	const struct ls_keys *keys;
	__u64 no; /* next number; with LS_STREAM_ALL: next stream */
	__u64 last;
	__u32 stream;
	__u32 off;
};

/* Retransmits a stream's record, without the boundaries. */
static long resend_step(__u32 i, struct ls_resend *q)
{
	int all = q->stream == LS_STREAM_ALL;
	__u32 key, stream = all ? i : q->stream;
	struct ls_rec *r = &q->sc->rec;
	struct ls_tx_stream *newest;
	__u64 no = q->no + i;
	struct ls_sent *sent;

	newest = bpf_map_lookup_elem(&ls_lane, &stream);
	if (!newest) /* no such CPU */
		return 1;
	if (all) {
		no = *(volatile __u64 *)&newest->no;
		if (!no)
			return 0;
	} else if (no > q->last) {
		return 1;
	}
	key = sent_key(stream, no);
	sent = bpf_map_lookup_elem(&ls_sent, &key);
	if (!sent)
		return 1;
	/* Its CPU may overwrite it meanwhile: then the number has changed. */
	if (__sync_fetch_and_add(&sent->no, 0) != no)
		return count(LS_R_resend_gone, q->skb, 0);
	__builtin_memcpy(r, sent->rec, LS_REC_BASE);
	if (__sync_fetch_and_add(&sent->no, 0) != no || r->key_gen != q->conf->key_gen)
		return count(LS_R_resend_gone, q->skb, 0);
	r->nsum = 0;
	r->stride = 0;
	r->flags |= LS_REC_RETX;
	rec_sign(r, q->keys);
	if (rec_put(q->skb, q->sc, q->conf, q->off) || bpf_clone_redirect(q->skb, ls_peer, 0))
		return count(LS_R_rewrite_failed, q->skb, 1);
	return count(LS_R_resent, q->skb, 0);
}

static __always_inline int sec_resend(struct __sk_buff *skb, struct ls_scratch *sc,
				      const struct ls_conf *conf, const struct ls_keys *keys,
				      __u32 off)
{
	struct ls_resend q = {
		.skb = skb,
		.sc = sc,
		.conf = conf,
		.keys = keys,
		.stream = sc->rec.stride,
		.no = sc->rec.sum[0],
		.last = sc->rec.sum[1],
		.off = off,
	};

	count(LS_R_nack_in, skb, 0);
	bpf_loop(q.stream == LS_STREAM_ALL ? LS_STREAM_MAX : LS_RESEND_MAX, resend_step, &q, 0);
	return TCX_DROP;
}

/* R20: returns P's echo, which proves that S was not taking over when P sent it. */
static __always_inline int sec_echo(struct __sk_buff *skb, struct ls_scratch *sc,
				    struct ls_conf *conf, const struct ls_keys *keys, __u32 off)
{
	__u64 asked = sc->rec.sum[0];
	int verdict;

	/* Noted before it leaves: a takeover waits from this time on (R21 iii). */
	*(volatile __u64 *)&conf->echoed = bpf_ktime_get_boot_ns();
	rec_begin(&sc->rec, conf, LS_REC_ECHO, LS_DIR_S2P);
	sc->rec.sum[0] = asked;
	verdict = rec_send(skb, sc, conf, keys, off);
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_echo_out, skb, verdict);
}

static __always_inline int sec_peer_frame(struct __sk_buff *skb, struct ls_scratch *sc,
					  struct ls_conf *conf, const struct ls_keys *keys)
{
	enum ls_reason why;
	__u32 off = 0;
	__u64 gap;

	why = rec_check(skb, sc, conf, LS_DIR_P2S, &off);
	if (why != LS_R_record_in)
		return count(why, skb, TCX_DROP);
	why = replay_check(&sc->rec, &gap);
	if (why != LS_R_record_in)
		return count(why, skb, TCX_DROP);
	switch (sc->rec.type) {
	case LS_REC_ANNOUNCE:
		return sec_announce(skb, sc, conf, keys, off);
	case LS_REC_NACK:
		return sec_resend(skb, sc, conf, keys, off);
	case LS_REC_ECHO:
		return sec_echo(skb, sc, conf, keys, off);
	}
	if (rec_report(sc, BPF_RB_FORCE_WAKEUP, 0))
		why = LS_R_no_ring;
	return count(why, skb, TCX_DROP);
}

static __always_inline int sec_park(struct __sk_buff *skb, struct ls_scratch *sc)
{
	enum ls_reason why;
	struct ls_ev *ev;

	parse_in(skb); /* what does not parse is parked too: the guest decides */
	if (sc->p.flags & LS_SYN && ring_crowded())
		return count(LS_R_crowded, skb, TCX_DROP);
	ev = ev_new(skb, &sc->p, LS_EV_PARK);
	if (!ev)
		return count(LS_R_no_ring, skb, TCX_DROP);
	why = slot_keep(skb);
	ev->slot = sc->slot;
	if (why == LS_R_held) {
		why = LS_R_parked;
		bpf_ringbuf_submit(ev, BPF_RB_FORCE_WAKEUP);
	} else {
		bpf_ringbuf_discard(ev, BPF_RB_FORCE_WAKEUP);
	}
	return count(why, skb, TCX_DROP);
}

/* Notes the remote's ack on a connection that came with a checkpoint. */
static __always_inline void sec_note_ack(const struct ls_pkt *p)
{
	struct ls_inh *i;

	if (!(p->flags & LS_ACK))
		return;
	i = bpf_map_lookup_elem(&ls_inherited, &p->t);
	if (i && (!i->cli_ack || seq_after(p->ack, i->cli_ack)))
		i->cli_ack = p->ack;
}

/* Translates a segment of the remote. Returns LS_R_delivered, or why it is dropped. */
static __always_inline enum ls_reason sec_translate_in(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct ls_pkt *p = &sc->p;
	struct ls_delta d = {};
	struct ls_offset o;
	struct ls_conn *conn;
	struct ls_half *h;
	__u32 echo;

	conn = bpf_map_lookup_elem(&ls_conn, &p->t);
	if (!conn) {
		h = bpf_map_lookup_elem(&ls_half, &p->t);
		if (!h || !half_paired(h)) {
			sec_note_ack(p);
			return LS_R_delivered;
		}
		half_offset(h, &o);
		echo = half_echo(sc, h, &o);
		if (half_is_acked(h, p, &o)) {
			conn = half_promote(h, p, &o);
			if (!conn)
				return LS_R_conn_full;
		}
	} else {
		conn_offset(conn, &o);
		echo = o.ts_off;
	}
	if (conn)
		conn_touch(conn, p, 0, 0, bpf_ktime_get_boot_ns());
	d.ack = o.off;
	d.tsecr = echo;
	return translate(skb, sc, &d) ? LS_R_rewrite_failed : LS_R_delivered;
}

/* Translates the PVM's segment that an ICMP error quotes. */
static __always_inline int sec_quote_in(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct ls_delta d = {};
	struct ls_offset o;

	if (!quote_find(skb, sc, 0) || !quote_offset(sc, &o))
		return 0;
	d.seq = o.off;
	d.tsval = o.ts_off;
	return quote_move(skb, sc, &d);
}

/*
 * Makes a mirrored frame one for the SVM: its numbers are the SVM's as they are now. Returns
 * LS_R_delivered, or why it is dropped. Not inlined: it has two callers.
 */
static __noinline enum ls_reason sec_deliver(struct __sk_buff *skb, struct ls_scratch *sc)
{
	switch (parse_in(skb)) {
	case LS_TCP:
		return sec_translate_in(skb, sc);
	case LS_DGRAM:
		return sec_quote_in(skb, sc) ? LS_R_rewrite_failed : LS_R_delivered;
	default:
		return LS_R_delivered;
	}
}

/* Is the frame from P's own network stack, and so not a mirrored one? */
static __always_inline int sec_is_host(struct __sk_buff *skb, const struct ls_conf *conf)
{
	__u8 src[ETH_ALEN];

	return bpf_skb_load_bytes(skb, ETH_ALEN, src, sizeof(src)) ||
	       !__builtin_memcmp(src, conf->peer_mac, sizeof(src));
}

SEC("tcx/ingress")
int ls_sec_in(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_keys *keys;
	enum ls_reason why;
	__u32 mode;

	if (!conf || !sc)
		return count(LS_R_shut, skb, TCX_DROP);
	mode = mode_of(conf);
	if (mode != LS_MODE_RUN && mode != LS_MODE_PARK)
		return count(LS_R_shut, skb, TCX_DROP);
	if (is_peer_frame(skb)) {
		keys = keys_in_use(conf);
		if (!keys)
			return count(LS_R_shut, skb, TCX_DROP);
		return sec_peer_frame(skb, sc, conf, keys);
	}
	if (sec_is_host(skb, conf))
		return count(LS_R_peer_junk, skb, TCX_DROP);
	if (mode == LS_MODE_PARK)
		return sec_park(skb, sc);
	why = sec_deliver(skb, sc);
	if (why != LS_R_delivered)
		return count(why, skb, TCX_DROP);
	skb->mark = ls_mark_in;
	return count(LS_R_delivered, skb, bpf_redirect(ls_tap, 0));
}
