// SPDX-License-Identifier: Apache-2.0

// Package sim is one simulated world: two hosts with their kernels, daemons, QEMUs, guests and
// disks, the links between them, an arbiter, a client, and operators, all on one virtual clock
// and from one seed. In its middle are the real machines: compare, rewriter (by
// bpf/bpfmodel), control/checkpoint, control/failover with its Decide, and the loop of
// control/nicloop. What surrounds them is modelled: the kernel by sim/kernel, TCP by sim/tcp,
// QEMU after what was seen of it (qemu.go), and the daemon's shell, which carries the machines'
// effects out (daemon.go).
//
// A [Scenario] has everything that a run depends on. [Generate] draws one from a seed, [Run]
// runs it, and [Shrink] makes one that fails shorter. The text of a scenario is in testdata,
// where it is a test from then on.
//
// What is checked at every step (check.go):
//
//   - While P holds, nothing leaves that the SVM has not sent at the same position of the same
//     stream, and nothing is acknowledged that it has not received.
//   - No datagram leaves that the SVM has not sent too, and no guest receives one twice.
//   - What reaches the client never goes back: acknowledgment, window edge, timestamp.
//   - Two hosts never transmit.
//   - What a client was told to be on the disk is on every disk that serves.
//   - Once everything that was broken is mended, all that clients asked for is answered.
package sim
