// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"testing"
)

func TestDatagrams(t *testing.T) {
	for _, addrs := range [][2]netip.Addr{{addrA, addrB}, {addrA6, addrB6}} {
		w := newWorld(t, Config{Addr: addrs[0]}, Config{Addr: addrs[1]}, link{}, 1)
		for _, text := range []string{"one", "two", ""} {
			w.stack[0].SendUDP(w.now, 1000, netip.AddrPortFrom(addrs[1], 53), []byte(text))
		}
		w.run(0)
		if _, _, ok := w.stack[1].ReceiveUDP(54); ok {
			t.Error("a datagram for another port")
		}
		for _, text := range []string{"one", "two", ""} {
			b, from, ok := w.stack[1].ReceiveUDP(53)
			if string(b) != text || from != netip.AddrPortFrom(addrs[0], 1000) || !ok {
				t.Errorf("%q from %v, %v", b, from, ok)
			}
		}
		if _, _, ok := w.stack[1].ReceiveUDP(53); ok {
			t.Error("one too many")
		}
	}
}

func TestPing(t *testing.T) {
	for _, addrs := range [][2]netip.Addr{{addrA, addrB}, {addrA6, addrB6}} {
		w := newWorld(t, Config{Addr: addrs[0]}, Config{Addr: addrs[1]}, link{}, 1)
		a := w.stack[0]
		proto, m := uint8(protoICMP), []byte{echoRequest, 0, 0, 0, 0, 1, 0, 2, 'p', 'i', 'n', 'g', '!'}
		if addrs[0] == addrA6 {
			proto, m[0] = protoICMPv6, echoRequest6
		}
		r := a.route(addrs[1], proto)
		frame, b := a.packet(&r, len(m), 1, 0)
		copy(b, m)
		pseudo := uint64(0)
		if proto == protoICMPv6 {
			pseudo = r.pseudo + uint64(len(m))
		}
		be.PutUint16(b[2:], fold(sum(b, pseudo)))
		w.stack[1].Input(w.now, frame)
		out := w.stack[1].Take()
		var p packet
		if len(out) != 1 || !a.parsePacket(out[0], &p) {
			t.Fatalf("%x", out)
		}
		if proto == protoICMP {
			p.pseudo = 0
		}
		if got := p.payload; (got[0] != echoReply && got[0] != echoReply6) || string(got[4:]) != string(m[4:]) || fold(sum(got, p.pseudo)) != 0 {
			t.Errorf("%x", got)
		}

		a.Ping(w.now, addrs[1], 7, 9, []byte("ping!"))
		w.run(0)
		if _, _, ok := a.ReceivePong(8); ok {
			t.Error("an answer for another identifier")
		}
		if seq, data, ok := a.ReceivePong(7); seq != 9 || string(data) != "ping!" || !ok {
			t.Errorf("%d %q %v", seq, data, ok)
		}
		if _, _, ok := a.ReceivePong(7); ok {
			t.Error("one too many")
		}
	}
}

// Frames that are not whole, or not for the stack, are ignored.
func TestInputIgnores(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{}, 1)
	id, _ := w.open()
	w.stack[0].Write(w.now, id, make([]byte, 100))
	frame := w.stack[0].Take()[0]
	b := w.stack[1]
	for n := range len(frame) {
		b.Input(w.now, frame[:n])
	}
	if b.BadChecksums() != 0 {
		t.Error("a short frame was taken for one with a wrong checksum")
	}
	for i := range frame {
		if i >= 6 && i < 12 {
			continue // who sent the frame does not matter
		}
		for bit := range 8 {
			frame[i] ^= 1 << bit
			b.Input(w.now, frame)
			frame[i] ^= 1 << bit
		}
	}
	if out := b.Take(); len(out) != 0 || b.Unread(0) != 0 {
		t.Errorf("%d frames, %d bytes", len(out), b.Unread(0))
	}
	b.Input(w.now, frame)
	if b.Unread(0) != 100 {
		t.Errorf("the whole frame brought %d bytes", b.Unread(0))
	}
}
