// SPDX-License-Identifier: Apache-2.0

// Package kernel is a model of the kernel half of one guest NIC, for a simulator: a
// [datapath.NIC] without a kernel, on real frames. It has no clock, starts no goroutine,
// does no I/O, and the same calls with the same random numbers give the same frames.
//
// The user-space half is the loader's own code (package loader/core), the translation on S
// is package bpf/bpfmodel, and the programs are written here once more, one file for each
// side and for each of their headers. A test puts the same frames through both and compares
// verdicts, frames, peer frames with their tags, events and tables.
//
// Where the model is simpler than the kernel:
//   - The host has one CPU, so one TX stream beside user space's, and programs never run at
//     the same time.
//   - A frame's VLAN tags are all in its bytes, where the kernel has the outer one beside it.
//   - The guest's checksums are complete, and so are those that the NIC gives out. What user
//     space leaves to the device is completed there.
//   - Large frames are TCP segments or datagrams to be cut into datagrams, not fragments.
//     They are cut when they leave for the bridge. Behind IPv6 extension headers they are not.
//   - Tables evict the entry least lately used, exactly.
//   - The peer link takes every frame, and the tap delivers at once. XDP is left out.
//   - The mutation GUARD takes the guard when it is set, and DRAIN changes nothing: no frame
//     for a guest is large.
package kernel
