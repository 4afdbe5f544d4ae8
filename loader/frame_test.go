// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

var (
	macA = []byte{2, 0, 0, 0, 0, 0xa}
	macB = []byte{2, 0, 0, 0, 0, 0xb}
)

// l2l3 is an Ethernet and IP header for TCP. Lengths and checksum are left wrong:
// core.BuildHeader sets them.
func l2l3(v6 bool, ipOpts int) []byte {
	b := bytes.Join([][]byte{macB, macA}, nil)
	if v6 {
		b = binary.BigEndian.AppendUint16(b, core.EthIPv6)
		b = append(b, 0x60, 0, 0, 0, 0xff, 0xff, core.ProtoTCP, 64)
		b = append(b, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
		return append(b, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
	}
	b = binary.BigEndian.AppendUint16(b, 0x0800)
	b = append(b, byte(0x45+ipOpts/4), 0, 0xff, 0xff, 0x12, 0x34, 0x40, 0, 64, core.ProtoTCP, 0xff, 0xff, 10, 0, 0, 1, 10, 0, 0, 2)
	return append(b, bytes.Repeat([]byte{1}, ipOpts)...) // NOPs
}

// onesSum is the Internet checksum's sum, made the slow way.
func onesSum(parts ...[]byte) uint16 {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	if len(b)%2 != 0 {
		b = append(b, 0)
	}
	sum := 0
	for i := 0; i < len(b); i += 2 {
		sum += int(b[i])<<8 + int(b[i+1])
		if sum > 0xffff {
			sum -= 0xffff
		}
	}
	return uint16(sum)
}

// complete does what a device does with a partial checksum.
func complete(frame []byte, start, off int) {
	binary.BigEndian.PutUint16(frame[start+off:], ^onesSum(frame[start:]))
}

// pseudoHeader is that of the IP header ip and n bytes of TCP.
func pseudoHeader(ip []byte, n int) []byte {
	if ip[0]>>4 == 4 {
		return append(bytes.Clone(ip[12:20]), 0, core.ProtoTCP, byte(n>>8), byte(n))
	}
	return append(bytes.Clone(ip[8:40]), 0, 0, byte(n>>8), byte(n), 0, 0, 0, core.ProtoTCP)
}

func newHead() []byte { return make([]byte, 0, core.MaxHeader) }

func TestBuildHeader(t *testing.T) {
	ts := [40]byte{1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9}
	for _, c := range []struct {
		name            string
		v6              bool
		ipOpts          int
		tci             uint16
		optLen          uint8
		payLen          int
		gso             uint16
		gsoType         byte
		csumStart, head int // from the frame's start; bytes of headers
	}{
		{name: "v4 bare", csumStart: 34, head: 54},
		{name: "v4 payload", payLen: 100, csumStart: 34, head: 54},
		{name: "v6 payload", v6: true, payLen: 100, csumStart: 54, head: 74},
		{name: "v4 IP options", ipOpts: 8, payLen: 1, csumStart: 42, head: 62},
		{name: "v4 timestamps", optLen: 12, payLen: 3, csumStart: 34, head: 66},
		{name: "options padded to words", optLen: 10, csumStart: 34, head: 66},
		{name: "v4 tag", tci: 0x6005, optLen: 12, csumStart: 38, head: 70},
		{name: "v6 tag", v6: true, tci: 5, csumStart: 58, head: 78},
		{name: "v4 GSO", payLen: 5000, gso: 1448, gsoType: core.GSOTCPv4, optLen: 12, csumStart: 34, head: 66},
		{name: "v6 GSO", v6: true, payLen: 5000, gso: 1428, gsoType: core.GSOTCPv6, csumStart: 54, head: 74},
		{name: "v4 GSO tag", tci: 9, payLen: 5000, gso: 1448, gsoType: core.GSOTCPv4, csumStart: 38, head: 58},
		{name: "one segment is no GSO", payLen: 1448, gso: 1448, csumStart: 34, head: 54},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := compare.Effect{Seq: 0x01020304, Ack: 0x05060708, Win: 0x090a, Flags: compare.ACK | compare.PSH, OptLen: c.optLen, Opts: ts}
			clear(e.Opts[c.optLen:])
			in := l2l3(c.v6, c.ipOpts)
			before := bytes.Clone(in)
			out, ok := core.BuildHeader(newHead(), in, []byte{0x30, 0x39, 0, 80}, &e, core.EthVLAN, c.tci, c.payLen, c.gso)
			if !ok {
				t.Fatal("refused")
			}
			if !bytes.Equal(in, before) {
				t.Error("the held frame's own header was changed")
			}
			vh, f := out[:core.VnetLen], out[core.VnetLen:]
			if len(f) != c.head {
				t.Errorf("%d bytes of headers, want %d", len(f), c.head)
			}
			le := binary.LittleEndian.Uint16
			if vh[0] != core.VnetCsum || int(le(vh[6:])) != c.csumStart || le(vh[8:]) != core.TCPCsum {
				t.Errorf("virtio-net header % x: checksum at %d+%d", vh, le(vh[6:]), le(vh[8:]))
			}
			hdrLen, size := uint16(0), uint16(0)
			if c.gsoType != 0 {
				hdrLen, size = uint16(c.head), c.gso
			}
			if vh[1] != c.gsoType || le(vh[2:]) != hdrLen || le(vh[4:]) != size {
				t.Errorf("virtio-net header % x: GSO type %d, header %d, size %d", vh, vh[1], le(vh[2:]), le(vh[4:]))
			}
			if !bytes.Equal(f[:12], in[:12]) {
				t.Errorf("addresses % x", f[:12])
			}
			l3 := core.EthLen
			if c.tci != 0 {
				l3 += 4
				if want := []byte{0x81, 0, byte(c.tci >> 8), byte(c.tci)}; !bytes.Equal(f[12:16], want) {
					t.Errorf("tag % x, want % x", f[12:16], want)
				}
			}
			if !bytes.Equal(f[l3-2:l3], in[12:14]) {
				t.Errorf("ethertype % x", f[l3-2:l3])
			}
			ip, tcp := f[l3:c.csumStart], f[c.csumStart:]
			be := binary.BigEndian.Uint16
			if c.v6 {
				if got, want := int(be(ip[4:])), len(tcp)+c.payLen; got != want {
					t.Errorf("payload length %d, want %d", got, want)
				}
			} else {
				if got, want := int(be(ip[2:])), len(ip)+len(tcp)+c.payLen; got != want {
					t.Errorf("total length %d, want %d", got, want)
				}
				if onesSum(ip) != 0xffff {
					t.Errorf("IP checksum of % x", ip)
				}
			}
			want := []byte{0x30, 0x39, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8, byte(len(tcp)/4) << 4, 0x18, 9, 10}
			if !bytes.Equal(tcp[:16], want) {
				t.Errorf("TCP header % x, want % x", tcp[:16], want)
			}
			if !bytes.Equal(tcp[18:20], []byte{0, 0}) || !bytes.Equal(tcp[20:], e.Opts[:len(tcp)-20]) {
				t.Errorf("urgent pointer and options % x", tcp[18:])
			}
		})
	}
}

func TestBuildHeaderRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		head, l2l3 []byte
	}{
		"short":          {newHead(), l2l3(false, 0)[:33]},
		"v6 cut":         {newHead(), l2l3(true, 0)[:50]},
		"no room":        {make([]byte, 0, 60), l2l3(true, 0)},
		"nothing":        {newHead(), nil},
		"no room at all": {nil, l2l3(false, 0)},
	} {
		if _, ok := core.BuildHeader(c.head, c.l2l3, []byte{0, 1, 0, 2}, &compare.Effect{}, core.EthVLAN, 0, 0, 0); ok {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestBuildHeaderChecksum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var e compare.Effect
		e.Seq, e.Ack = rapid.Uint32().Draw(t, "seq"), rapid.Uint32().Draw(t, "ack")
		e.Win, e.Flags = rapid.Uint16().Draw(t, "win"), compare.Flags(rapid.Uint8().Draw(t, "flags"))
		opts := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "opts")
		e.OptLen = uint8(copy(e.Opts[:], opts))
		in := l2l3(rapid.Bool().Draw(t, "v6"), 4*rapid.IntRange(0, 10).Draw(t, "ip options"))
		for i, b := range rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "address bytes") {
			in[core.EthLen+12+i] = b
		}
		payload := rapid.SliceOfN(rapid.Byte(), 0, 1500).Draw(t, "payload")
		ports := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "ports")
		out, ok := core.BuildHeader(newHead(), in, ports, &e, core.EthVLAN, rapid.Uint16().Draw(t, "tci"), len(payload), 0)
		if !ok {
			t.Fatal("refused")
		}
		start := int(binary.LittleEndian.Uint16(out[6:]))
		f := append(bytes.Clone(out[core.VnetLen:]), payload...)
		complete(f, start, int(binary.LittleEndian.Uint16(out[8:])))
		tcp := f[start:]
		ip := f[start-(len(in)-core.EthLen) : start]
		if onesSum(pseudoHeader(ip, len(tcp)), tcp) != 0xffff {
			t.Errorf("wrong TCP checksum of % x", f)
		}
		if ip[0]>>4 == 4 && onesSum(ip) != 0xffff {
			t.Errorf("wrong IP checksum of % x", ip)
		}
	})
}
