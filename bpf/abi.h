/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * abi.h: everything Go sees of the kernel half, and nothing else.
 *
 * Two kinds of structure live here.
 *   - Shared memory (maps, ring records): host byte order.
 *   - struct ls_pre and struct ls_rec, which travel on the peer link:
 *     little-endian. lockstep supports little-endian hosts only, so both are
 *     written as plain fields and a static assert refuses other hosts.
 * Addresses are network-order bytes, ports and VLAN tags host-order numbers.
 */
#ifndef LS_ABI_H
#define LS_ABI_H

#include <linux/types.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lockstep's peer frames are little-endian; this host is not"
#endif

/* Numbers that Go needs too: enumerators, which BTF carries to the Go constants. */
enum ls_const {
	LS_ABI_VERSION = 5,

	/* IEEE 802 local experimental ethertype 1, host order: lockstep's own frames. */
	LS_ETHERTYPE = 0x88b5,
	LS_MAGIC = 0x534c, /* "LS" as bytes on the wire */

	LS_HDR_MAX = 256, /* L2..L4 header bytes of a TCP segment */
	LS_REUSED_NS =
		1000000000, /* a SYN that comes sooner behind another connection reuses its ports */
	LS_L4_MAX = 176,    /* bytes before the TCP header; more: compared as a datagram */
	LS_OPTS_MAX = 40,   /* TCP options: 60-byte header at most */
	LS_BOUND_MAX = 12,  /* see digest_stride */
	LS_REC_BASE = 160,  /* struct ls_rec without boundaries */
	LS_STREAM_USER = 0xffff, /* ls_rec.stream of frames that user space sends */
	LS_STREAM_ALL = 0xfffe,	 /* NACK: asks for the newest record of every stream */
	LS_STREAM_MAX = 1024,	 /* streams of CPUs; user space's window comes after theirs */
	LS_WINDOW = 1024,	 /* width of the anti-replay window, in stream numbers */
	LS_SENT = 2048,		 /* records that a stream keeps for retransmission */
	LS_RESEND_MAX = 64,	 /* records retransmitted for one NACK of a stream */
	LS_REC_OFF_MAX = 280,	 /* highest ls_pre.off */

	LS_RULES_MAX = 16,  /* primary-only rules */
	LS_PROTO_ETH = 255, /* ls_tuple.proto of what is not IP: addresses are MACs, gport is the
			       ethertype */

	LS_SLOT_DATA = 1984,	    /* frame bytes in a 2 KiB slot */
	LS_GSLOT_DATA = 69632 - 64, /* frame bytes in a 68 KiB slot */
	LS_FAST_MAX = 4,	    /* segments of a connection that wait in the kernel */
	LS_FAST_TMPL = 96,	    /* header bytes of an ACK that the kernel keeps */
	LS_FAST_CHUNK = 480, /* bytes that it sums up at a time: fewer than older kernels' 512 */
	LS_FAST_LEN = 14 + 20 + 4 * LS_FAST_CHUNK, /* of the longest frame that it can sum up */
	LS_FAST_L4_MAX = 62, /* offset of the TCP header there: no IP options */
	LS_STATS = 128,	     /* room for counters, so that tables go on with more of them */
	LS_BUCKETS = 1024,   /* of UDP flows */
	LS_BUCKET_MAX = 32,  /* datagrams that wait in one */
	LS_DGRAM_SHARE = 4,  /* one slot in four is for datagrams */
	LS_SLOT_NONE = 0xffffffff,
	LS_SLOT_GSO = 0x80000000, /* set in a slot number: index into ls_gslots */

	LS_LANES = 2,		 /* digest lanes */
	LS_BLOCK = 4096,	 /* bytes of stream per digest block */
	LS_KEYS_PER_LANE = 1024, /* LS_BLOCK / 4 */
	LS_KEYS_PAD = 32, /* copies of the first keys: a 64-byte step may read past the last one */
};

/* Values of the load-time constant ls_mutate. Each switches one rule off, for mutation tests. */
enum ls_mutation {
	LS_MUTATE_R9 = 1,      /* announcements are ignored, every offset counts as 0 */
	LS_MUTATE_R6 = 2,      /* gaps in a stream's numbers are not NACKed */
	LS_MUTATE_R20 = 4,     /* the output lease is not checked */
	LS_MUTATE_REPLAY = 8,  /* replayed stream numbers are accepted */
	LS_MUTATE_TAG = 16,    /* tags are not checked */
	LS_MUTATE_GUARD = 32,  /* timestamps get no guard after a takeover */
	LS_MUTATE_EDGE = 64,   /* connections taken over from another host are not translated */
	LS_MUTATE_FLOOD = 128, /* connections that are not open may fill the ring and TCP's slots */
	LS_MUTATE_DRAIN =
		256, /* R13: a GSO frame counts as one where the tap counts its segments */
	LS_MUTATE_QUOTE = 512,	  /* what ICMP errors quote is not translated */
	LS_MUTATE_MODE = 1024,	  /* released frames leave in every mode */
	LS_MUTATE_FAST_R1 = 2048, /* fast path: the bytes are not compared */
	LS_MUTATE_FAST_R2 = 4096, /* fast path: the SVM's ACKs count as the PVM's */
	LS_MUTATE_FAST_R3 = 8192, /* fast path: a FIN counts as a byte of data */
	LS_MUTATE_PARK = 16384,	  /* parked frames are not translated */
};

/* What a role's programs do with frames. Programs load in LS_MODE_SHUT. */
enum ls_mode {
	LS_MODE_SHUT = 0,  /* nothing in or out */
	LS_MODE_HOLD = 1,  /* primary: hold, announce, mirror */
	LS_MODE_RUN = 2,   /* secondary: rewrite in, record out */
	LS_MODE_PARK = 3,  /* secondary: input parked in slots, output dropped (R13) */
	LS_MODE_SOLO = 4,  /* alone: pass both ways, translating where an offset is known */
	LS_MODE_QUIET = 5, /* secondary: as shut, but the guest's TCP payload is kept (R21 i) */
};

enum ls_slot_state {
	LS_SLOT_FREE = 0,
	LS_SLOT_FILLING = 1,
	LS_SLOT_READY = 2,
};

/*
 * One flow, as seen from the guest: the same key on both hosts. ICMP and ICMPv6
 * have type and code in gport and rport; fragments and other protocols 0.
 */
struct ls_tuple {
	__u8 guest[16]; /* IPv4 as ::ffff:a.b.c.d */
	__u8 remote[16];
	__u16 gport;
	__u16 rport;
	__u16 vlan;  /* VLAN id; 0: untagged or priority-tagged (PCP differs by direction) */
	__u16 vlan2; /* of an inner tag (QinQ); 0: none */
	__u8 proto;  /* IPPROTO_*, LS_PROTO_ETH */
	__u8 pad[3];
};

/* Live settings, one element of the mmapable array ls_conf. */
struct ls_conf {
	__u64 lease_until; /* R20: boottime ns, end of the output lease; ~0: it never ends */
	__u32 mode;	   /* enum ls_mode */
	__u32 epoch;
	__u32 key_gen;	 /* key generation: grows with each session and rotation */
	__u32 key_index; /* element of ls_keys in use */
	__u8 peer_mac[6];
	__u8 own_mac[6];
	__u32 edges;	      /* ls_edge may have entries */
	__u64 lease_duration; /* R20: T, ns: an echo extends the lease to its time + T */
	__u64 old_until; /* boottime ns; until then frames of key_gen - 1 are accepted (rotation) */
	__u64 echoed;	 /* boottime ns of the last echo that S returned, or that came back to P */
};

/* What the pinned tables were made for (R23): the element of ls_meta. */
struct ls_meta {
	__u32 abi; /* LS_ABI_VERSION */
	__u32 role;
	__u32 max_conns;
	__u32 slots;
	__u32 gso_slots;
	__u32 tap_base;	  /* frames the tap had counted before ls_sec_gate let one in, mod 2^32 */
	__u8 config[32];  /* digest of what both nodes must agree on */
	__u8 version[64]; /* of the lockstep that made them, 0-terminated */
};

/* Datagrams that leave from the PVM without comparison. 0 matches any. Host order. */
struct ls_rule {
	__u16 gport;
	__u16 rport;
	__u8 proto;
	__u8 pad[3];
};

/* Secrets of one key generation: SipHash keys by direction, digest keys by lane. */
struct ls_keys {
	__u64 sip_tx[2]; /* frames this host sends */
	__u64 sip_rx[2]; /* frames this host receives */
	__u64 mix[LS_LANES];
	__u64 k[LS_LANES][LS_KEYS_PER_LANE + LS_KEYS_PAD]; /* k[l][1024+i] == k[l][i] */
};

/* Held frames and copies: elements of the mmapable arrays ls_slots, ls_gslots. */
struct ls_slot {
	__u32 state; /* enum ls_slot_state; changed by compare-and-swap only */
	__u32 len;   /* frame bytes in data, VLAN tag not among them */
	__u8 pad[56];
	__u8 data[LS_SLOT_DATA];
};

struct ls_gslot {
	__u32 state;
	__u32 len;
	__u8 pad[56];
	__u8 data[LS_GSLOT_DATA];
};

enum ls_ev_type {
	LS_EV_PVM = 1,	  /* struct ls_ev: the PVM sent this (ls_pri_out) */
	LS_EV_REC = 2,	  /* struct ls_ev_rec: an authentic peer frame */
	LS_EV_COPY = 3,	  /* struct ls_ev: the SVM sent this, PVM numbering; wakes no reader */
	LS_EV_PARK = 4,	  /* struct ls_ev: mirrored input parked in a slot (ls_sec_in) */
	LS_EV_CLIENT = 5, /* struct ls_ev: SYN, FIN or RST from the remote passed the mirror */
	LS_EV_YIELD = 6,  /* struct ls_ev: the connection t is user space's again (R27) */
};

enum ls_ev_flag {
	LS_EV_PARTIAL = 1,   /* frame has a partial checksum: csum_start, csum_offset hold */
	LS_EV_INHERITED = 2, /* LS_EV_COPY: no offset known, numbers untranslated */
	LS_EV_DGRAM = 4,     /* not TCP, or not comparable as such: a datagram */
	LS_EV_8021AD = 8,    /* the VLAN tag in tci is of 802.1ad */
	LS_EV_UFO = 16,	     /* gso_size is of IP fragments of one datagram, not of datagrams */
	LS_EV_OPENED = 32,   /* the kernel owns the connection from this SYN|ACK on (R27) */
};

struct ls_ev {
	__u32 type;
	__u32 slot; /* slot number, or LS_SLOT_NONE */
	__u64 at;   /* boottime ns */
	struct ls_tuple t;
	__u32 inc;    /* LS_EV_COPY: incarnation, see ls_rec */
	__u32 seq;    /* of the segment's first position (a SYN is one) */
	__u32 paylen; /* payload bytes */
	__u32 ack;
	__u32 cli_ack; /* LS_EV_COPY: highest ack of the remote, PVM numbering; unknown: seq - 2^30
			*/
	__u16 win;
	__u8 tcp_flags; /* FIN 1 SYN 2 RST 4 PSH 8 ACK 16 URG 32 ECE 64 CWR 128 */
	__u8 flags;	/* LS_EV_* */
	__u16 frag;	/* LS_EV_DGRAM: byte offset of a fragment | 1 when more follow */
	__u16 pad0;
	__u64 sum[LS_LANES]; /* digest of the payload at its positions */
	__u16 gso_size;
	__u16 l3_off;
	__u16 l4_off;
	__u16 pay_off;
	__u16 hdr_len;	  /* bytes of hdr filled: everything before the payload */
	__u16 tci;	  /* VLAN tag as it was, PCP and DEI too; 0: none */
	__u16 csum_start; /* as in struct virtio_net_hdr, from the frame's start */
	__u16 csum_offset;
	__u32 frame_len;
	__u32 number; /* TCP: see ls_fast_state; UDP: of the bucket, from 1 on; 0: none */
	__u8 hdr[LS_HDR_MAX];
};

enum ls_rec_type {
	LS_REC_DATA = 1,     /* S to P: a TCP segment that the SVM sent */
	LS_REC_ANNOUNCE = 2, /* P to S: the PVM's SYN or SYN|ACK (R9) */
	LS_REC_ASK = 3,	     /* P to S: asks for the sum over [seq, end) (R5) */
	LS_REC_ANSWER = 4,   /* S to P: the sum over [seq, end) */
	LS_REC_DGRAM = 5,    /* S to P: a datagram that the SVM sent: [seq, end), frag, sum */
	LS_REC_NEIGH = 6,    /* S to P: the SVM resolves t.remote's MAC; its own is in opts */
	LS_REC_NACK = 7,     /* P to S: asks for records sum[0]..sum[1] of stream stride (R6) */
	LS_REC_ECHO = 8,     /* P to S and back: sum[0] is P's boottime (R20) */
	LS_REC_MARK = 9,     /* P to S: the PVM receives what follows after its STOP (R16) */
};

enum ls_rec_flag {
	LS_REC_INHERITED = 1, /* no incarnation: the connection came with a checkpoint */
	LS_REC_RETX = 2,      /* retransmitted (R6): P may have it already */
};

enum ls_dir {
	LS_DIR_P2S = 0,
	LS_DIR_S2P = 1,
};

/*
 * Front of every peer frame, directly after the Ethernet header. Between it and
 * the record stand the remains of the original frame's headers, where a device may
 * still complete a partial checksum: they are ignored.
 */
struct ls_pre {
	__u16 magic;
	__u16 off; /* of struct ls_rec from the frame's start */
};

/* The authenticated part. Truncated on the wire to len bytes. */
struct ls_rec {
	__u64 tag; /* SipHash-2-4 of the len-8 bytes behind it */
	__u8 version;
	__u8 type;
	__u8 dir;
	__u8 flags;
	__u16 len;	 /* LS_REC_BASE + nsum * 16 */
	__u16 stream;	 /* the sender's CPU, or LS_STREAM_USER */
	__u64 stream_no; /* 1, 2, 3 ... per stream, session and key generation */
	__u32 key_gen;
	__u32 epoch;
	struct ls_tuple t;
	__u32 inc; /* incarnation: the PVM's ISN; 0 with LS_REC_INHERITED */
	__u32 seq; /* PVM numbering */
	__u32 end; /* seq + payload + SYN + FIN; ASK, ANSWER, DGRAM: end of range */
	__u32 ack;
	__u16 win; /* as in the header, unscaled */
	__u8 tcp_flags;
	__u8 optlen;
	__u32 stride;		/* bytes between boundaries, from the payload's start */
	__u16 nsum;		/* boundaries that follow */
	__u16 frag;		/* DGRAM: as in ls_ev */
	__u64 sum[LS_LANES];	/* whole payload; none of a GSO segment of the PVM */
	__u8 opts[LS_OPTS_MAX]; /* TCP options, TSval in PVM numbering, rest zero */
	__u64 bound[LS_BOUND_MAX][LS_LANES]; /* D([start, start + (i+1)*stride)) */
};

/*
 * In the ring this is cut: 16 + LS_REC_BASE bytes when rec.nsum is 0, else the
 * whole structure, of which bound[nsum..] means nothing.
 */
struct ls_ev_rec {
	__u32 type;
	__u32 number; /* as in ls_ev */
	__u64 at;
	struct ls_rec rec;
};

/*
 * State bits of a TCP connection whose offset is known (element of ls_conn), and of
 * one whose handshake is not over (element of the LRU ls_half).
 */
enum ls_conn_bit {
	LS_CONN_PVM = 1,	  /* ISN of the PVM known (announced) */
	LS_CONN_SVM = 2,	  /* ISN of the SVM known */
	LS_CONN_ACTIVE = 4,	  /* the SVM's SYN had no ACK: opened by the guest */
	LS_CONN_GFIN = 8,	  /* FIN seen from the guest */
	LS_CONN_RFIN = 16,	  /* FIN seen from the remote */
	LS_CONN_RST = 32,	  /* RST seen from either */
	LS_CONN_TS = 64,	  /* ls_conn: both use timestamps, ts_off holds */
	LS_CONN_PACTIVE = 128,	  /* ls_half: the PVM's SYN had no ACK */
	LS_CONN_PTS = 256,	  /* ls_half: the PVM's SYN has a timestamp */
	LS_CONN_STS = 512,	  /* ls_half: the SVM's SYN has a timestamp */
	LS_CONN_DONE = 1024,	  /* ls_half: was copied to ls_conn once, which happens only once */
	LS_CONN_INHERITED = 2048, /* made by a takeover: no offset, no incarnation */
	LS_CONN_GUARDED = 4096,	  /* guard was set */
	LS_CONN_ECHOES = 8192,	  /* the remote echoes timestamps with the guard */
	LS_CONN_UNACKED = 16384,  /* ls_conn: no ack since the guest's FIN and its repetitions */
	LS_CONN_DOUBT = 32768,	  /* taken over: off or none, as the guest's next segment shows */
};

/*
 * The PVM's and the SVM's part are written by different programs, each under its
 * own bit: cleared before the fields change, set (a full barrier) after. A program
 * that finds the other part's bit set pairs them, so each pair is made at least once.
 *
 * Both parts belong together when
 *   - the same two ISNs were paired before (used_pvm, used_svm), or
 *   - both are active and neither ISN was used in a pair (0 means none: an ISN
 *     of 0 is never paired actively, which costs one connect in 2^32), or
 *   - not both are active and both answer the same SYN of the remote.
 */
struct ls_half {
	__u32 state;
	__u32 isn_pvm;
	__u32 isn_svm;
	__u32 cli_pvm; /* the remote's ISN, from the PVM's SYN|ACK's ack; 0 before */
	__u32 cli_svm; /* the same from the SVM's */
	__u32 ts_pvm;
	__u32 ts_svm;
	__u32 used_pvm; /* the pair made last (R9); 0: none */
	__u32 used_svm;
	__u16 win; /* of the SVM's SYN or SYN|ACK, with its flags and options: */
	__u8 tcp_flags;
	__u8 optlen;
	__u8 opts[LS_OPTS_MAX];
	__u64 last; /* boottime ns of the last frame */
};

struct ls_conn {
	__u32 off;     /* ISN_SVM - ISN_PVM */
	__u32 ts_off;  /* TSval_SVM - TSval_PVM */
	__u32 inc;     /* incarnation: ISN_PVM */
	__u32 state;   /* LS_CONN_* */
	__u32 cli_ack; /* highest ack of the remote, PVM numbering */
	__u32 isn_svm;
	__u32 guard;	/* R22: ticks added to the timestamps that the remote receives */
	__u32 ts_first; /* the first TSval with the guard, as the remote received it; 0: none */
	__u64 last;
};

/*
 * A connection that came with a checkpoint and on which the SVM has sent since: a
 * takeover guards its timestamps (R22). Element of the LRU ls_inherited; an evicted
 * connection merely goes without the guard.
 */
struct ls_inh {
	__u32 cli_ack; /* highest ack of the remote; 0: none seen */
	__u32 pad;
};

/* The remote's newest segment (R6), on P: element of the LRU ls_cli. */
struct ls_cli {
	__u64 at;  /* boottime ns */
	__u32 seq; /* behind its payload; SYN and FIN not counted */
	__u32 ack;
	__u16 win;
	__u8 tcp_flags;
	__u8 flags; /* LS_EV_8021AD */
	__u16 l4_off;
	__u16 hdr_len; /* bytes of hdr: everything before the payload */
	__u16 tci;
	__u16 reused; /* the SYN came soon behind a segment of the connection before */
	__u16 pad[2];
	__u8 hdr[LS_HDR_MAX];
};

#include "abi_fast.h"

/* Reasons, append-only: Go's labels are generated from these names, operators see them. */
#define LS_REASONS(X) \
	X(released, "released frame turned back into the tap") \
	X(mirrored, "frame for the guest cloned to the peer") \
	X(mirror_failed, "clone for the peer dropped: the peer link refused it") \
	X(held, "PVM frame held in a slot") \
	X(held_ack, "PVM pure ACK reported to user space") \
	X(announced, "SYN announced to the peer") \
	X(passed, "guest frame passed without comparison (ARP, ND, solo)") \
	X(shut, "frame dropped: the role's gate is shut") \
	X(muted, "frame dropped: the output lease has expired") \
	X(no_slot, "frame dropped: no free slot") \
	X(no_ring, "frame dropped: ring full") \
	X(too_long, "frame dropped: longer than a slot, or headers too long") \
	X(malformed, "frame dropped: headers do not parse") \
	X(peer_junk, "peer frame dropped: not of this protocol") \
	X(peer_short, "peer frame dropped: truncated") \
	X(peer_version, "peer frame dropped: other version") \
	X(peer_type, "peer frame dropped: unknown type or direction") \
	X(peer_tag, "peer frame dropped: tag wrong") \
	X(peer_term, "peer frame dropped: other key generation") \
	X(peer_epoch, "peer frame dropped: other epoch") \
	X(record_in, "record accepted") \
	X(record_out, "record sent for an SVM frame") \
	X(copy_lost, "SVM frame recorded without a copy: no slot or ring") \
	X(pending, "SVM frame dropped: offset not known yet") \
	X(svm_only, "SVM frame dropped: of this kind only the PVM's frames leave") \
	X(delivered, "mirrored frame delivered to the SVM") \
	X(parked, "mirrored frame parked") \
	X(gated, "frame for the SVM dropped: not mirrored") \
	X(conn_full, "frame dropped: connection table full") \
	X(rewrite_failed, "frame dropped: rewriting failed") \
	X(released_out, "released frame let out") \
	X(let_in, "mirrored frame let into the SVM, in the unit that its tap counts in") \
	X(primary_only, "PVM frame passed by a primary-only rule") \
	X(peer_replay, \
	  "peer frame dropped: stream number seen before, or older than the anti-replay window") \
	X(nack_out, "gap in a stream's numbers: retransmission requested") \
	X(nack_in, "retransmission request accepted") \
	X(resent, "record retransmitted") \
	X(resend_gone, "retransmission requested of a record that is not kept any more") \
	X(echo_in, "echo accepted: output lease extended") \
	X(echo_out, "echo returned to the primary") \
	X(neigh_out, "SVM's neighbour request handed to the primary") \
	X(xdp_passed, "peer frame let past XDP") \
	X(xdp_dropped, "frame dropped by XDP: not authentic peer traffic") \
	X(crowded, "frame dropped: its connection is not open, and half of the ring is used") \
	X(sacked, "duplicate ACK sent to the PVM alone, so that it retransmits (R6)") \
	X(peer_again, "duplicate of a digest record, one of them retransmitted (R6)") \
	X(fast_held, "PVM frame or ACK waits in the kernel for the SVM's") \
	X(fast_passed, "PVM frame passed by the kernel: the SVM's record had come") \
	X(fast_out, "PVM frame sent by the kernel: the SVM's record came") \
	X(fast_in, "record taken in by the kernel") \
	X(fast_dgram, "datagram among fast_passed and fast_out") \
	X(in_doubt, "frame dropped after a takeover: nobody knows in whose numbers it is (R22)")

enum ls_reason {
#define LS_X(name, text) LS_R_##name,
	LS_REASONS(LS_X)
#undef LS_X
		LS_R_MAX
};

struct ls_count {
	__u64 packets;
	__u64 bytes;
};

_Static_assert((int)LS_R_MAX <= (int)LS_STATS, "counters");
#define LS_SIZE(type, n) _Static_assert(sizeof(type) == (n), #type)
LS_SIZE(struct ls_tuple, 44);
LS_SIZE(struct ls_conf, 64);
LS_SIZE(struct ls_slot, 2048);
LS_SIZE(struct ls_gslot, 69632);
LS_SIZE(struct ls_rec, LS_REC_BASE + LS_BOUND_MAX * LS_LANES * 8);
LS_SIZE(struct ls_ev, 384);
LS_SIZE(struct ls_half, 88);
LS_SIZE(struct ls_conn, 40);
LS_SIZE(struct ls_inh, 8);
LS_SIZE(struct ls_cli, 288);
LS_SIZE(struct ls_meta, 120);
LS_SIZE(struct ls_rule, 8);
LS_SIZE(struct ls_fast_held, 64);
LS_SIZE(struct ls_fast_rec, 56);
LS_SIZE(struct ls_fast_state, 712);
LS_SIZE(struct ls_bucket_dgram, 56);
LS_SIZE(struct ls_bucket_state, 1864);

#endif
