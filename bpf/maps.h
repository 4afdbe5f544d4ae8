/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * maps.h: the maps and the load-time constants. Sizes that depend on the config
 * (slots, connections, ring) are set by the loader before the load.
 */
#ifndef LS_MAPS_H
#define LS_MAPS_H

#include "abi.h"

#define LS_CONNS 65536
#define LS_HALVES 16384
#define LS_SLOTS 16384
#define LS_GSLOTS 1024
#define LS_RING (16 << 20)

/* Load-time constants. Marks are random, not 0, and differ. */
volatile const __u32 ls_tap;	  /* ifindex of the guest's tap */
volatile const __u32 ls_peer;	  /* ifindex of the peer device */
volatile const __u32 ls_mark_rel; /* a released frame; on S a copy that is retransmitted (R22) */
volatile const __u32
	ls_mark_in; /* S: a mirrored frame on its way to the tap; P: a frame not to mirror */
volatile const __u32 ls_mark_park; /* S: a mirrored frame that was parked, and is as it came */
volatile const __u32 ls_nslots = LS_SLOTS;
volatile const __u32 ls_ngslots = LS_GSLOTS;
volatile const __u32 ls_nrules; /* of ls_rules in use */
volatile const __u32 ls_mptcp;	/* not 0: MPTCP's option stays in SYNs */
volatile const __u32 ls_mutate; /* enum ls_mutation; tests only */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct ls_conf);
} ls_conf SEC(".maps");

/* Two, so that new keys are written beside those in use (ls_conf.key_index). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct ls_keys);
} ls_keys SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LS_STATS); /* of enum ls_reason */
	__type(key, __u32);
	__type(value, struct ls_count);
} ls_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_SLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct ls_slot);
} ls_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_GSLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct ls_gslot);
} ls_gslots SEC(".maps");

/* struct ls_ev and struct ls_ev_rec: their first word is the type. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, LS_RING);
} ls_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LS_CONNS);
	__type(key, struct ls_tuple);
	__type(value, struct ls_conn);
} ls_conn SEC(".maps");

/*
 * The translation that a host that took over applies to connections that are older
 * than the takeover (R22), until they end. Between this edge and the guest all frames
 * have the guest's numbers. off, ts_off, guard, ts_first, state and last are as in
 * ls_conn, with the guest in the SVM's place and the remote's view in the PVM's. Only
 * user space adds entries.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LS_CONNS);
	__type(key, struct ls_tuple);
	__type(value, struct ls_conn);
} ls_edge SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LS_HALVES);
	__type(key, struct ls_tuple);
	__type(value, struct ls_half);
} ls_half SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LS_CONNS);
	__type(key, struct ls_tuple);
	__type(value, struct ls_inh);
} ls_inherited SEC(".maps");

/* P: the remote's newest segments. One that is evicted cannot be sent to S again (R6). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LS_CONNS);
	__type(key, struct ls_tuple);
	__type(value, struct ls_cli);
} ls_cli SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_RULES_MAX);
	__type(key, __u32);
	__type(value, struct ls_rule);
} ls_rules SEC(".maps");

/* Written only by user space, when it makes the tables. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ls_meta);
} ls_meta SEC(".maps");

/*
 * Anti-replay windows by TX stream of the peer (RFC 6479's blocks of a bit map); user
 * space's stream is the last element.
 */
struct ls_replay_win {
	struct bpf_spin_lock lock;
	__u32 key_gen; /* of the numbers; a later one starts an empty window */
	__u64 top;     /* highest */
	__u64 bits[LS_WINDOW / 64];
	__u64 retx[LS_WINDOW / 64]; /* accepted as a retransmission */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_STREAM_MAX + 1);
	__type(key, __u32);
	__type(value, struct ls_replay_win);
} ls_win SEC(".maps");

/* A record that a stream sent, kept for retransmission (R6). */
struct ls_sent {
	__u64 no; /* 0: none, or being written */
	__u8 rec[LS_REC_BASE];
};

/* LS_SENT elements for each stream, by number modulo LS_SENT; one stream after the other. On S. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_SENT);
	__type(key, __u32);
	__type(value, struct ls_sent);
} ls_sent SEC(".maps");

/*
 * A TX stream: the number of its newest record, in a cache line of its own. There is
 * one for each CPU. An array, not a per-CPU one, as S reads those of other CPUs. Its
 * map keeps the name ls_lane, by which tables are found that an earlier version pinned.
 */
struct ls_tx_stream {
	__u64 no;
	__u64 pad[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LS_STREAM_MAX);
	__type(key, __u32);
	__type(value, struct ls_tx_stream);
} ls_lane SEC(".maps");

/*
 * A parsed frame. Numbers are host-order; translate() keeps them and tcp[] current.
 * Of a datagram seq is the position that its digest begins at.
 */
struct ls_pkt {
	struct ls_tuple t;
	__u32 len; /* frame bytes */
	__u32 seq;
	__u32 ack;
	__u32 paylen; /* from the IP length: Ethernet padding is not payload */
	__u16 win;
	__u8 flags;  /* TCP flags */
	__u8 optlen; /* bytes of TCP options */
	__u16 l3_off;
	__u16 l4_off;
	__u16 pay_off;
	__u16 tci;
	__u16 frag;	/* byte offset of a fragment | 1 when more follow */
	__u8 dgram;	/* not TCP, or not comparable as such */
	__u8 neigh_req; /* ARP request or neighbour solicitation of t.guest for t.remote */
	__u8 mac[6];	/* of the sender */
	__u8 tcp[64] __attribute__((aligned(8))); /* TCP header and options, rest 0 */
};

/* The TCP header that an ICMP error quotes. Its sender is the error's receiver. */
struct ls_quote {
	struct ls_tuple t;
	__u32 off; /* from the frame's start */
	__u32 len; /* bytes of it that are quoted, 8 at least; 0: there is none */
	__u8 tcp[64] __attribute__((aligned(8))); /* them, rest 0 */
};

/* Digest input, at most a block: up to 3 zeros, the bytes, 64 zeros. */
struct ls_piece {
	__u64 sum[LS_LANES]; /* result */
	__u8 b[LS_BLOCK + 128];
};

/* A digest under way. */
struct ls_digest {
	__u64 sum[LS_LANES];
	__u32 off;    /* of the next byte, from the frame's start */
	__u32 pos;    /* its position in the stream */
	__u32 left;   /* bytes to go */
	__u32 stride; /* bytes between boundaries; 0: none wanted */
	__u32 next;   /* bytes to go to the next boundary */
	__u32 nsum;   /* boundaries passed */
};

/* What translation adds to each number. */
struct ls_delta {
	__u32 seq;
	__u32 ack; /* SACK blocks too; only with the ACK flag */
	__u32 tsval;
	__u32 tsecr; /* only with the ACK flag, and not to 0, which means "none" */
	__u32 strip; /* not 0: MPTCP's option becomes NOPs */
};

/* A walk over the TCP options in ls_scratch.tcp. */
struct ls_walk {
	struct ls_delta d;
	__u32 at;
	__u32 end;
	__u32 has_ts;
	__u32 is_sealed; /* has an option whose digest covers the numbers */
	__u32 tsval;	 /* as found, before the addition */
	__u32 tsecr;
};

/*
 * What a program works on: too large for the stack. tcx runs with bottom halves
 * off, so no other program of this CPU comes between.
 */
struct ls_scratch {
	struct ls_pkt p;
	__u8 tcp[64] __attribute__((aligned(8))); /* translated copy of p.tcp */
	struct ls_quote q;
	struct ls_rec rec;
	struct ls_walk walk;
	struct ls_digest digest;
	struct ls_piece piece;
	struct ls_cli cli;
	struct ls_fast_held held;
	struct ls_bucket_dgram dgram;
	__u32 slot;	 /* where slot_keep has kept the frame, or LS_SLOT_NONE */
	__u32 number;	 /* fast path: of the event for user space */
	__u32 cursor[5]; /* where the search for a free slot goes on, by size and class */
	__u32 quiet;	 /* copies since user space was woken for one */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ls_scratch);
} ls_scratch SEC(".maps");

static __always_inline struct ls_scratch *scratch(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&ls_scratch, &key);
}

static __always_inline struct ls_conf *config(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&ls_conf, &key);
}

/* Read once: user space may change it at any moment. */
static __always_inline __u32 mode_of(const struct ls_conf *conf)
{
	return *(const volatile __u32 *)&conf->mode;
}

/* R20: may a guest's frame leave now? */
static __always_inline int lease_valid(const struct ls_conf *conf)
{
	return ls_mutate & LS_MUTATE_R20 || bpf_ktime_get_boot_ns() < conf->lease_until;
}

static __always_inline struct ls_keys *keys_in_use(const struct ls_conf *conf)
{
	__u32 key = conf->key_index;

	return bpf_map_lookup_elem(&ls_keys, &key);
}

/* Keys of a peer frame's generation: for a while after a rotation the previous ones too. */
static __always_inline struct ls_keys *keys_of_gen(const struct ls_conf *conf, __u32 key_gen)
{
	__u32 key = conf->key_index;

	if (key_gen != conf->key_gen) {
		if (key_gen != conf->key_gen - 1 || bpf_ktime_get_boot_ns() >= conf->old_until)
			return NULL;
		key ^= 1;
	}
	return bpf_map_lookup_elem(&ls_keys, &key);
}

#endif
