//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* lockstep.c: the one object. A program per attach point, over the headers. */
#include <stddef.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* tcx verdicts; linux/bpf.h of Debian 12 does not have them yet. */
#define TCX_NEXT (-1)
#define TCX_DROP 2

#include "maps.h"
#include "stats.h"
#include "parse.h"
#include "seq.h"
#include "csum.h"
#include "digest.h"
#include "siphash.h"
#include "hold.h"
#include "rec.h"
#include "conn.h"
#include "quote.h"
#include "fast.h"
#include "fast_open.h"
#include "fast_decide.h"
#include "fast_dgram.h"

#include "mirror.bpf.c"
#include "pri_out.bpf.c"
#include "digest_rx.bpf.c"
#include "peer_xdp.bpf.c"
#include "sec_in.bpf.c"
#include "sec_out.bpf.c"
#include "sec_gate.bpf.c"

/* Types of abi.h that no map has: named here, so that BTF and Go have them. */
static const struct {
	enum ls_const c;
	enum ls_mutation mutation;
	enum ls_mode mode;
	enum ls_slot_state slot_state;
	enum ls_ev_type ev_type;
	enum ls_ev_flag ev_flag;
	enum ls_rec_type rec_type;
	enum ls_rec_flag rec_flag;
	enum ls_dir dir;
	enum ls_conn_bit conn_bit;
	enum ls_reason reason;
	enum ls_owner owner;
	enum ls_fast_op fast_op;
	enum ls_fast_tmpl fast_tmpl;
	enum ls_fast_mark fast_mark;
	enum ls_bucket_op bucket_op;
} ls_abi_enums __attribute__((used));
static const struct ls_ev *const ls_abi_ev __attribute__((used));
static const struct ls_ev_rec *const ls_abi_ev_rec __attribute__((used));
static const struct ls_fast_ctx *const ls_abi_fast_ctx __attribute__((used));
static const struct ls_bucket_ctx *const ls_abi_bucket_ctx __attribute__((used));
static const struct ls_pre *const ls_abi_pre __attribute__((used));

/* GPL-compatible: bpf_ktime_get_boot_ns and the skb kfuncs ask for it. */
char ls_license[] SEC("license") = "Dual BSD/GPL";
