/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* abi_fast.h: the part of abi.h about the fast path (R27): who owns a connection, and its state. */
#ifndef LS_ABI_FAST_H
#define LS_ABI_FAST_H

enum ls_owner {
	LS_OWNER_USER = 0,
	LS_OWNER_KERNEL = 1,
};

/* ls_fast_state.tmpl_partial: a partial checksum, where TCP's is, or elsewhere. */
enum ls_fast_tmpl {
	LS_FAST_PARTIAL = 1,
	LS_FAST_ODD = 2,
};

enum ls_fast_mark {
	LS_FAST_FIN_PVM = 1, /* the guest has closed; where both have, their FINs have left */
	LS_FAST_FIN_SVM = 2,
	LS_FAST_SYN = 4, /* the PVM's SYN|ACK waits, held[0], and nothing else has come */
};

/* What a guest, or what left, has acknowledged of the remote's stream: package compare's side. */
struct ls_acked {
	__u32 ack;
	__u32 edge; /* right edge of the window */
	__u32 echo; /* newest timestamp echo that came with ack */
	__u16 win;
	__u8 echoes; /* echo holds */
	__u8 pad;
};

/*
 * A frame of the PVM that waits for the SVM's; as in ls_ev, without header. sum of a SYN|ACK: its
 * options, without the timestamp.
 */
struct ls_fast_held {
	__u64 at;
	__u64 sum[LS_LANES];
	__u32 slot;
	__u32 seq;
	__u32 paylen;
	__u32 ack;
	__u32 tsval;
	__u32 frame_len;
	__u16 win;
	__u8 tcp_flags;
	__u8 flags;
	__u16 l3_off;
	__u16 l4_off;
	__u16 pay_off;
	__u16 csum_start;
	__u16 csum_offset;
	__u16 pad;
};

/* A digest record that waits for the PVM's frame; as in ls_rec. */
struct ls_fast_rec {
	__u64 at;
	__u64 sum[LS_LANES];
	__u32 seq;
	__u32 end;
	__u32 ack;
	__u16 win;
	__u8 tcp_flags;
	__u8 optlen;
	__u8 opts[12];
	__u32 epoch;
};

/*
 * Fast path (R27): a connection that the kernel may own. Only one guest's segments wait,
 * the oldest first. All sequence numbers are the PVM's.
 */
struct ls_fast_state {
	__u32 owner;	/* enum ls_owner */
	__u32 number;	/* of the newest event that user space was sent of it */
	__u32 inc;	/* incarnation, see ls_rec */
	__u32 released; /* below it both guests' are equal, and have left */
	__u32 pvm_end;	/* what comes next of the PVM, and of the SVM */
	__u32 svm_end;
	__u32 ts_sent; /* newest timestamp that has left */
	__u32 pure;    /* what the PVM's newest pure ACK acknowledges */
	__u8 inherited;
	__u8 scale;    /* of the guests' windows */
	__u8 ts;       /* segments have timestamps */
	__u8 has_pure; /* pure and tmpl hold */
	__u8 nheld;
	__u8 nrecs;
	__u16 tmpl_len;
	struct ls_acked pvm;
	struct ls_acked svm;
	struct ls_acked sent;
	__u64 since;  /* boottime ns: nothing has moved since then of what waits */
	__u64 frames; /* released since user space gave it away, with their payload; ACKs; records
		       */
	__u64 bytes;
	__u64 acks;
	__u64 records;
	__u32 ts_last;		 /* the PVM's newest timestamp */
	__u16 tmpl_l4;		 /* offset */
	__u8 tmpl_partial;	 /* enum ls_fast_tmpl; 0: its checksum is complete */
	__u8 marks;		 /* enum ls_fast_mark */
	__u8 tmpl[LS_FAST_TMPL]; /* the PVM's newest pure ACK */
	struct ls_fast_held held[LS_FAST_MAX];
	struct ls_fast_rec recs[LS_FAST_MAX];
};

enum ls_fast_op {
	LS_FAST_GRANT =
		1, /* the kernel owns t, with state s, if number is that of its newest event */
	LS_FAST_TAKE = 2, /* user space owns t, whose state comes back in s */
};

/* An order of user space's: the frame that ls_fast_order gets, and turns into the answer. */
struct ls_fast_ctx {
	struct ls_tuple t;
	__u32 op;   /* enum ls_fast_op */
	__u32 done; /* result: it was carried out */
	__u32 pad;
	struct ls_fast_state s;
};

/* A datagram that waits for the other guest's: the PVM's frame, or the SVM's digest record. */
struct ls_bucket_dgram {
	__u64 at;
	__u64 sum[LS_LANES];
	__u32 slot; /* LS_SLOT_NONE: a record, of epoch */
	__u32 seq;
	__u32 paylen;
	__u32 frame_len;
	__u32 epoch;
	__u16 l3_off;
	__u16 l4_off;
	__u16 pay_off;
	__u16 csum_start;
	__u16 csum_offset;
	__u8 flags;
	__u8 pad;
};

/* Fast path (R27) for UDP: what waits of one flow, the oldest first from head on. */
struct ls_bucket_state {
	struct ls_tuple t; /* while something waits */
	__u8 user;	   /* user space owns the bucket */
	__u8 svm;	   /* records wait, not frames */
	__u8 n;
	__u8 head;
	__u64 since;  /* boottime ns: nothing has moved since then of what waits */
	__u64 frames; /* released since user space gave it away */
	__u8 pad[8];
	struct ls_bucket_dgram wait[LS_BUCKET_MAX];
};

enum ls_bucket_op {
	LS_BUCKET_TAKE = 1,    /* user space owns it, and what waits comes back in s */
	LS_BUCKET_SWEEP = 2,   /* the same with the first from index on in which something waits */
	LS_BUCKET_RELEASE = 3, /* the kernel owns it */
};

/* An order of user space's: the frame that ls_bucket_order gets, and turns into the answer. */
struct ls_bucket_ctx {
	__u32 op; /* enum ls_bucket_op */
	__u32 index;
	__u32 done; /* result: it was carried out */
	__u32 pad;
	struct ls_bucket_state s;
};

#endif
