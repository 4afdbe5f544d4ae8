// SPDX-License-Identifier: Apache-2.0

package rewriter

// Half is a connection before its handshake is over: what was learned of both
// guests' SYNs. The PVM's part comes with announcements, the SVM's from what it
// transmits, in any order.
type Half struct {
	State            State
	ISNPVM, ISNSVM   uint32
	CliPVM, CliSVM   uint32 // the remote's ISN as the guests' SYN|ACKs acknowledge it
	TSPVM, TSSVM     uint32 // TSval of the SYNs
	UsedPVM, UsedSVM uint32 // ISNs of the pair made last; 0: none
}

// known reports whether both guests' SYNs are known.
func (h *Half) known() bool { return h.State&(HasPVM|HasSVM) == HasPVM|HasSVM }

// usedPair reports whether both ISNs are those of the pair made last.
func (h *Half) usedPair() bool { return h.ISNPVM == h.UsedPVM && h.ISNSVM == h.UsedSVM }

// Paired reports whether both parts belong to one connection (R9): they were
// paired before, or are active opens of which neither was paired with another, or
// both guests answered the same SYN of the remote.
func (h *Half) Paired() bool {
	const active = Active | PVMActive
	switch {
	case !h.known():
		return false
	case h.usedPair():
		return true
	case h.State&active == active:
		return h.ISNPVM != h.UsedPVM && h.ISNSVM != h.UsedSVM
	}
	return h.CliPVM == h.CliSVM
}

// Timestamps reports whether both guests' SYNs have timestamps.
func (h *Half) Timestamps() bool { return h.State&(PVMTS|SVMTS) == PVMTS|SVMTS }

// Offset is the translation of a pair.
func (h *Half) Offset() Offset {
	off := Offset{Seq: h.ISNSVM - h.ISNPVM}
	if h.Timestamps() {
		off.TS = h.TSSVM - h.TSPVM
	}
	return off
}

// Conn is the connection that a pair becomes.
func (h *Half) Conn() Conn {
	off := h.Offset()
	return Conn{Off: off.Seq, TSOff: off.TS, Inc: h.ISNPVM, ISNSVM: h.ISNSVM, CliAck: h.ISNPVM + 1}
}
