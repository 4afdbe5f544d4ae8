// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"slices"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
)

// ipAt is where the IP header of a frame without more than its fixed part is, and its version;
// 0: there is none.
func ipAt(b []byte) (at, version int) {
	for at = 14; len(b) >= at+20; at += 4 {
		switch be.Uint16(b[at-2:]) {
		case 0x800:
			return at, 4
		case 0x86dd:
			if len(b) >= at+40 {
				return at, 6
			}
			return 0, 0
		case 0x8100, 0x88a8:
		default:
			return 0, 0
		}
	}
	return 0, 0
}

// withOptions puts options into a TCP header: those of stacks, with lengths that are off by
// little, or bytes at random.
func withOptions(r *rand.Rand, b []byte) []byte {
	at, version := ipAt(b)
	l4 := at + 40
	if version == 4 {
		l4 = at + int(b[at]&15)*4
	}
	if at == 0 || len(b) < l4+20 {
		return b
	}
	var opts []byte
	for len(opts) < 40 && r.IntN(5) > 0 {
		o := [][]byte{{2, 4, 5, 180}, {1}, {1, 1}, {8, 10, 0, 0, 0, 1, 0, 0, 0, 2}, {5, 10, 0, 0, 0, 1, 0, 0, 0, 2}, {3, 3, 7}, {4, 2}, {30, 12, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, {19, 18}, {29, 4, 0, 0}, {0}, randBytes(r, 4)}[r.IntN(12)]
		if o = bytes.Clone(o); len(o) > 1 && r.IntN(4) == 0 {
			o[1] += byte(r.IntN(5) - 2)
		}
		opts = append(opts, o...)
	}
	opts = append(opts[:min(len(opts), 40)], make([]byte, -min(len(opts), 40)&3)...)
	b = slices.Concat(b[:l4+20], opts, b[l4+20:])
	b[l4+12] = byte(5+len(opts)/4+r.IntN(9)/8)<<4 | b[l4+12]&15
	addLength(b, at, version, len(opts))
	return b
}

// addLength makes the length in the IP header n larger.
func addLength(b []byte, at, version, n int) {
	field := b[at+2:]
	if version == 6 {
		field = b[at+4:]
	}
	be.PutUint16(field, be.Uint16(field)+uint16(n))
}

// withLength has the IP header, or its options, end somewhere else.
func withLength(r *rand.Rand, b []byte) []byte {
	if at, version := ipAt(b); version == 4 && r.IntN(2) == 0 {
		b[at] = 0x40 | byte(r.IntN(16))
	} else if at > 0 {
		addLength(b, at, version, r.IntN(81)-40)
	}
	return b
}

// withExtension puts an extension header into an IPv6 packet, whole or with a wrong length.
func withExtension(r *rand.Rand, b []byte) []byte {
	at, version := ipAt(b)
	if version != 6 {
		return b
	}
	n := 8 * (1 + r.IntN(3))
	ext := append([]byte{b[at+6], byte(n/8 - 1), 1, byte(n - 4)}, make([]byte, n-4)...)
	if b[at+6] = []byte{0, 43, 44, 60}[r.IntN(4)]; b[at+6] == 44 {
		ext = []byte{ext[0], 0, 0, byte(r.IntN(3)), 1, 2, 3, 4}
	} else if r.IntN(6) == 0 {
		ext[1] += byte(1 + r.IntN(20))
	}
	addLength(b, at, version, len(ext))
	return slices.Concat(b[:at+40], ext, b[at+40:])
}

// spoiled is frame cut, stretched, tagged, with other options, lengths or headers, or with
// some bytes changed; long enough for PROG_TEST_RUN, which wants IP headers whole.
func spoiled(r *rand.Rand, frame []byte) []byte {
	b := bytes.Clone(frame)
	for range r.IntN(4) {
		switch r.IntN(11) {
		case 7:
			b = withOptions(r, b)
		case 8:
			b = withLength(r, b)
		case 9:
			b = withExtension(r, b)
		case 10: // a priority tag, or a second one
			b = tagged(b, uint16(r.IntN(8))<<13)
		case 0:
			b = b[:14+r.IntN(len(b)-13)]
		case 1:
			b = append(b, randBytes(r, r.IntN(60))...)
		case 2:
			b = tagged(b, uint16(r.Uint32()))
		case 3: // lengths, protocols, flags
			if len(b) > 16 {
				b[14+r.IntN(min(len(b)-14, 10))] = byte(r.Uint32())
			}
		case 4:
			be.PutUint16(b[12:], []uint16{0x800, 0x86dd, 0x806, 0x8100, 0x88a8, 0x88b5, 0x88cc, 60, 0x9000}[r.IntN(9)])
		default:
			b[r.IntN(min(len(b), 20+r.IntN(200)))] ^= 1 << r.IntN(8)
		}
	}
	shortest := 14
	switch be.Uint16(b[12:]) {
	case 0x800:
		shortest = 34
	case 0x86dd:
		shortest = 54
	}
	return append(b, make([]byte, max(shortest-len(b), 0))...)
}

// modelled is what the model makes of a frame of the guest: what it is, and how it leaves.
type modelled struct {
	bpfmodel.Segment
	class bpfmodel.Class
}

func model(frame []byte, toGuest bool) (m modelled) {
	m.class = m.Parse(bytes.Clone(frame), toGuest)
	if m.class == bpfmodel.ClassTCP {
		m.StripMPTCP()
	}
	return m
}

// ruled: is the frame one that the fuzz has a primary-only rule for?
func (m *modelled) ruled() bool {
	return m.class == bpfmodel.ClassDatagram && m.Proto == 17 && m.GuestPort == gport
}

// mayLeave: is the frame one that leaves from the PVM without comparison?
func (m *modelled) mayLeave() bool { return m.class == bpfmodel.ClassLink || m.ruled() }

// reasons are those for which ls_pri_out, holding, or ls_sec_out, running, may let the frame go
// or drop it, by the model.
func (m *modelled) reasons(primary bool) []string {
	switch {
	case m.class == bpfmodel.ClassMalformed:
		return []string{"malformed"}
	case m.class == bpfmodel.ClassTCP && primary:
		return []string{"held", "held_ack", "announced"}
	case m.class == bpfmodel.ClassTCP:
		return []string{"record_out", "pending"}
	case m.ruled():
		return []string{map[bool]string{true: "primary_only", false: "svm_only"}[primary]}
	case m.class == bpfmodel.ClassDatagram && primary:
		return []string{"held"}
	case m.class == bpfmodel.ClassDatagram:
		return []string{"record_out"}
	case primary:
		return []string{"passed"}
	case m.Asks:
		return []string{"neigh_out"}
	}
	return []string{"svm_only"}
}

// differs names what the event has otherwise than the model; "": nothing. sum is the digest's.
func (m *modelled) differs(ev *bpf.LockstepLsEv, sum func(uint32, []byte) [2]uint64) string {
	t := bpf.LockstepLsTuple{Guest: m.Guest, Remote: m.Remote, Gport: m.GuestPort, Rport: m.RemotePort, Vlan: m.VLAN, Vlan2: m.VLAN2, Proto: m.Proto}
	seq := m.Pos
	if m.class == bpfmodel.ClassTCP {
		seq = m.TCP().Seq()
	}
	switch {
	case m.class != bpfmodel.ClassTCP && !m.Datagram:
		return "event"
	case ev.T != t:
		return "tuple"
	case int(ev.L3Off) != m.L3 || int(ev.L4Off) != m.L4 || int(ev.PayOff) != m.Pay || int(ev.Paylen) != m.End-m.Pay:
		return "offsets"
	case ev.Seq != seq || ev.Frag != m.Frag:
		return "position"
	case m.Datagram && (m.Proto == 1 || m.Proto == 58):
		return "" // an error's digest leaves the quoted checksum out
	case ev.Type == uint32(bpf.LockstepLsEvTypeLS_EV_PVM) && ev.GsoSize != 0 && m.class == bpfmodel.ClassTCP:
		if ev.Sum != [2]uint64{} { // user space digests it
			return "sum"
		}
	case ev.Sum != sum(m.PayloadPos(), m.Payload()):
		return "sum"
	}
	return ""
}
