// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import "github.com/lockstep-ft/lockstep/rewriter"

// Half is an entry of ls_half: the pair, and what the record of the SVM's SYN is made
// from.
type Half struct {
	rewriter.Half
	Win    uint16 // of the SVM's last SYN, with its flags and options
	Flags  Flags
	OptLen uint8
	Opts   [maxOpts]byte
	Last   int64
}

// pair notes that both parts belong together, if they do.
func (h *Half) pair() bool {
	if !h.Paired() {
		return false
	}
	h.UsedPVM, h.UsedSVM = h.ISNPVM, h.ISNSVM
	return true
}

// learnSVM takes the SVM's part from its SYN or SYN|ACK. One with the ISN that is
// known is a retransmission, or a simultaneous open's second SYN: the
// timestamp then stays what the offset was made with.
func (h *Half) learnSVM(tcp TCP, now int64) {
	flags, cli := tcp.Flags(), tcp.Ack()-1
	if h.State&rewriter.HasSVM == 0 || h.ISNSVM != tcp.Seq() ||
		flags&ACK != 0 && h.State&rewriter.Active == 0 && h.CliSVM != cli {
		h.State = h.State&^(rewriter.Active|rewriter.SVMTS|rewriter.Done) | rewriter.HasSVM
		h.ISNSVM, h.CliSVM = tcp.Seq(), 0
		var ok bool
		if h.TSSVM, ok = tcp.Options().tsVal(); ok {
			h.State |= rewriter.SVMTS
		}
	}
	if flags&ACK == 0 {
		h.State |= rewriter.Active
	} else {
		h.CliSVM = cli
	}
	h.Win, h.Flags, h.Last = tcp.Win(), flags, now
	h.OptLen = uint8(copy(h.Opts[:], tcp.Options()))
	clear(h.Opts[h.OptLen:])
}

// learnPVM takes the PVM's part from an announcement in the same way.
func (h *Half) learnPVM(a *Record, now int64) {
	cli := a.Ack - 1
	if h.State&rewriter.HasPVM == 0 || h.ISNPVM != a.Seq ||
		a.Flags&ACK != 0 && h.State&rewriter.PVMActive == 0 && h.CliPVM != cli {
		h.State = h.State&^(rewriter.PVMActive|rewriter.PVMTS) | rewriter.HasPVM
		h.ISNPVM, h.CliPVM = a.Seq, 0
		var ok bool
		if h.TSPVM, ok = a.options().tsVal(); ok {
			h.State |= rewriter.PVMTS
		}
	}
	if a.Flags&ACK == 0 {
		h.State |= rewriter.PVMActive
	} else {
		h.CliPVM = cli
	}
	h.Last = now
}

// ackSpan is how much of a stream an ack may cover to be taken for one: the
// largest window TCP has.
const ackSpan = 1 << 30

// acked reports whether the remote's segment shows that it knows the guest's ISN.
// A RST ends what would begin here, and a SYN|ACK answers an active open only.
func (h *Half) acked(tcp TCP) bool {
	flags := tcp.Flags()
	if h.State&rewriter.Done != 0 || flags&(ACK|RST) != ACK || flags&SYN != 0 && h.State&rewriter.Active == 0 {
		return false
	}
	return tcp.Ack()-h.ISNPVM-1 < ackSpan
}

// echo is what is added to the timestamp that the remote's segment echoes: no guest takes
// an echo of a later time than that of its newest SYN or SYN|ACK.
func (h *Half) echo(tcp TCP, off uint32) uint32 {
	newest, ok := Options(h.Opts[:h.OptLen]).tsVal()
	ecr, has := tcp.Options().tsEcr()
	if !h.Timestamps() || !ok || !has || !after(ecr+off, newest) {
		return off
	}
	return newest - ecr
}

// conn is the connection that h becomes when the remote acks.
func (h *Half) conn(ack uint32) Conn {
	c := h.Conn()
	c.State = h.State & rewriter.Active
	if h.Timestamps() {
		c.State |= rewriter.Timestamps
	}
	c.CliAck = ack
	return c
}

// record makes r the record of the SVM's SYN.
func (h *Half) record(key Tuple, r *Record) {
	*r = Record{
		Tuple: key, Inc: h.ISNPVM, Seq: h.ISNPVM, End: h.ISNPVM + 1, CliAck: h.ISNPVM,
		Win: h.Win, Flags: h.Flags, OptLen: h.OptLen, Opts: h.Opts,
	}
	if h.Flags&ACK != 0 {
		r.Ack = h.CliSVM + 1
	}
	r.options().addTSVal(-h.Offset().TS)
}
