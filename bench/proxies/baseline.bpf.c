//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * baseline.bpf.c: mirroring only, what lockstep is measured against. The PVM's
 * output leaves at once, the SVM's is dropped; nothing is held, digested or
 * compared. So that the SVM works as the PVM does, the ACKs it receives are moved
 * into its numbers and not above what it has sent; when it sends what the client
 * has received from the PVM, its segment is turned into that ACK. Both hosts
 * share the map, so nothing has to be announced. What the SVM did not receive is
 * not sent to it again.
 *
 * Knows IPv4 without options and the TCP option layouts that Linux sends.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define TCX_NEXT -1
#define TCX_DROP 2
#define L4 (ETH_HLEN + 20)
#define SEQ 1 /* words of the TCP header */
#define ACKNO 2
#define FLAGS 3
#define OPTS 5
#define WORDS 10 /* as far as a time stamp may be */
#define F_FIN 0x00010000
#define F_SYN 0x00020000
#define F_ACK 0x00100000

volatile const __u32 peer_p; /* ifindex of the peer device on P */
volatile const __u32 tap_s;  /* ifindex of the SVM's tap */

struct numbers {
	__u32 isn, ts;
};

struct conn {
	struct numbers pvm, svm;
	__u32 said;		  /* end of what the SVM has said */
	__u32 cli_seq, cli_ack;	  /* newest of the client, the ACK in the SVM's numbers */
	__u32 cli_win, cli_ts[2]; /* TCP header words */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64); /* remote address, guest's port, remote port */
	__type(value, struct conn);
} conns SEC(".maps");

struct seg {
	__u64 key;
	__u32 paylen, words;
	__u32 tcp[WORDS];
};

static __always_inline int parse(struct __sk_buff *skb, struct seg *s, int out)
{
	__u8 ip[20];
	__u32 remote, ports, n, len;

	if (skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, ETH_HLEN, ip, 20) ||
	    ip[0] != 0x45 || ip[9] != IPPROTO_TCP || bpf_skb_load_bytes(skb, L4, s->tcp, 20))
		return -1;
	s->words = bpf_ntohl(s->tcp[FLAGS]) >> 28;
	if (s->words < 5)
		return -1;
	n = s->words > WORDS ? WORDS - 5 : s->words - 5;
	n *= 4;
	barrier_var(n); /* the verifier forgets the range otherwise */
	if (n >= 4 && (n > 20 || bpf_skb_load_bytes(skb, L4 + 20, s->tcp + 5, n)))
		return -1;
	__builtin_memcpy(&remote, out ? ip + 16 : ip + 12, 4);
	ports = bpf_ntohl(s->tcp[0]);
	s->key = (__u64)remote << 32 | (out ? ports : ports << 16 | ports >> 16);
	len = ip[2] << 8 | ip[3];
	if (!len)
		len = skb->len - ETH_HLEN; /* longer than an IP length can tell */
	s->paylen = len - 20 - s->words * 4;
	return 0;
}

/* Notes ISN and time stamp of a guest's SYN|ACK. */
static __always_inline struct conn *learn(struct seg *s, int svm)
{
	struct conn *c = bpf_map_lookup_elem(&conns, &s->key), fresh = {};
	struct numbers n = {.isn = bpf_ntohl(s->tcp[SEQ])};

	if (!(bpf_ntohl(s->tcp[FLAGS]) & F_SYN))
		return c;
	if (s->tcp[OPTS + 1] == bpf_htonl(0x0402080a))
		n.ts = bpf_ntohl(s->tcp[OPTS + 2]);
	if (!c) {
		bpf_map_update_elem(&conns, &s->key, &fresh, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&conns, &s->key);
		if (!c)
			return NULL;
	}
	if (svm)
		c->svm = n;
	else
		c->pvm = n;
	return c;
}

/* Egress of the PVM's tap. */
SEC("tcx/egress") int base_mirror(struct __sk_buff *skb)
{
	bpf_clone_redirect(skb, peer_p, 0);
	return TCX_NEXT;
}

/* Ingress of the PVM's tap. */
SEC("tcx/ingress") int base_pri_out(struct __sk_buff *skb)
{
	struct seg s = {};

	if (!parse(skb, &s, 1))
		learn(&s, 0);
	return TCX_NEXT;
}

/*
 * Makes of the SVM's segment the client's ACK of it. The segment's checksum is
 * partial, which counts as right on this machine, and stays so.
 */
static __always_inline int turn(struct __sk_buff *skb, const struct seg *s, const struct conn *c)
{
	__u32 tcp[8] = {}, ip[5], len, from, ack = c->cli_ack;
	__u8 mac[12], back[12];

	if ((__s32)(ack - c->said) > 0)
		ack = c->said;
	if (bpf_skb_change_tail(skb, L4 + sizeof(tcp), 0) || bpf_skb_load_bytes(skb, 0, mac, 12) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, ip, 20))
		return TCX_DROP;
	__builtin_memcpy(back, mac + 6, 6);
	__builtin_memcpy(back + 6, mac, 6);
	len = ip[0];
	ip[0] = bpf_htonl((bpf_ntohl(len) & 0xffff0000) | (20 + sizeof(tcp)));
	from = ip[3];
	ip[3] = ip[4];
	ip[4] = from;
	tcp[0] = bpf_htonl(bpf_ntohl(s->tcp[0]) << 16 | bpf_ntohl(s->tcp[0]) >> 16);
	tcp[SEQ] = bpf_htonl(c->cli_seq);
	tcp[ACKNO] = bpf_htonl(ack);
	tcp[FLAGS] = c->cli_win;
	tcp[OPTS] = bpf_htonl(0x0101080a);
	tcp[OPTS + 1] = c->cli_ts[0];
	tcp[OPTS + 2] = c->cli_ts[1];
	bpf_l3_csum_replace(skb, ETH_HLEN + 10, len, ip[0], 4);
	bpf_skb_store_bytes(skb, 0, back, 12, 0);
	bpf_skb_store_bytes(skb, ETH_HLEN, ip, 4, 0);
	bpf_skb_store_bytes(skb, ETH_HLEN + 12, ip + 3, 8, 0);
	bpf_skb_store_bytes(skb, L4, tcp, 16, 0);
	bpf_skb_store_bytes(skb, L4 + OPTS * 4, tcp + OPTS, 12, 0);
	return bpf_redirect(tap_s, 0);
}

/* Ingress of the SVM's tap. */
SEC("tcx/ingress") int base_sec_out(struct __sk_buff *skb)
{
	struct seg s = {};
	struct conn *c;
	__u32 end, flags;

	if (parse(skb, &s, 1))
		return TCX_DROP;
	c = learn(&s, 1);
	if (!c)
		return TCX_DROP;
	flags = bpf_ntohl(s.tcp[FLAGS]);
	end = bpf_ntohl(s.tcp[SEQ]) + s.paylen + !!(flags & F_SYN) + !!(flags & F_FIN);
	if (flags & F_SYN)
		c->cli_ack = c->said = end;
	if ((__s32)(end - c->said) > 0)
		c->said = end;
	if (s.paylen && (__s32)(c->cli_ack - bpf_ntohl(s.tcp[SEQ])) > 0)
		return turn(skb, &s, c);
	return TCX_DROP;
}

/* Ingress of the peer device on S. */
SEC("tcx/ingress") int base_sec_in(struct __sk_buff *skb)
{
	struct seg s = {};
	struct conn *c;
	__u32 was[2], now[2];
	__s64 diff;

	if (parse(skb, &s, 0) || !(bpf_ntohl(s.tcp[FLAGS]) & F_ACK))
		return bpf_redirect(tap_s, 0);
	c = bpf_map_lookup_elem(&conns, &s.key);
	if (!c)
		return bpf_redirect(tap_s, 0);
	was[0] = s.tcp[ACKNO];
	now[0] = bpf_ntohl(was[0]) + c->svm.isn - c->pvm.isn;
	c->cli_seq = bpf_ntohl(s.tcp[SEQ]) + s.paylen;
	c->cli_ack = now[0];
	if ((__s32)(now[0] - c->said) > 0)
		now[0] = c->said;
	now[0] = bpf_htonl(now[0]);
	was[1] = now[1] = s.tcp[OPTS + 2];
	if (s.words >= OPTS + 3 && s.tcp[OPTS] == bpf_htonl(0x0101080a)) {
		now[1] = bpf_htonl(bpf_ntohl(was[1]) + c->svm.ts - c->pvm.ts);
		bpf_skb_store_bytes(skb, L4 + (OPTS + 2) * 4, &now[1], 4, 0);
		c->cli_ts[0] = s.tcp[OPTS + 1];
		c->cli_ts[1] = now[1];
		c->cli_win = bpf_htonl(0x80100000 | (bpf_ntohl(s.tcp[FLAGS]) & 0xffff));
	}
	diff = bpf_csum_diff(was, sizeof(was), now, sizeof(now), 0);
	bpf_skb_store_bytes(skb, L4 + ACKNO * 4, &now[0], 4, 0);
	bpf_l4_csum_replace(skb, L4 + 16, 0, diff, 0);
	return bpf_redirect(tap_s, 0);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
