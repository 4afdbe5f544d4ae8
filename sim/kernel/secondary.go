// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// neighOff is where a solicitation's record is put: behind its checksum.
const neighOff = 128

// reasons are those of the table's verdicts.
var reasons = map[bpfmodel.Verdict]bpf.LockstepLsReason{
	bpfmodel.Delivered: bpf.LockstepLsReasonLS_R_delivered,
	bpfmodel.RecordOut: bpf.LockstepLsReasonLS_R_recordOut,
	bpfmodel.RecordIn:  bpf.LockstepLsReasonLS_R_recordIn,
	bpfmodel.Pending:   bpf.LockstepLsReasonLS_R_pending,
	bpfmodel.ConnFull:  bpf.LockstepLsReasonLS_R_connFull,
}

// secIn is bpf/sec_in.bpf.c: mirrored frames, and P's records.
func (m *machine) secIn(b []byte) {
	mode := m.mode()
	park := mode == bpf.LockstepLsModeLS_MODE_PARK
	switch {
	case !park && mode != bpf.LockstepLsModeLS_MODE_RUN:
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	case isPeerFrame(b):
		m.secRecord(b)
		return
	case len(b) < etherLen || isFrom(b, m.conf.PeerMac): // of P's own network stack
		m.count(bpf.LockstepLsReasonLS_R_peerJunk)
		return
	case park:
		m.count(m.park(b))
		return
	}
	why := m.deliver(b)
	m.count(why)
	if why == bpf.LockstepLsReasonLS_R_delivered {
		m.gate(b, mirrored)
	}
}

// deliver makes a mirrored frame one for the SVM, in place.
func (m *machine) deliver(b []byte) bpf.LockstepLsReason {
	switch p := &m.p; p.Parse(b, true) {
	case bpfmodel.ClassTCP:
		return reasons[m.table.Inbound(p, m.host.Now())]
	case bpfmodel.ClassDatagram:
		if m.quote.Find(p, true) {
			m.table.Error(&m.quote, true, false)
		}
	}
	return bpf.LockstepLsReasonLS_R_delivered
}

// park keeps mirrored input. What does not parse is kept too: the guest decides.
func (m *machine) park(b []byte) bpf.LockstepLsReason {
	p := &m.p
	tcp := p.Parse(b, true) == bpfmodel.ClassTCP
	if tcp && p.TCP().Flags()&bpfmodel.SYN != 0 && m.crowded() {
		return bpf.LockstepLsReasonLS_R_crowded
	}
	e := m.event(b, 0, p, tcp, bpf.LockstepLsEvTypeLS_EV_PARK)
	if e == nil {
		return bpf.LockstepLsReasonLS_R_noRing
	}
	why := m.keep(b, p, tcp, e.frame())
	if why != bpf.LockstepLsReasonLS_R_held {
		e.discarded = true
		return why
	}
	return bpf.LockstepLsReasonLS_R_parked
}

// secRecord takes a record of P's.
func (m *machine) secRecord(b []byte) {
	why, off := m.check(b, dirP2S)
	if why == bpf.LockstepLsReasonLS_R_recordIn {
		why, _ = m.replay()
	}
	if why != bpf.LockstepLsReasonLS_R_recordIn {
		m.count(why)
		return
	}
	switch bpf.LockstepLsRecType(m.rec.Type) {
	case bpf.LockstepLsRecTypeLS_REC_ANNOUNCE:
		m.announced(b, off)
		return
	case bpf.LockstepLsRecTypeLS_REC_NACK:
		m.resend(b, off)
		return
	case bpf.LockstepLsRecTypeLS_REC_ECHO: // R20: it proves that S was not taking over
		asked := m.rec.Sum[0]
		m.conf.Echoed = uint64(m.host.Now())
		m.begin(bpf.LockstepLsRecTypeLS_REC_ECHO, dirS2P).Sum[0] = asked
		m.count(bpf.LockstepLsReasonLS_R_echoOut)
		m.send(b, off)
		return
	}
	if !m.report(0) {
		why = bpf.LockstepLsReasonLS_R_noRing
	}
	m.count(why)
}

// announced takes in the PVM's SYN (R9).
func (m *machine) announced(b []byte, off int) {
	r := &m.rec
	a := bpfmodel.Record{
		Tuple: core.FromTuple(&r.T), Seq: r.Seq, Ack: r.Ack, Flags: bpfmodel.Flags(r.TcpFlags), OptLen: r.Optlen, Opts: r.Opts,
	}
	v, sent := m.table.Announce(&a, m.host.Now(), &m.modeled)
	if sent && m.mode() == bpf.LockstepLsModeLS_MODE_PARK { // the SVM's SYN is void once it is the PVM's copy
		v, sent = bpfmodel.RecordIn, false
	}
	m.count(reasons[v])
	if sent {
		m.begin(bpf.LockstepLsRecTypeLS_REC_DATA, dirS2P)
		m.fill(&m.modeled)
		m.send(b, off)
	}
}

// secOut is bpf/sec_out.bpf.c: the SVM's output becomes records.
func (m *machine) secOut(b []byte, gso uint16, from mark) {
	mode := m.mode()
	quiet := mode == bpf.LockstepLsModeLS_MODE_QUIET
	switch {
	case mode == bpf.LockstepLsModeLS_MODE_SOLO:
		m.secSolo(b, gso, from)
		return
	case from == released, !quiet && mode != bpf.LockstepLsModeLS_MODE_RUN:
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	}
	p := &m.p
	class := p.Parse(b, false)
	switch {
	case quiet && class != bpfmodel.ClassTCP:
		m.count(bpf.LockstepLsReasonLS_R_shut)
	case class == bpfmodel.ClassTCP:
		m.secTCP(b, gso, p, quiet)
	case class == bpfmodel.ClassMalformed:
		m.count(bpf.LockstepLsReasonLS_R_malformed)
	case class == bpfmodel.ClassDatagram && !m.primaryOnly(p):
		m.secDatagram(b, p)
	case class == bpfmodel.ClassLink && p.Asks: // P asks in the guest's name
		r := m.begin(bpf.LockstepLsRecTypeLS_REC_NEIGH, dirS2P)
		r.T, r.Optlen = core.ToTuple(p.Tuple), uint8(copy(r.Opts[:], b[6:12]))
		m.count(bpf.LockstepLsReasonLS_R_neighOut)
		m.send(b, neighOff)
	default:
		m.count(bpf.LockstepLsReasonLS_R_svmOnly)
	}
}

func (m *machine) secTCP(b []byte, gso uint16, p *bpfmodel.Segment, quiet bool) {
	t := &m.modeled
	v, sent := m.table.Outbound(p, m.host.Now(), t)
	why := reasons[v]
	if !sent {
		m.count(why)
		return
	}
	r := m.begin(bpf.LockstepLsRecTypeLS_REC_DATA, dirS2P)
	m.fill(t)
	step := stride(gso, p.End-p.Pay)
	sum, bounds := m.digest(p, step)
	r.Sum, r.Nsum = sum, uint16(bounds)
	if bounds > 0 {
		r.Stride = uint32(step)
	}
	if p.Pay < p.End && !m.copied(b, gso, p, t, sum) && v == bpfmodel.RecordOut {
		why = bpf.LockstepLsReasonLS_R_copyLost
	}
	if quiet {
		m.count(bpf.LockstepLsReasonLS_R_shut)
		return
	}
	m.count(why)
	m.send(b, recOff(p))
}

// copied keeps a copy for R5 and R22.
func (m *machine) copied(b []byte, gso uint16, p *bpfmodel.Segment, t *bpfmodel.Record, sum [2]uint64) bool {
	e := m.event(b, gso, p, true, bpf.LockstepLsEvTypeLS_EV_COPY)
	if e == nil {
		return false
	}
	ev := e.frame()
	ev.Inc, ev.CliAck, ev.Sum = t.Inc, t.CliAck, sum
	if t.Inherited {
		ev.Flags |= uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED)
	}
	e.discarded = m.keep(b, p, true, ev) != bpf.LockstepLsReasonLS_R_held
	return !e.discarded
}

func (m *machine) secDatagram(b []byte, p *bpfmodel.Segment) {
	quotes := m.quote.Find(p, false)
	if quotes {
		m.table.Error(&m.quote, false, false)
	}
	r := m.begin(bpf.LockstepLsRecTypeLS_REC_DGRAM, dirS2P)
	r.T = core.ToTuple(p.Tuple)
	r.Seq, r.End, r.Frag = p.Pos, p.Pos+uint32(p.End-p.Pay), p.Frag
	r.Sum = m.digestDatagram(p, quotes)
	m.count(bpf.LockstepLsReasonLS_R_recordOut)
	m.send(b, recOff(p))
}

// secSolo is the output of an SVM that took over.
func (m *machine) secSolo(b []byte, gso uint16, from mark) {
	if !m.leased() {
		m.count(bpf.LockstepLsReasonLS_R_muted)
		return
	}
	why := bpf.LockstepLsReasonLS_R_passed
	if from == released {
		why = bpf.LockstepLsReasonLS_R_releasedOut
	}
	switch p := &m.p; p.Parse(b, false) {
	case bpfmodel.ClassTCP:
		if !m.table.Alone(p, false, from == released, m.host.Now()) {
			m.inDoubt(p)
			return
		}
	case bpfmodel.ClassDatagram:
		if m.quote.Find(p, false) {
			m.table.Error(&m.quote, false, true)
		}
	}
	m.count(why)
	m.leave(b, gso)
}

// inDoubt: the guest's segment does not leave.
func (m *machine) inDoubt(p *bpfmodel.Segment) {
	m.count(bpf.LockstepLsReasonLS_R_inDoubt)
	if m.host.InDoubt != nil {
		m.host.InDoubt(p.Tuple)
	}
}

// gate is bpf/sec_gate.bpf.c: only mirrored frames reach the SVM, until it took over.
func (m *machine) gate(b []byte, from mark) {
	mode := m.mode()
	if from == parked && (mode == bpf.LockstepLsModeLS_MODE_RUN || mode == bpf.LockstepLsModeLS_MODE_PARK) {
		if why := m.deliver(b); why != bpf.LockstepLsReasonLS_R_delivered {
			m.count(why)
			return
		}
		from = mirrored
	}
	switch {
	case from == mirrored && mode != bpf.LockstepLsModeLS_MODE_SHUT && mode != bpf.LockstepLsModeLS_MODE_QUIET:
		m.count(bpf.LockstepLsReasonLS_R_letIn)
	case mode != bpf.LockstepLsModeLS_MODE_SOLO:
		m.count(bpf.LockstepLsReasonLS_R_gated)
		return
	default:
		switch p := &m.p; p.Parse(b, true) {
		case bpfmodel.ClassTCP:
			m.table.Alone(p, true, false, m.host.Now())
		case bpfmodel.ClassDatagram:
			if m.quote.Find(p, true) {
				m.table.Error(&m.quote, true, true)
			}
		}
		m.count(bpf.LockstepLsReasonLS_R_passed)
	}
	m.host.ToGuest(b)
}
