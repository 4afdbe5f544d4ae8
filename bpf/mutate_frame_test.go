// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"slices"

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

// withoutMPTCP is frame as the model has it leave: a SYN loses MPTCP's option (R9), whatever
// tags and headers stand before TCP. The model knows plain frames only.
func withoutMPTCP(frame []byte) []byte {
	at, version := ipAt(frame)
	if at == 0 {
		return frame
	}
	l4, end, proto := at+int(frame[at]&15)*4, at+int(be.Uint16(frame[at+2:])), frame[at+9]
	if version == 6 {
		l4, end, proto = at+40, at+40+int(be.Uint16(frame[at+4:])), frame[at+6]
		for slices.Contains([]byte{0, 44, 60}, proto) && len(frame) >= l4+8 {
			n := 8
			if proto != 44 {
				n += 8 * int(frame[l4+1])
			}
			proto, l4 = frame[l4], l4+n
		}
	}
	if proto != 6 || l4 > end || end > len(frame) {
		return frame
	}
	plain := slices.Concat(frame[:12], frame[at-2:l4], frame[l4:end])
	if version == 6 {
		plain = slices.Concat(frame[:12], frame[at-2:at+40], frame[l4:end])
		plain[14+6] = 6
		be.PutUint16(plain[14+4:], uint16(end-l4))
	}
	var s bpfmodel.Segment
	if s.Parse(plain) != bpfmodel.ClassTCP {
		return frame
	}
	bpfmodel.New(1, 1).Alone(&s, true, 1)
	return slices.Concat(frame[:l4], plain[len(plain)-(end-l4):], frame[end:])
}
