// SPDX-License-Identifier: Apache-2.0

// Package compare decides what may leave a pair of guests. It is pure: no clock, no
// goroutine, no I/O. Time comes in with events; effects are values that the caller
// carries out in order.
//
// [Primary] compares what the PVM transmitted with the digest records of what the SVM
// did. [Secondary] keeps copies of what the SVM transmitted and answers questions about
// them. The rules, R0 and up, are in docs/RULES.md.
//
// # How a stream is compared
//
// All positions are TCP sequence numbers in the PVM's numbering. A connection is made of
//
//   - a held queue (held.go): pieces of what the PVM transmitted and what has not left,
//     disjoint and in order. Their bytes are at hand, so the PVM's digest is known
//     everywhere (R4, R5).
//   - the SVM's stream (stream.go): points, which are positions at which the SVM's digest
//     is known, counted from one base. A digest record is a span between points; one
//     that no known position is part of is kept as a loose span.
//   - the compared point, in the stream: both guests transmitted the same below it. It
//     moves to points that the pieces reach without a hole, if the sums are equal there
//     (R1, match.go); past a SYN when both have equal options, and past a FIN when both
//     closed at the same position (R3). Where the sums differ the connection diverges: it
//     is blocked, and a checkpoint is asked for.
//   - a sender (sender.go): it makes the frames that leave, and knows the highest position
//     released. What lies below the compared point leaves, a whole frame at once, a part
//     of one at a GSO boundary or after a delay (R5, release.go). No frame acknowledges
//     more than both guests have (R2, ack.go).
//   - the handshake (handshake.go) with its announcements, the incarnation
//     (incarnation.go), and timers (timers.go): R7's clock, questions to S, the end of
//     the connection.
//
// A new SYN starts afresh (R8, intake.go). A commit makes what the PVM transmitted last the
// common past (R8, R14, R17, commit.go). A daemon that is started again takes connections
// over from what their remotes acknowledged (R23, adopt.go).
//
// What always has to hold of each of these values is in check.go; see [Assertions].
//
// # Datagrams
//
// What is not TCP has no positions that order it. Per flow the datagrams of each guest
// are a multiset (datagram.go): one leaves when the SVM has transmitted as many equal
// ones, in the PVM's order. Only the timeout finds a difference.
//
// # Loss on the peer link
//
// While anything waits, P asks for the newest digest records, and sends S the remote's
// newest header again where the SVM seems to have missed it (R6, loss.go). Each question
// is repeated, ever more seldom.
//
// # What is safe to lose
//
// A frame may leave only if the SVM could take over right after it. Everything is
// bounded. What a bound drops (points, digest records, repeated frames, datagrams, a
// connection, half-open ones first: R11, conntable.go) can only keep something from
// leaving: then the guests retransmit, S is asked, or R7's clock asks for a checkpoint.
package compare
