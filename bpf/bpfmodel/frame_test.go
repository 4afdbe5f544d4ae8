// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"encoding/binary"
	"flag"
	"os"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
)

// More than rapid's 100 random sequences a test, unless the command line says.
func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "500"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

const (
	fin  = bpfmodel.FIN
	syn  = bpfmodel.SYN
	rst  = bpfmodel.RST
	psh  = bpfmodel.PSH
	ackF = bpfmodel.ACK
)

// seg describes a segment; bytes makes the frame.
type seg struct {
	flow     flow
	toGuest  bool
	seq, ack uint32
	flags    bpfmodel.Flags
	win      uint16
	opts     []byte
	payload  []byte
}

// flow is a connection's addresses and how its frames are wrapped.
type flow struct {
	v6           bool
	guest, rem   byte // last byte of the addresses
	gport, rport uint16
	tci          uint16
	ipOpts       int // bytes of IPv4 options
	pad          int // bytes of Ethernet padding
}

func (f flow) addr(last byte) (a [16]byte) {
	if f.v6 {
		return [16]byte{0x20, 1, 0xd, 0xb8, 15: last}
	}
	return [16]byte{10: 0xff, 0xff, 192, 0, 2, last}
}

func (f flow) tuple() bpfmodel.Tuple {
	return bpfmodel.Tuple{
		Guest: f.addr(f.guest), Remote: f.addr(f.rem),
		GuestPort: f.gport, RemotePort: f.rport, VLAN: f.tci & 0xfff, Proto: 6,
	}
}

var be = binary.BigEndian

func (s seg) bytes() []byte {
	src, dst, sport, dport := s.flow.guest, s.flow.rem, s.flow.gport, s.flow.rport
	if s.toGuest {
		src, dst, sport, dport = dst, src, dport, sport
	}
	opts := slices.Clone(s.opts)
	for len(opts)%4 != 0 {
		opts = append(opts, 0)
	}
	tcp := make([]byte, 20, 20+len(opts)+len(s.payload))
	be.PutUint16(tcp[0:], sport)
	be.PutUint16(tcp[2:], dport)
	be.PutUint32(tcp[4:], s.seq)
	be.PutUint32(tcp[8:], s.ack)
	tcp[12] = byte(5+len(opts)/4) << 4
	tcp[13] = byte(s.flags)
	be.PutUint16(tcp[14:], s.win)
	tcp = append(append(tcp, opts...), s.payload...)

	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0}
	a, b := s.flow.addr(src), s.flow.addr(dst)
	if s.flow.v6 {
		frame[12], frame[13] = 0x86, 0xdd
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, 6, 64
		be.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], a[:])
		copy(ip[24:], b[:])
		frame = append(frame, ip...)
	} else {
		ip := make([]byte, 20+s.flow.ipOpts)
		for i := 20; i < len(ip); i++ {
			ip[i] = 1 // no operation
		}
		ip[0], ip[8], ip[9] = 0x40|byte(len(ip)/4), 64, 6
		be.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
		copy(ip[12:], a[12:])
		copy(ip[16:], b[12:])
		be.PutUint16(ip[10:], ^fullSum(0, ip))
		frame = append(frame, ip...)
	}
	be.PutUint16(tcp[16:], tcpSum(a, b, tcp))
	frame = append(frame, tcp...)
	for i := range s.flow.pad {
		frame = append(frame, byte(0xa0+i))
	}
	return frame
}

// fullSum is the one's complement sum of b (RFC 1071).
func fullSum(sum uint64, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint64(be.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// tcpSum is the checksum of a whole segment whose checksum field is 0. The
// mapped prefix of IPv4 addresses cancels out: it is ffff once for each.
func tcpSum(src, dst [16]byte, tcp []byte) uint16 {
	sum := uint64(6 + len(tcp))
	sum += uint64(fullSum(0, src[:])) + uint64(fullSum(0, dst[:]))
	return ^fullSum(sum, tcp)
}

func parse(t rapid.TB, f flow, frame []byte, toGuest bool) *bpfmodel.Segment {
	t.Helper()
	s := &bpfmodel.Segment{TCI: f.tci}
	if c := s.Parse(frame, toGuest); c != bpfmodel.ClassTCP {
		t.Fatalf("class %v of % x", c, frame)
	}
	return s
}

// Options as the sender wrote them.

func tsOpt(val, ecr uint32) []byte {
	return be.AppendUint32(be.AppendUint32([]byte{8, 10}, val), ecr)
}

func sackOpt(edges ...uint32) []byte {
	o := []byte{5, byte(2 + 4*len(edges))}
	for _, e := range edges {
		o = be.AppendUint32(o, e)
	}
	return o
}

// edge draws numbers that are as often close to a wrap as anywhere.
func edge() *rapid.Generator[uint32] {
	return rapid.OneOf(
		rapid.Uint32(),
		rapid.Uint32Range(0, 8),
		rapid.Uint32Range(1<<32-3000, 1<<32-1),
		rapid.Uint32Range(1<<31-2, 1<<31+2),
	)
}

func drawFlow(t *rapid.T) flow {
	f := flow{
		v6:    rapid.Bool().Draw(t, "v6"),
		guest: rapid.Byte().Draw(t, "guest"), rem: rapid.Byte().Draw(t, "remote"),
		gport: rapid.Uint16().Draw(t, "gport"), rport: rapid.Uint16().Draw(t, "rport"),
		tci: rapid.SampledFrom([]uint16{0, 0, 0xe000, 0x2005, 4094}).Draw(t, "tci"),
		pad: rapid.IntRange(0, 6).Draw(t, "pad"),
	}
	if !f.v6 {
		f.ipOpts = rapid.SampledFrom([]int{0, 0, 4, 40}).Draw(t, "ipopts")
	}
	return f
}

// Parsing never fails otherwise than by class, and what it calls TCP is inside
// the frame.
func TestParseAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		frame := seg{flow: drawFlow(t), flags: ackF, opts: tsOpt(1, 2), payload: make([]byte, 9)}.bytes()
		for range rapid.IntRange(0, 4).Draw(t, "flips") {
			frame[rapid.IntRange(0, len(frame)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
		}
		frame = frame[:rapid.IntRange(0, len(frame)).Draw(t, "cut")]
		var s bpfmodel.Segment
		if s.Parse(frame, false) == bpfmodel.ClassTCP {
			if h := s.TCP(); len(h) < 20 || len(h) != h.Len() || len(h)+len(s.Payload()) > len(frame) {
				t.Fatalf("header %d, payload %d of %d", len(h), len(s.Payload()), len(frame))
			}
			bpfmodel.New(1, 1, 1).Outbound(&s, 0, new(bpfmodel.Record))
		}
	})
}

func TestParse(t *testing.T) {
	v4, v6 := flow{guest: 1, rem: 2, ipOpts: 4}, flow{v6: true, guest: 1, rem: 2}
	base := func(f flow) []byte { return seg{flow: f, flags: ackF, payload: make([]byte, 3)}.bytes() }
	for _, tc := range []struct {
		name string
		flow flow
		edit func([]byte) []byte
		want bpfmodel.Class
	}{
		{"ipv4", v4, nil, bpfmodel.ClassTCP},
		{"ipv6", v6, nil, bpfmodel.ClassTCP},
		{"short Ethernet", v4, func(b []byte) []byte { return b[:13] }, bpfmodel.ClassMalformed},
		{"short IPv4", v4, func(b []byte) []byte { return b[:33] }, bpfmodel.ClassMalformed},
		{"short IPv6", v6, func(b []byte) []byte { return b[:53] }, bpfmodel.ClassMalformed},
		{"cut payload", v6, func(b []byte) []byte { return b[:len(b)-1] }, bpfmodel.ClassMalformed},
		{"arp", v4, func(b []byte) []byte { b[13] = 6; return b }, bpfmodel.ClassLink},
		{"RARP", v4, func(b []byte) []byte { b[12], b[13] = 0x80, 0x35; return b }, bpfmodel.ClassLink},
		{"IGMP", v4, func(b []byte) []byte { b[23] = 2; return b }, bpfmodel.ClassLink},
		{"MLD", v6, func(b []byte) []byte { b[20], b[54] = 58, 143; return b }, bpfmodel.ClassLink},
		{"tag", v4, func(b []byte) []byte { return slices.Insert(b, 12, 0x81, 0, 0, 5) }, bpfmodel.ClassTCP},
		{"two tags", v4, func(b []byte) []byte { return slices.Insert(b, 12, 0x88, 0xa8, 0, 5, 0x81, 0, 0, 6) }, bpfmodel.ClassTCP},
		{"LLC", v4, func(b []byte) []byte { b[12], b[13] = 0, 9; return b }, bpfmodel.ClassDatagram},
		{"LLC cut", v4, func(b []byte) []byte { b[12], b[13] = 5, 0; return b }, bpfmodel.ClassMalformed},
		{"extension header", v6, func(b []byte) []byte {
			b[20], b[19] = 60, b[19]+8
			return slices.Insert(b, 54, 6, 0, 1, 4, 0, 0, 0, 0)
		}, bpfmodel.ClassTCP},
		{"routed", v6, func(b []byte) []byte {
			b[20], b[19] = 43, b[19]+8
			return slices.Insert(b, 54, 6, 0, 1, 4, 0, 0, 0, 0)
		}, bpfmodel.ClassDatagram},
		{"version", v4, func(b []byte) []byte { b[14] ^= 0x10; return b }, bpfmodel.ClassMalformed},
		{"version 6", v6, func(b []byte) []byte { b[14] ^= 0x10; return b }, bpfmodel.ClassMalformed},
		{"header length", v4, func(b []byte) []byte { b[14] = 0x44; return b }, bpfmodel.ClassMalformed},
		{"total length", v4, func(b []byte) []byte { b[17] = 23; return b }, bpfmodel.ClassMalformed},
		{"udp", v4, func(b []byte) []byte { b[23] = 17; return b }, bpfmodel.ClassDatagram},
		{"udp over IPv6", v6, func(b []byte) []byte { b[20] = 17; return b }, bpfmodel.ClassDatagram},
		{"more fragments", v4, func(b []byte) []byte { b[20] = 0x20; return b }, bpfmodel.ClassDatagram},
		{"last fragment", v4, func(b []byte) []byte { b[21] = 1; return b }, bpfmodel.ClassDatagram},
		{"do not fragment", v4, func(b []byte) []byte { b[20] = 0x40; return b }, bpfmodel.ClassTCP},
		{"no room for TCP", v6, func(b []byte) []byte { b[19] = 19; return b }, bpfmodel.ClassMalformed},
		{"data offset low", v6, func(b []byte) []byte { b[66] = 0x40; return b }, bpfmodel.ClassMalformed},
		{"data offset high", v6, func(b []byte) []byte { b[66] = 0x60; return b }, bpfmodel.ClassMalformed},
	} {
		frame := base(tc.flow)
		if tc.edit != nil {
			frame = tc.edit(frame)
		}
		if got := new(bpfmodel.Segment).Parse(frame, false); got != tc.want {
			t.Errorf("%s: class %v, want %v", tc.name, got, tc.want)
		}
	}
}

// A sum changed step by step is the sum taken anew, at odd offsets too.
func TestChecksum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := seg{
			flow: drawFlow(t), seq: edge().Draw(t, "seq"), ack: edge().Draw(t, "ack"), flags: ackF,
			opts:    append(make([]byte, 0, 40), rapid.SliceOfN(rapid.Byte(), 4, 40).Draw(t, "opts")...),
			payload: rapid.SliceOfN(rapid.Byte(), 0, 9).Draw(t, "payload"),
		}
		frame := s.bytes()
		got := slices.Clone(frame)
		h := parse(t, s.flow, got, s.toGuest).TCP()
		at := 20 + rapid.IntRange(0, len(s.opts)-4).Draw(t, "at")
		n := edge().Draw(t, "n")
		h.Add(at, n, false)
		was := be.Uint32(s.opts[at-20:])
		be.PutUint32(s.opts[at-20:], was+n)
		if want := s.bytes(); !slices.Equal(got, want) {
			t.Fatalf("%d at %d:\n % x\n % x", n, at, got, want)
		}
	})
}
