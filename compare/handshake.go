// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"time"
)

const (
	announceFirst = 5 * time.Millisecond
	announceMax   = 200 * time.Millisecond
	announceAgain = 8 // times after a commit
)

// handshake is the PVM's SYN on one connection, what the SVM's was like, and the
// announcements of the one until the other comes (R3, R9).
type handshake struct {
	seen    bool // the PVM's SYN; what follows of it holds
	waiting bool // it has not matched the SVM's: the compared point is the ISN
	isn     uint32
	flags   Flags
	ack     uint32
	opts    options
	at      int64 // capture time

	met     bool   // only when the connection was known in mid-stream: the compared point is beyond it
	svm     bool   // the SVM's SYN was recorded
	svmSame bool   // with the PVM's options and acknowledged number
	differs string // in what, if it is not
	svmWin  uint16

	announcing bool
	left       int // announcements
	delay, due int64
}

// begin notes a new SYN of the PVM.
func (h *handshake) begin(s *Segment, now int64) {
	*h = handshake{seen: true, waiting: true, isn: s.Seq, flags: s.Flags, ack: s.Ack, at: s.At}
	h.opts.set(s.Opts)
	h.announce(now, math.MaxInt)
}

// meet notes the SYN of a connection that is known in mid-stream. Its repetition may leave once the SVM's is known.
func (h *handshake) meet(s *Segment) {
	*h = handshake{seen: true, met: true, isn: s.Seq, flags: s.Flags, ack: s.Ack, at: s.At}
	h.opts.set(s.Opts)
}

// repeated reports whether s is the SYN again, or the answer in a simultaneous open.
func (h *handshake) repeated(s *Segment) bool {
	return h.seen && h.isn == s.Seq && (s.Flags&ACK == 0 || h.flags&ACK == 0 || h.ack == s.Ack)
}

// answersSame reports whether both are SYN|ACKs for one SYN of the remote.
func (h *handshake) answersSame(s *Segment) bool {
	return s.Flags&h.flags&ACK != 0 && h.ack == s.Ack
}

// fromSVM takes in the record of the SVM's SYN. When both ends open at once a SYN turns
// into a SYN|ACK.
func (h *handshake) fromSVM(s *Segment) {
	h.svm, h.svmWin = true, s.Win
	h.svmSame = sameOptions(s.Opts, h.opts.bytes()) && (h.flags&ACK == 0 || s.Flags&ACK != 0 && s.Ack == h.ack)
	if h.differs = ""; !h.svmSame {
		h.differs = synOf(h, s)
	}
}

// announce begins to announce the SYN, so many times.
func (h *handshake) announce(now int64, times int) {
	h.announcing, h.left, h.delay = true, times, int64(announceFirst)
	h.due = now + h.delay
}

// next reports whether it is time for an announcement, and sets the next one.
func (h *handshake) next(now int64) bool {
	if h.due = 0; !h.announcing || h.left == 0 {
		return false
	}
	h.left--
	h.delay = min(2*h.delay, int64(announceMax))
	h.due = now + h.delay
	return true
}

// announced: S knows the SYN.
func (h *handshake) announced() { h.announcing, h.due = false, 0 }

// matched: the SYN is compared, or need not be.
func (h *handshake) matched() { h.waiting = false }

// opened: the kernel has compared both guests' SYN|ACKs, and let the PVM's leave.
func (h *handshake) opened() {
	h.svm, h.svmSame = true, true
	h.matched()
	h.announced()
}

// forgetSVM: the SVM's part begins afresh.
func (h *handshake) forgetSVM() { h.svm, h.svmSame = false, false }

// commit: both guests have the SYN. established: the handshake is over, so that its
// offset needs no announcement; else nothing tells P when it is.
func (h *handshake) commit(established bool) {
	h.matched()
	h.met = false
	h.announcing, h.left = h.seen && !established, announceAgain
}
