// SPDX-License-Identifier: Apache-2.0

// Package compare decides what may leave. It is pure: no clock, no goroutine, no
// I/O. Time comes in with events, effects are values that the caller carries out in
// order.
//
// [Primary] compares what the PVM said with what the SVM's records say; [Secondary]
// keeps copies of what the SVM said and answers questions about them. Both speak in
// events and effects of this package. Rules are numbered as in docs/RULES.md.
//
// # How a stream is compared
//
// All positions are TCP sequence numbers in PVM numbering. Per connection there are
//
//   - pieces (held.go): what the PVM said and has not left, disjoint and in order.
//     Their bytes are at hand, so the PVM's digest is known everywhere (R4, R5).
//   - points (edges.go): positions at which the SVM's digest is known, counted
//     from one base; records are spans between them. A span none of whose positions
//     is known waits as a loose one.
//   - the compared point (match.go): below it both said the same. It moves to the
//     points that the pieces reach without a hole, if the sums are equal there
//     (R1); past a SYN when both have equal options, and past a FIN when both closed
//     at the same position (R3). Different sums are a divergence: the connection is
//     blocked and a checkpoint asked for.
//   - the released point: what lies below the compared point leaves, whole frames at
//     once, part of a frame at a GSO boundary or after a delay (R5).
//
// Everything that leaves acknowledges no more than both guests have (R2, ack.go).
// R7's clock, questions to S, announcements and the end of connections are timers
// (timers.go). A new SYN starts afresh (R8, match.go: pvmSYN), and a commit makes
// what the PVM said last the common past (R8, R14, R17, commit.go). A daemon that
// starts again takes connections over from what their remotes acknowledged (R23,
// adopt.go).
//
// # Datagrams
//
// All that is not TCP has no positions that order it. Per flow the datagrams of both
// guests are multisets (datagram.go): one leaves when the SVM has said as many equal
// ones, in the PVM's order. Only the timeout finds a difference.
//
// # Loss on the peer link
//
// While something waits, P asks for the newest records, and gives S the remote's
// newest header again where the SVM seems to miss it (R6, loss.go). What one question
// does not heal a later one does, ever more seldom.
//
// # What is safe to lose
//
// A frame may leave only if the SVM could take over right after it (R0). Everything is
// bounded, and what a bound drops (points, records, repeated frames, datagrams, a
// connection, half-open ones first: R11, halfopen.go) can only keep something from
// leaving: then the guests repeat it, S is asked, or R7's clock asks for a
// checkpoint.
package compare
