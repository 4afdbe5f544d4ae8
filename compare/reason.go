// SPDX-License-Identifier: Apache-2.0

package compare

// Reasons for a checkpoint, then reasons for a drop. Append only: names go into
// status output and logs.
const (
	ReasonNone Reason = iota
	// Checkpoints.
	ReasonPayload     // sums differ at a common position (R1)
	ReasonSYN         // SYN options or acknowledged number differ (R3)
	ReasonFIN         // one side closed where the other goes on (R3)
	ReasonOpen        // the guests opened different connections
	ReasonTimeout     // nothing moved for Config.Timeout (R7)
	ReasonTableFull   // no room for a connection
	ReasonSVMChanged  // the SVM transmitted other bytes at the same position
	ReasonUnknownPast // the PVM retransmits from before the connection was known
	// Drops.
	ReasonDuplicate   // of a held range (R4)
	ReasonMalformed   // impossible lengths or flags
	ReasonStray       // positions far from the stream, or no such connection
	ReasonSuperseded  // of an older incarnation (R8)
	ReasonIncarnation // a record of another incarnation (R8)
	ReasonSYNCookie   // second SYN|ACK for a SYN that one was released for (R8)
	ReasonOldEpoch    // a record from before the commit
	ReasonNextEpoch   // too many records wait for the commit (R17)
	ReasonFrozen      // a repetition while frozen
	ReasonDiverged    // a repetition on a diverged connection
	ReasonNoACK       // the SVM has acknowledged nothing yet (R2)
	ReasonReset       // the connection was reset
	ReasonExpired     // the connection ended or went idle
	ReasonUnmatchedRST
	ReasonForgotten // SVM positions given up for want of room
	ReasonBudget    // S: copies over budget
	ReasonAcked     // S: the remote has acknowledged the copy
	ReasonVoid      // S: a checkpoint made the copy void
	// Added later.
	ReasonDatagram   // checkpoint: a datagram that the SVM did not transmit
	ReasonICMPError  // an ICMP error that the SVM did not transmit
	ReasonCrowded    // no room for a datagram or its record
	ReasonUnmatched  // a datagram of the SVM that the PVM did not transmit
	ReasonNeigh      // a neighbour request of the SVM that was passed on just now, or one too many
	ReasonHalfOpen   // a half-open connection had to make room (R11)
	ReasonBeforeMark // S: a datagram that the SVM has received as the PVM (R16)
	ReasonNoRoom     // gave up its slot to what others wait for
	ReasonSealed     // checkpoint, or drop: TCP-MD5 or TCP-AO forbid to change what would have to be changed
	ReasonOrder      // checkpoint: on two connections different guests have led for an unusual time (R7)
	ReasonCount
)

var reasonNames = [ReasonCount]string{
	"none", "payload differs", "syn differs", "fin differs", "open differs", "timeout", "table full",
	"svm changed its bytes", "unknown past",
	"duplicate", "malformed", "stray", "superseded", "incarnation", "syn cookie", "old epoch",
	"next epoch overflow", "frozen", "diverged", "no svm ack", "reset", "expired",
	"unmatched rst", "forgotten", "over budget", "acked", "void",
	"datagram differs", "icmp error", "too many datagrams", "unmatched svm datagram", "neighbour requests",
	"half-open evicted", "before mark", "no room", "signed segment", "another order",
}

// Diverges reports whether a checkpoint for this reason is asked for because the guests differ, or
// one does not follow the other.
func (r Reason) Diverges() bool {
	switch r {
	case ReasonPayload, ReasonSYN, ReasonFIN, ReasonOpen, ReasonTimeout, ReasonSVMChanged, ReasonUnknownPast, ReasonDatagram, ReasonSealed, ReasonOrder:
		return true
	}
	return false
}

func (r Reason) String() string {
	if r < ReasonCount {
		return reasonNames[r]
	}
	return "unknown"
}
