// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"slices"

	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
)

// near draws a position in a stream that begins at one of isns.
func (d *duel) near(isns []uint32, label string) uint32 {
	step := rapid.SampledFrom([]uint32{0, 1, 1, 1, 2, 1000, 1 << 30, 1<<30 + 1, 1 << 31}).Draw(d.T, label+" step")
	return rapid.SampledFrom(isns).Draw(d.T, label) + step
}

// tcpOptions draws options as stacks write them, oddly laid out ones and rubbish.
func (d *duel) tcpOptions() []byte {
	number := func(label string) uint32 { return edge().Draw(d.T, label) }
	ts := func() []byte { return tsOpt(number("tsval"), number("tsecr")) }
	mss, fill := []byte{2, 4, 5, 180}, []byte{1, 1, 1}
	switch rapid.IntRange(0, 6).Draw(d.T, "options") {
	case 6: // MPTCP's, which a SYN loses
		return slices.Concat(mss, fill[:rapid.IntRange(0, 3).Draw(d.T, "fill")], []byte{30, 4, 0, byte(number("key"))}, ts())
	case 0:
		return nil
	case 1:
		return slices.Concat(mss, fill[:1], ts())
	case 2:
		return slices.Concat(fill[:2], ts(), fill[:rapid.IntRange(0, 3).Draw(d.T, "fill")], sackOpt(number("left"), number("right")))
	case 3:
		return slices.Concat(fill[:1], sackOpt(number("a"), number("b"), number("c"), number("d")), ts())
	case 4:
		return slices.Concat(fill[:rapid.IntRange(0, 3).Draw(d.T, "fill")], ts())
	}
	return rapid.SliceOfN(rapid.OneOf(rapid.SampledFrom([]byte{0, 1, 3, 4, 5, 8, 10, 30}), rapid.Byte()), 0, 40).Draw(d.T, "rubbish")
}

// segment draws one between the guest (the SVM) and the remote.
func (d *duel) segment(toGuest bool) seg {
	s := seg{
		flow: rapid.SampledFrom(d.flows).Draw(d.T, "flow"), toGuest: toGuest,
		flags: flagSets.Draw(d.T, "flags"), win: rapid.Uint16().Draw(d.T, "win"),
		opts: d.tcpOptions(),
	}
	if toGuest {
		s.seq, s.ack = d.near(d.cli, "seq"), d.near(d.pvm, "ack")
	} else {
		s.seq, s.ack = d.near(d.svm, "seq"), d.near(d.cli, "ack")
		if s.flags&syn != 0 && rapid.IntRange(0, 9).Draw(d.T, "odd SYN") != 0 {
			s.seq = rapid.SampledFrom(d.svm).Draw(d.T, "isn")
			s.ack = rapid.SampledFrom(d.cli).Draw(d.T, "acked") + 1
		}
		if s.flags&(rst|ackF) == rst|ackF && rapid.Bool().Draw(d.T, "refusal") {
			s.seq = 0
		}
	}
	switch n := rapid.IntRange(0, 9).Draw(d.T, "payload"); {
	case n == 9:
		s.payload = bytes.Repeat([]byte{byte(s.seq), 5, 6}, rapid.IntRange(1, 1100).Draw(d.T, "times"))
	case n > 4:
		s.payload = rapid.SliceOfN(rapid.Byte(), 1, 9).Draw(d.T, "bytes")
	}
	return s
}

// other makes a frame of a segment that is not TCP any more, or that no TCP header
// can be found in: it is the flow's, and must not touch its connection.
func (d *duel) other(toGuest bool) []byte {
	s := d.segment(toGuest)
	frame := s.bytes()
	ip := frame[etherHeader:]
	if !s.flow.v6 {
		switch rapid.IntRange(0, 3).Draw(d.T, "other") {
		case 0:
			ip[9] = rapid.SampledFrom([]byte{1, 2, 17, 47, 50, 132}).Draw(d.T, "protocol")
		case 1: // of a fragment, the first too
			be.PutUint16(ip[6:], rapid.Uint16Range(1, 0x3fff).Draw(d.T, "fragment"))
		case 2:
			arp := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 1}, frame[6:12], ip[12:16], make([]byte, 6), []byte{198, 51, 100, 1})
			frame = append(append(frame[:12:12], 8, 6), arp...)
		case 3:
			be.PutUint16(frame[12:], rapid.Uint16Range(0x600, 0x7ff).Draw(d.T, "ethertype"))
		}
		return frame
	}
	tcp := slices.Clone(ip[40:])
	proto := rapid.SampledFrom([]byte{0, 43, 44, 60, 17, 47, 58}).Draw(d.T, "protocol")
	ip[6] = proto
	var chain []byte
	switch proto {
	case 0, 60: // more headers than are walked
		chain = bytes.Repeat([]byte{60, 0, 1, 4, 0, 0, 0, 0}, 9)
		chain[64] = 6
	case 43:
		chain = []byte{6, 0, 4, 0, 0, 0, 0, 0}
	case 44:
		chain = []byte{6, 0, 0, 0, 1, 2, 3, 4}
		be.PutUint16(chain[2:], 8*rapid.Uint16Range(0, 20).Draw(d.T, "offset")|1)
	case 58:
		tcp = append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 16)...)
	}
	be.PutUint16(ip[4:], uint16(len(chain)+len(tcp)))
	return slices.Concat(frame[:etherHeader+40], chain, tcp)
}

// framed is the frame of s. Where the flow is of a VLAN, or now and then, it has a tag in its
// bytes, PROG_TEST_RUN having none beside them, and now and then a second one, or IPv6 extension
// headers.
func (d *duel) framed(s seg) []byte {
	b := s.bytes()
	if s.flow.v6 && rapid.IntRange(0, 4).Draw(d.T, "extensions") == 0 {
		next, n := rapid.SampledFrom([]byte{0, 60, 44}).Draw(d.T, "extension"), 8
		if next != 44 {
			n *= rapid.IntRange(1, 3).Draw(d.T, "length")
		}
		ext := make([]byte, n) // PadN options; a fragment header of a whole packet
		if ext[0] = b[etherHeader+6]; next != 44 {
			ext[1], ext[2], ext[3] = byte(n/8-1), 1, byte(n-4)
		}
		b[etherHeader+6] = next
		be.PutUint16(b[etherHeader+4:], be.Uint16(b[etherHeader+4:])+uint16(n))
		b = slices.Insert(b, etherHeader+40, ext...)
	}
	tag := func(id uint16) {
		b = slices.Insert(b, 12, be.AppendUint16([]byte{0x81, 0}, id|uint16(rapid.IntRange(0, 15).Draw(d.T, "priority"))<<12)...)
	}
	id := s.flow.tci & 0xfff
	if rapid.IntRange(0, 9).Draw(d.T, "inner tag") == 0 {
		tag(rapid.SampledFrom([]uint16{0, 7}).Draw(d.T, "inner"))
		tag(id)
	} else if id != 0 || rapid.IntRange(0, 9).Draw(d.T, "priority tag") == 0 {
		tag(id)
	}
	return b
}

// damaged spoils a frame now and then.
func (d *duel) damaged(frame []byte) []byte {
	switch rapid.IntRange(0, 19).Draw(d.T, "damage") {
	case 0:
		const shortest = etherHeader + 40 // PROG_TEST_RUN wants an IP header whole
		return frame[:rapid.IntRange(shortest, len(frame)).Draw(d.T, "cut")]
	case 1:
		at := rapid.IntRange(12, len(frame)-1).Draw(d.T, "at")
		frame[at] ^= 1 << rapid.IntRange(0, 7).Draw(d.T, "bit")
	}
	return frame
}

// guestSyn draws a guest's SYN or SYN|ACK.
func (d *duel) guestSyn(f flow, flags bpfmodel.Flags, isns []uint32) seg {
	s := seg{flow: f, seq: rapid.SampledFrom(isns).Draw(d.T, "isn"), flags: flags, opts: d.tcpOptions()}
	if flags&ackF != 0 {
		s.ack = rapid.SampledFrom(d.cli).Draw(d.T, "isn cli") + 1
	}
	return s
}

func (d *duel) announceSyn(f flow, flags bpfmodel.Flags) {
	s := d.guestSyn(f, flags, d.pvm)
	a := bpfmodel.Record{Tuple: f.tuple(), Seq: s.seq, Ack: s.ack, Flags: flags}
	a.OptLen = uint8(copy(a.Opts[:], s.opts))
	d.announce(&a)
}

// open goes through a handshake that is likely to succeed.
func (d *duel) open() {
	f := rapid.SampledFrom(d.flows).Draw(d.T, "flow")
	flags, answer := syn|ackF, ackF
	if rapid.Bool().Draw(d.T, "active") {
		flags, answer = syn, syn|ackF
	}
	if announced := rapid.Bool().Draw(d.T, "announced first"); announced {
		d.announceSyn(f, flags)
		d.outbound(d.framed(d.guestSyn(f, flags, d.svm)))
	} else {
		d.outbound(d.framed(d.guestSyn(f, flags, d.svm)))
		d.announceSyn(f, flags)
	}
	ack := rapid.SampledFrom(d.pvm).Draw(d.T, "acked") + 1
	d.inbound(d.framed(seg{flow: f, toGuest: true, seq: d.cli[0] + 1, ack: ack, flags: answer, opts: d.tcpOptions()}))
}

// icmpError: an error for the guest, or of it, that quotes a segment which went the
// other way, or a part of it.
func (d *duel) icmpError(toGuest, alone bool) {
	s := d.segment(!toGuest)
	whole := s.bytes()
	quoted := whole[etherHeader : len(whole)-s.flow.pad]
	quoted = quoted[:rapid.IntRange(0, len(quoted)).Draw(d.T, "quoted")]
	if rapid.IntRange(0, 9).Draw(d.T, "spoil") == 0 && len(quoted) > 0 {
		quoted[rapid.IntRange(0, len(quoted)-1).Draw(d.T, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(d.T, "bit")
	}
	types := []byte{0, 3, 4, 5, 8, 11, 12}
	if s.flow.v6 {
		types = []byte{1, 2, 3, 4, 127, 128}
	}
	icmp := append([]byte{rapid.SampledFrom(types).Draw(d.T, "type"), 4, 0x12, 0x34, 0, 0, 5, 0xdc}, quoted...)
	f := s.flow
	src, dst := byte(77), f.guest
	if !toGuest {
		src, dst = dst, src
	}
	frame := seg{flow: flow{v6: f.v6, guest: src, rem: dst, ipOpts: f.ipOpts}}.bytes()
	ip := frame[etherHeader : len(frame)-20]
	if f.v6 {
		ip[6] = 58
		be.PutUint16(ip[4:], uint16(len(icmp)))
	} else {
		ip[9] = 1
		be.PutUint16(ip[2:], uint16(len(ip)+len(icmp)))
	}
	frame = append(frame[:etherHeader+len(ip)], icmp...)

	prog, mode := d.k.LsSecIn, bpf.LockstepLsModeLS_MODE_RUN
	switch {
	case alone && toGuest:
		prog, mode = d.k.LsSecGate, bpf.LockstepLsModeLS_MODE_SOLO
	case alone:
		prog, mode = d.k.LsSecOut, bpf.LockstepLsModeLS_MODE_SOLO
	case !toGuest:
		prog = d.k.LsSecOut
	}
	d.k.mode(d.T, mode)
	d.pass("ICMP error", prog, frame)
	d.k.mode(d.T, bpf.LockstepLsModeLS_MODE_RUN)
	var e bpfmodel.ICMPError
	is := e.Parse(d.changed, toGuest)
	if is {
		d.tab.Error(&e, toGuest, alone)
	}
	switch {
	case alone:
		d.judge(next, "passed")
		d.sameBytes("frame", d.out, d.changed)
	case toGuest:
		d.judge(redirect, "delivered")
		d.sameBytes("frame", d.out, d.changed)
	default:
		d.judge(redirect, "record_out")
		r, _ := d.k.record(d.T, bpf.LockstepLsRecTypeLS_REC_DGRAM, d.out)
		pay := d.changed[etherHeader+len(ip)+4:]
		if is {
			e.ClearChecksum()
		}
		d.expect("sum", compare.Sum(r.Sum), d.k.digest.Sum(4, pay))
	}
}
