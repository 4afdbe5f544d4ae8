// SPDX-License-Identifier: Apache-2.0

package core

import (
	"encoding/binary"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// Numbers counts the events that have come of the connections that have an entry in ls_fast. As many
// as the kernel has numbered have to have come before it may own one: what is on its way would be missed.
type Numbers struct{ seen map[compare.Tuple]*numbered }

type numbered struct {
	events  uint32
	refused int
}

// NewNumbers knows no connection.
func NewNumbers() *Numbers { return &Numbers{make(map[compare.Tuple]*numbered)} }

// note counts an event.
func (n *Numbers) note(t *bpf.LockstepLsTuple, number uint32) {
	if number == 0 || n == nil {
		return
	}
	if s := n.seen[FromTuple(t)]; s != nil {
		s.events++
	}
}

// Of is how many have come; known: the connection has an entry.
func (n *Numbers) Of(t compare.Tuple) (events uint32, known bool) {
	s := n.seen[t]
	if s == nil {
		return 0, false
	}
	return s.events, true
}

// Begin and End: the connection has an entry, or none any more.
func (n *Numbers) Begin(t compare.Tuple) { n.seen[t] = new(numbered) }

// End: see Begin.
func (n *Numbers) End(t compare.Tuple) { delete(n.seen, t) }

// EndAll: no connection has an entry any more.
func (n *Numbers) EndAll() { clear(n.seen) }

// maxRefused grants in a row are refused before the entry begins anew: more than an event on its way explains.
const maxRefused = 64

// Refused reports whether so many grants were refused that events must have been lost.
func (n *Numbers) Refused(t compare.Tuple) bool {
	s := n.seen[t]
	if s == nil {
		return false
	}
	s.refused++
	return s.refused >= maxRefused
}

// ToFast is the kernel's state of a connection that is handed over.
func ToFast(h *compare.Handover) bpf.LockstepLsFastState {
	s := bpf.LockstepLsFastState{
		Inc: h.Inc, Released: h.Released, PvmEnd: h.Released, SvmEnd: h.Released,
		TsSent: h.TSSent, TsLast: h.TSLast, Scale: h.Scale, Pvm: toAcked(&h.PVM), Svm: toAcked(&h.SVM), Sent: toAcked(&h.Sent),
	}
	if h.Inherited {
		s.Inherited = uint8(bpf.LockstepLsRecFlagLS_REC_INHERITED)
	}
	if h.TS {
		s.Ts = 1
	}
	if frame, l4 := pureACK(&h.ACK); h.HasPure && frame != nil {
		s.HasPure, s.Pure = 1, h.Pure
		s.TmplLen, s.TmplL4, s.TmplPartial = uint16(copy(s.Tmpl[:], frame)), l4, uint8(bpf.LockstepLsFastTmplLS_FAST_PARTIAL)
	}
	return s
}

// pureACK gives the frame of an ACK, with a partial checksum, and where its TCP header is; nil: the kernel cannot keep
// such a one.
func pureACK(e *compare.Effect) ([]byte, uint16) {
	ports := binary.BigEndian.AppendUint16(nil, e.Tuple.GuestPort)
	ports = binary.BigEndian.AppendUint16(ports, e.Tuple.RemotePort)
	head, ok := BuildHeader(make([]byte, 0, MaxHeader), e.Header[:e.HdrLen], ports, e, 0, 0, 0, 0)
	if !ok {
		return nil, 0
	}
	l4 := binary.LittleEndian.Uint16(head[6:])
	if l4 > uint16(bpf.LockstepLsConstLS_FAST_L4MAX) || len(head)-VnetLen > int(bpf.LockstepLsConstLS_FAST_TMPL) {
		return nil, 0
	}
	return head[VnetLen:], l4
}

const (
	markSYN = uint8(bpf.LockstepLsFastMarkLS_FAST_SYN)
	markFIN = uint8(bpf.LockstepLsFastMarkLS_FAST_FIN_PVM | bpf.LockstepLsFastMarkLS_FAST_FIN_SVM)
)

// Fast is what was taken back: the state, and what waits as events, which own what they point to.
func (d *Decoder) Fast(ctx *bpf.LockstepLsFastCtx, evs []compare.Event) (*compare.Handover, []compare.Event) {
	s := &ctx.S
	h := &compare.Handover{
		Inc: s.Inc, Inherited: s.Inherited != 0, Released: s.Released, Scale: s.Scale, TS: s.Ts != 0, TSSent: s.TsSent, TSLast: s.TsLast,
		HasPure: s.HasPure != 0, Pure: s.Pure, PVM: fromAcked(&s.Pvm), SVM: fromAcked(&s.Svm), Sent: fromAcked(&s.Sent),
		Frames: s.Frames, Bytes: s.Bytes, ACKs: s.Acks, Records: s.Records,
		Waiting: int(s.Nheld) + int(s.Nrecs),
		SYN:     s.Marks&markSYN != 0,
		FIN:     s.Marks&markFIN == markFIN,
	}
	if s.HasPure != 0 {
		h.ACK.HdrLen = uint8(copy(h.ACK.Header[:], s.Tmpl[:min(int(s.TmplL4), len(s.Tmpl))]))
	}
	for i := range s.Held[:min(int(s.Nheld), len(s.Held))] {
		p := &s.Held[i]
		ev := bpf.LockstepLsEv{
			Type: uint32(bpf.LockstepLsEvTypeLS_EV_PVM), Slot: p.Slot, At: p.At, T: ctx.T, Seq: p.Seq, Paylen: p.Paylen, Ack: p.Ack,
			Win: p.Win, TcpFlags: p.TcpFlags, Flags: p.Flags, Sum: p.Sum, L3Off: p.L3Off, L4Off: p.L4Off, PayOff: p.PayOff,
			CsumStart: p.CsumStart, CsumOffset: p.CsumOffset, FrameLen: p.FrameLen,
		}
		ev.HdrLen = uint16(copy(ev.Hdr[:], d.Frames.headers(compare.Slot(p.Slot), int(p.PayOff))))
		evs, _ = d.frameEvent(new(Buffer), bpf.LockstepLsEvTypeLS_EV_PVM, &ev, evs)
	}
	for i := range s.Recs[:min(int(s.Nrecs), len(s.Recs))] {
		r := &s.Recs[i]
		ev := bpf.LockstepLsEvRec{Type: uint32(bpf.LockstepLsEvTypeLS_EV_REC), At: r.At}
		ev.Rec = bpf.LockstepLsRec{
			Type: uint8(bpf.LockstepLsRecTypeLS_REC_DATA), Flags: s.Inherited, T: ctx.T, Inc: s.Inc, Seq: r.Seq, End: r.End, Ack: r.Ack,
			Win: r.Win, TcpFlags: r.TcpFlags, Optlen: r.Optlen, Sum: r.Sum, Epoch: r.Epoch,
		}
		copy(ev.Rec.Opts[:], r.Opts[:])
		evs, _ = new(Buffer).peerRecord(&ev, evs)
	}
	return h, evs
}

func toAcked(a *compare.Acked) bpf.LockstepLsAcked {
	out := bpf.LockstepLsAcked{Ack: a.Ack, Edge: a.Edge, Echo: a.Echo, Win: a.Win}
	if a.Echoes {
		out.Echoes = 1
	}
	return out
}

func fromAcked(a *bpf.LockstepLsAcked) compare.Acked {
	return compare.Acked{Ack: a.Ack, Edge: a.Edge, Echo: a.Echo, Win: a.Win, Echoes: a.Echoes != 0}
}
