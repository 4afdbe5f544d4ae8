//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sec_out.bpf.c: ingress of the SVM's tap: turns the SVM's output into records. */

/* Where a solicitation's record is put: after its checksum, with room for extension headers. */
#define LS_NEIGH_OFF 128

/* Where a segment's numbers come from. */
enum ls_known {
	LS_KNOWN,     /* the offset is known */
	LS_INHERITED, /* older than the last checkpoint: no translation */
	LS_UNPAIRED,  /* active SYN; the PVM's is not known */
	LS_PENDING,   /* waits for an announcement */
};

/* Notes that the SVM has sent on a connection that came with a checkpoint. */
static __always_inline void sec_inherited(const struct ls_pkt *p, __u32 *cli_ack)
{
	struct ls_inh *i = bpf_map_lookup_elem(&ls_inherited, &p->t);
	struct ls_inh none = {};

	if (i && i->cli_ack)
		*cli_ack = i->cli_ack;
	if (!i && !(p->flags & LS_RST))
		bpf_map_update_elem(&ls_inherited, &p->t, &none, BPF_NOEXIST);
}

/*
 * Finds the segment's offset, and stores SYNs. A RST|ACK with sequence number 0 refuses
 * a SYN: it belongs to no incarnation, whatever the tables hold.
 */
static __always_inline enum ls_known sec_lookup(struct ls_scratch *sc, struct ls_offset *o,
						__u32 *cli_ack)
{
	struct ls_pkt *p = &sc->p;
	__u64 now = bpf_ktime_get_boot_ns();
	struct ls_conn *conn;
	struct ls_half *h;

	/* No ack known: one so old that it acknowledges nothing that is kept. */
	*cli_ack = p->seq - LS_ACK_SPAN;
	__builtin_memset(o, 0, sizeof(*o));
	if ((p->flags & (LS_RST | LS_ACK)) == (LS_RST | LS_ACK) && !p->seq)
		return LS_INHERITED;

	conn = bpf_map_lookup_elem(&ls_conn, &p->t);
	if (conn && p->flags & LS_SYN && conn->isn_svm != p->seq) {
		h = half_get(&p->t);
		if (!h)
			return LS_PENDING;
		/* R8: the tuple is reused; its last pair must not be made again. */
		h->used_pvm = conn->inc;
		h->used_svm = conn->isn_svm;
		bpf_map_delete_elem(&ls_conn, &p->t);
		conn = NULL;
	}
	if (conn) {
		conn_offset(conn, o);
		conn_touch(conn, p, 1, 0, now);
		*cli_ack = conn->cli_ack;
		return LS_KNOWN;
	}

	if (p->flags & LS_SYN) {
		bpf_map_delete_elem(&ls_inherited, &p->t);
		h = half_get(&p->t);
		if (!h)
			return LS_PENDING;
		half_svm(sc, h, now);
		if (!half_pair(h))
			return p->flags & LS_ACK ? LS_PENDING : LS_UNPAIRED;
	} else {
		h = bpf_map_lookup_elem(&ls_half, &p->t);
		/*
		 * Without a SYN of the SVM's since the last checkpoint the connection came
		 * with that, announced or not: P cannot know whether its handshake was over.
		 */
		if (!h || !(h->state & LS_CONN_SVM)) {
			sec_inherited(p, cli_ack);
			return LS_INHERITED;
		}
		if (!half_paired(h))
			return LS_PENDING;
		h->last = now;
	}
	half_offset(h, o);
	*cli_ack = o->inc;
	return LS_KNOWN;
}

/* Keeps a copy for R5 and R22. Returns LS_R_record_out, or LS_R_copy_lost. */
static __always_inline enum ls_reason sec_copy(struct __sk_buff *skb, struct ls_scratch *sc,
					       __u32 inc, __u32 cli_ack, int inherited)
{
	struct ls_ev *ev = ev_new(skb, &sc->p, LS_EV_COPY);

	if (!ev)
		return LS_R_copy_lost;
	ev->inc = inc;
	ev->cli_ack = cli_ack;
	ev->sum[0] = sc->digest.sum[0];
	ev->sum[1] = sc->digest.sum[1];
	if (inherited)
		ev->flags |= LS_EV_INHERITED;
	if (slot_keep(skb) != LS_R_held) {
		bpf_ringbuf_discard(ev, BPF_RB_FORCE_WAKEUP);
		return LS_R_copy_lost;
	}
	ev->slot = sc->slot;
	bpf_ringbuf_submit(ev, copy_wakeup(sc, ev->slot));
	return LS_R_record_out;
}

static __always_inline int sec_tcp(struct __sk_buff *skb, struct ls_scratch *sc,
				   const struct ls_conf *conf, const struct ls_keys *keys,
				   int quiet)
{
	enum ls_reason why = LS_R_record_out;
	struct ls_rec *r = &sc->rec;
	struct ls_pkt *p = &sc->p;
	struct ls_delta d = {};
	struct ls_offset o;
	enum ls_known known;
	int nsum, verdict;
	__u32 cli_ack, stride;

	if (strip_mptcp(skb, sc))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	known = sec_lookup(sc, &o, &cli_ack);
	if (known == LS_PENDING)
		return count(LS_R_pending, skb, TCX_DROP);
	d.seq = -o.off;
	d.tsval = -o.ts_off;
	if (translate(skb, sc, &d))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);

	rec_begin(r, conf, LS_REC_DATA, LS_DIR_S2P);
	rec_segment(sc);
	r->inc = o.inc;
	if (known != LS_KNOWN)
		r->flags = LS_REC_INHERITED;
	stride = digest_stride(skb->gso_size, p->paylen);
	nsum = digest(skb, sc, keys, stride);
	if (nsum < 0)
		return count(LS_R_malformed, skb, TCX_DROP);
	r->sum[0] = sc->digest.sum[0];
	r->sum[1] = sc->digest.sum[1];
	r->nsum = nsum;
	r->stride = nsum ? stride : 0;

	if (p->paylen)
		why = sec_copy(skb, sc, o.inc, cli_ack, known != LS_KNOWN);
	if (known == LS_UNPAIRED)
		why = LS_R_pending;
	if (quiet)
		return count(LS_R_shut, skb, TCX_DROP);
	verdict = rec_send(skb, sc, conf, keys, rec_off(p));
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(why, skb, verdict);
}

/* Translates the SVM's ICMP error so that it quotes the same numbers as the PVM's. */
static __always_inline int sec_quote_out(struct __sk_buff *skb, struct ls_scratch *sc)
{
	struct ls_delta d = {};
	struct ls_offset o;

	if (!quote_find(skb, sc, 1) || !quote_offset(sc, &o))
		return 0;
	d.ack = -o.off;
	d.tsecr = -o.ts_off;
	return quote_move(skb, sc, &d);
}

static __always_inline int sec_dgram(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_conf *conf, const struct ls_keys *keys)
{
	struct ls_pkt *p = &sc->p;
	struct ls_rec *r = &sc->rec;
	int verdict;

	if (sec_quote_out(skb, sc))
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	rec_begin(r, conf, LS_REC_DGRAM, LS_DIR_S2P);
	r->t = p->t;
	r->seq = p->seq;
	r->end = p->seq + p->paylen;
	r->frag = p->frag;
	if (digest_dgram(skb, sc, keys) < 0)
		return count(LS_R_malformed, skb, TCX_DROP);
	r->sum[0] = sc->digest.sum[0];
	r->sum[1] = sc->digest.sum[1];
	verdict = rec_send(skb, sc, conf, keys, rec_off(p));
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_record_out, skb, verdict);
}

/* Has P send the request in the guest's name, so that both guests receive the answer. */
static __always_inline int sec_neigh(struct __sk_buff *skb, struct ls_scratch *sc,
				     const struct ls_conf *conf, const struct ls_keys *keys)
{
	struct ls_pkt *p = &sc->p;
	struct ls_rec *r = &sc->rec;
	int verdict;

	rec_begin(r, conf, LS_REC_NEIGH, LS_DIR_S2P);
	r->t = p->t;
	r->optlen = ETH_ALEN;
	__builtin_memcpy(r->opts, p->mac, ETH_ALEN);
	verdict = rec_send(skb, sc, conf, keys, LS_NEIGH_OFF);
	if (!verdict)
		return count(LS_R_rewrite_failed, skb, TCX_DROP);
	return count(LS_R_neigh_out, skb, verdict);
}

/* Translates the ICMP error of an SVM that took over. */
static __always_inline int sec_quote_solo(struct __sk_buff *skb, struct ls_scratch *sc,
					  const struct ls_conf *conf)
{
	struct ls_conn *conn;

	if (!quote_find(skb, sc, 1))
		return 0;
	conn = bpf_map_lookup_elem(&ls_conn, &sc->q.t);
	return conn ? quote_leave(skb, sc, conn, edge_of(conf, &sc->q.t)) : 0;
}

/*
 * The output of an SVM that took over: connections from before the takeover keep the
 * numbers that the remote knows.
 */
static __always_inline int sec_solo(struct __sk_buff *skb, struct ls_scratch *sc,
				    const struct ls_conf *conf)
{
	int retx = skb->mark == ls_mark_rel, bad = 0;
	struct ls_conn *conn = NULL;

	if (!lease_valid(conf))
		return count(LS_R_muted, skb, TCX_DROP);
	if (retx)
		skb->mark = 0;
	switch (parse_out(skb)) {
	case LS_TCP:
		conn = bpf_map_lookup_elem(&ls_conn, &sc->p.t);
		break;
	case LS_DGRAM:
		if (sec_quote_solo(skb, sc, conf))
			return count(LS_R_rewrite_failed, skb, TCX_DROP);
		break;
	default:
		break;
	}
	if (conn && sc->p.flags & LS_SYN && conn->isn_svm != sc->p.seq) {
		bpf_map_delete_elem(&ls_conn, &sc->p.t); /* another connection */
		bpf_map_delete_elem(&ls_edge, &sc->p.t);
		conn = NULL;
	}
	if (conn)
		bad = leave(skb, sc, conn, edge_of(conf, &sc->p.t), retx);
	if (bad)
		return count(bad > 0 ? LS_R_in_doubt : LS_R_rewrite_failed, skb, TCX_DROP);
	return count(retx ? LS_R_released_out : LS_R_passed, skb, TCX_NEXT);
}

SEC("tcx/ingress")
int ls_sec_out(struct __sk_buff *skb)
{
	struct ls_scratch *sc = scratch();
	struct ls_conf *conf = config();
	struct ls_keys *keys;
	__u32 mode;
	int what;

	if (!conf || !sc)
		return count(LS_R_shut, skb, TCX_DROP);
	mode = mode_of(conf);
	if (mode == LS_MODE_SOLO)
		return sec_solo(skb, sc, conf);
	/* It may have been released before the gate was shut. */
	if (skb->mark == ls_mark_rel)
		return count(LS_R_shut, skb, TCX_DROP);
	keys = keys_in_use(conf);
	if ((mode != LS_MODE_RUN && mode != LS_MODE_QUIET) || !keys)
		return count(LS_R_shut, skb, TCX_DROP);

	what = parse_out(skb);
	if (mode == LS_MODE_QUIET && what != LS_TCP)
		return count(LS_R_shut, skb, TCX_DROP);
	switch (what) {
	case LS_TCP:
		return sec_tcp(skb, sc, conf, keys, mode == LS_MODE_QUIET);
	case LS_DGRAM:
		if (rule_matches(&sc->p))
			return count(LS_R_svm_only, skb, TCX_DROP);
		return sec_dgram(skb, sc, conf, keys);
	case LS_LINK:
		if (sc->p.neigh_req)
			return sec_neigh(skb, sc, conf, keys);
		return count(LS_R_svm_only, skb, TCX_DROP);
	default:
		return count(LS_R_malformed, skb, TCX_DROP);
	}
}
