// SPDX-License-Identifier: Apache-2.0

// Package rewriter holds what the daemon decides about sequence number translation (R9 to
// R11, R22). It is pure.
//
// The guests choose their own initial sequence numbers and timestamps, and the remote
// only ever sees the PVM's. The kernel programs of the secondary host translate each
// segment by the connection's [Offset]; package bpf/bpfmodel is the model of that, for
// tests. The daemon owns the tables as a whole: which half-open connections a takeover
// makes known, with which guard on their timestamps ([Takeover]), how the translation of
// a host that had taken over adds to the next one's ([Conn.Behind]), and when an entry
// goes ([Conn.Ended]). [Conn] and [Half] are the entries of the kernel's tables.
package rewriter
