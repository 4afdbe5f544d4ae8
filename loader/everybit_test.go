// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// everyOption is a list of TCP options of all kinds that there are names for, by turns:
// no header has room for all.
var everyOption = map[string][]byte{
	"none":             nil,
	"timestamps":       {1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9},
	"SACK":             {1, 1, 5, 10, 0x11, 0x22, 0x33, 0x50, 0x11, 0x22, 0x33, 0x60},
	"MSS, scale, perm": {2, 4, 5, 0xb4, 1, 3, 3, 7, 4, 2, 1, 0},
	"AccECN":           {172, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1},
	"MPTCP":            {30, 12, 0x20, 1, 1, 2, 3, 4, 5, 6, 7, 8},
	"TCP-MD5":          {1, 1, 19, 18, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
	"TCP-AO":           {29, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14},
	"fast open, user":  {34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 28, 4, 0x12, 0x34, 253, 4, 1, 2, 1, 1},
}

// field names a bit of a frame by the header that it is in.
func field(v6 bool, bit int) string {
	type span struct {
		name string
		n    int // bits
	}
	ip := []span{{"version", 4}, {"IHL", 4}, {"DSCP, ECN", 8}, {"total length", 16}, {"ID", 16}, {"reserved, DF", 2}, {"MF, offset", 14},
		{"TTL", 8}, {"protocol", 8}, {"IP checksum", 16}, {"addresses", 64}}
	if v6 {
		ip = []span{{"version", 4}, {"traffic class, flow label", 28}, {"payload length", 16}, {"next header", 8}, {"hop limit", 8}, {"addresses", 256}}
	}
	for _, s := range append(ip, span{"ports", 32}, span{"seq", 32}, span{"ack", 32}, span{"data offset", 4}, span{"reserved", 3}, span{"AE", 1},
		span{"CWR", 1}, span{"ECE", 1}, span{"URG", 1}, span{"ACK", 1}, span{"PSH", 1}, span{"RST", 1}, span{"SYN", 1}, span{"FIN", 1},
		span{"window", 16}, span{"TCP checksum", 16}, span{"urgent pointer", 16}) {
		if bit < s.n {
			return s.name
		}
		bit -= s.n
	}
	return "options"
}

// changes are the fields of which a changed bit is not simply passed on although the SVM
// sends just what the PVM does, and the rule behind it.
var changes = map[string]string{
	"IP checksum":    "computed anew",
	"TCP checksum":   "computed anew",
	"version":        "malformed: dropped",
	"IHL":            "malformed: dropped; or TCP begins elsewhere",
	"total length":   "malformed: dropped; or what follows is padding, which is not kept",
	"payload length": "as total length",
	"data offset":    "malformed: dropped; or payload becomes options",
	"SYN":            "R3: data on a SYN waits for its repetition",
	"RST":            "R3: a RST has no data",
	"PSH":            "R2: nothing is pushed by a pure ACK",
	"ACK":            "R2: a segment without it takes no template, and is dropped",
	"options":        "R2: a SACK block that can be none is blanked",
}

// TestEveryBit: a frame is captured by the kernel, compared and released, with each bit of
// its headers turned in turn. The SVM sends the same. What leaves is what was captured,
// to the bit, but for what a rule has otherwise.
func TestEveryBit(t *testing.T) {
	h := newHosts(t)
	// No firewall of the host is to drop what is wrong, or to keep fragments.
	for _, which := range []string{"iptables", "ip6tables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+which, []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	changed := make(map[string]int)
	for _, v6 := range []bool{false, true} {
		for name, opts := range everyOption {
			for _, pay := range [][]byte{nil, []byte("payload, 20 bytes ok")} {
				frame := segment(v6, 0, 1000, compare.ACK, opts, pay)
				headers := len(frame) - len(pay)
				first := core.EthLen
				if name != "none" && len(pay) > 0 { // the others are no different by their payload
					first = headers - len(opts)
				}
				for bit := first * 8; bit < headers*8; bit++ {
					in := bytes.Clone(frame)
					in[bit/8] ^= 0x80 >> (bit % 8)
					what := field(v6, bit-core.EthLen*8)
					out := h.through(guest, client, in, func(*compare.Segment) {})
					if bytes.Equal(fixed(in), out) {
						continue
					}
					changed[what]++
					if changes[what] == "" {
						t.Errorf("IPv6 %v, %s, %d bytes, %s, bit %d: released\n% x, was\n% x", v6, name, len(pay), what, bit-core.EthLen*8, out, fixed(in))
					}
				}
				if t.Failed() {
					return
				}
			}
		}
	}
	for _, what := range slices.Sorted(maps.Keys(changes)) {
		if changed[what] == 0 && what != "IP checksum" && what != "TCP checksum" {
			t.Errorf("%s: no bit of it was changed: not %q", what, changes[what])
		}
	}
}

// fixed is a frame with the checksums that it should have, if it is TCP.
func fixed(frame []byte) []byte {
	f := bytes.Clone(frame)
	ip := f[core.EthLen:]
	l4, end := 40, 40+int(binary.BigEndian.Uint16(ip[4:]))
	if binary.BigEndian.Uint16(f[12:]) == 0x0800 {
		l4, end = int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
		if ip[9] != core.ProtoTCP || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
			return f
		}
		if l4 > len(ip) || l4 < 20 {
			return f
		}
		binary.BigEndian.PutUint16(ip[10:], 0)
		binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:l4]))
	} else if ip[6] != core.ProtoTCP {
		return f
	}
	if end > len(ip) || end < l4+core.TCPLen {
		return f
	}
	tcp := ip[l4:end]
	binary.BigEndian.PutUint16(tcp[core.TCPCsum:], 0)
	binary.BigEndian.PutUint16(tcp[core.TCPCsum:], ^onesSum(pseudoHeader(ip, len(tcp)), tcp))
	return f
}

// TestChangedBits: where the SVM acknowledges less than the PVM, just those fields are the
// SVM's that R2 names.
func TestChangedBits(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	ts := everyOption["timestamps"]
	opts := slices.Concat(ts, everyOption["SACK"])
	for _, v6 := range []bool{false, true} {
		for _, pay := range [][]byte{nil, []byte("payload")} {
			in := segment(v6, 0, 1000, compare.ACK|compare.URG|compare.ECE|compare.AE, opts, pay)
			l4 := len(in) - len(pay) - len(opts) - core.TCPLen
			binary.BigEndian.PutUint16(in[l4+core.TCPUrg:], 3)
			out := h.through(guest, client, in, func(s *compare.Segment) {
				s.Ack -= 0x10
				s.Win -= 5
				s.Opts = slices.Concat(ts[:8], []byte{0, 0, 0, 4})
			})
			want := bytes.Clone(in)
			binary.BigEndian.PutUint32(want[l4+8:], 0x11223344-0x10)
			binary.BigEndian.PutUint16(want[l4+14:], 500-5)
			want[l4+core.TCPLen+11] = 4 // the echo is that of the ACK
			sack := want[l4+core.TCPLen+len(ts):][:len(opts)-len(ts)]
			if copy(sack, bytes.Repeat([]byte{1}, len(sack))); pay == nil {
				want = slices.Delete(want, l4+core.TCPLen+len(ts), len(want))
				want[l4+12] -= 3 << 4
				ip := want[core.EthLen:]
				binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
				if v6 {
					copy(ip[2:], in[core.EthLen+2:][:2])
					binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40))
				}
			}
			if want = fixed(want); !bytes.Equal(out, want) {
				t.Errorf("IPv6 %v: released\n% x, want\n% x", v6, out, want)
			}
		}
	}
}

// through gives in to the PVM's tap, has the SVM send the same but for what less changes,
// and returns what leaves; nil: nothing.
func (h *hosts) through(guest, client *wire, in []byte, less func(*compare.Segment)) []byte {
	h.Helper()
	keys := h.at[h.p].Digest
	core := compare.NewPrimary(compare.Config{}, &keys)
	before, err := h.p.Counters()
	check(h, err)
	guest.send(in)
	var evs []compare.Event
	for {
		evs, err = h.p.Poll(0, evs)
		check(h, err)
		if len(evs) > 0 {
			break
		}
		now, err := h.p.Counters()
		check(h, err)
		if now["malformed"] > before["malformed"] {
			return nil
		}
		if now["passed"] > before["passed"] {
			return client.recv()
		}
	}
	if len(evs) != 1 || evs[0].Kind != compare.EvPVM {
		h.Fatalf("events %+v", evs)
	}
	at := evs[0].Seg.At
	var sent []compare.Effect
	step := func(ev compare.Event) {
		for _, e := range core.Step(at, &ev, nil) {
			switch e.Op {
			case compare.OpSend, compare.OpForward, compare.OpFree:
				sent = append(sent, e)
			}
		}
	}
	step(evs[0])
	said := evs[0]
	said.Kind = compare.EvSVM
	said.Seg.Slot, said.Seg.Payload, said.Seg.Inherited = compare.NoSlot, nil, true
	said.Seg.Flags &= 0xff // a record has no more
	if said.Seg.Flags&(compare.SYN|compare.RST) == compare.SYN {
		said.Seg.Inherited, said.Seg.Inc = false, said.Seg.Seq
	}
	less(&said.Seg)
	step(said)
	leaves := 0
	for _, e := range sent {
		if e.Op != compare.OpFree {
			leaves++
		}
	}
	apply(h, h.p, sent...)
	var out []byte
	for range leaves {
		if f := client.recv(); len(f) > len(out) {
			out = f // an ACK may leave before what it came with
		}
	}
	if evs[0].Seg.Slot != compare.NoSlot && h.p.frames.Len() != 0 {
		apply(h, h.p, compare.Effect{Op: compare.OpFree, Slot: evs[0].Seg.Slot})
	}
	return out
}
