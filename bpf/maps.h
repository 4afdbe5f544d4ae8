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
volatile const __u32 ls_mark_rel; /* on P: a released frame */
volatile const __u32 ls_mark_in;  /* on S: a mirrored frame on its way to the tap */
volatile const __u32 ls_nslots = LS_SLOTS;
volatile const __u32 ls_ngslots = LS_GSLOTS;
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
	__uint(max_entries, LS_R_MAX);
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

/* struct ls_ev and struct ls_ev_rec, told apart by their first word. */
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

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LS_HALVES);
	__type(key, struct ls_tuple);
	__type(value, struct ls_half);
} ls_half SEC(".maps");

/* Number of the record this CPU's lane sent last. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} ls_lane SEC(".maps");

#endif
