// SPDX-License-Identifier: Apache-2.0

// Package tcp is a guest's or a client's TCP/IP stack for a discrete-event simulator. It is
// pure and deterministic: time comes in with every call, random choices come from the
// stack's own seeded generator, and frames go out by [Stack.Take]. [Stack.Clone] is what a
// checkpoint of QEMU does to the secondary.
//
// It behaves as Linux does (RFC 9293, 7323, 2018, 2883, 5681, 6298, 5682, 8985, 5961, 6191, 7413, 9768),
// with what makes two guests differ: how streams are cut into segments, when they are
// acknowledged, what is retransmitted. It leaves out what changes only speed on real networks:
// CUBIC, pacing, receive buffer tuning, GSO, compressed ACKs, path MTU discovery.
//
// testdata has a transcript for each behaviour. With -kernel, the tests whose names begin with
// TestKernel compare them, and random ones, with what this kernel's TCP does. By real time and
// some rare D-SACKs a few differ.
//
//   - stack.go, api.go, datagram.go: the stack and its calls
//   - frame.go, options.go, parse.go: frames
//   - conn.go, handshake.go, state.go: a connection and its states
//   - input.go: a segment comes in; ack.go: its acknowledgment; receiver.go: its data;
//     acking.go: when that is acknowledged
//   - cookie.go, fastopen.go, accecn.go: SYN cookies, fast open, more accurate ECN
//   - output.go: what is sent; scoreboard.go, recovery.go, congestion.go, estimator.go: when, and
//     what is sent again; timers.go
package tcp
