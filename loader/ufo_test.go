// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// datagramHead is the virtio-net header and the headers of a UDP frame whose cutting is
// left to the device, with its checksum (partial) or whole.
func datagramHead(v6 bool, tci uint16, kind byte, partial bool, pay []byte) []byte {
	b := l2l3(v6, 0)
	ip := b[core.EthLen:]
	n := 8 + len(pay)
	if v6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(n))
		ip[6] = core.ProtoUDP
	} else {
		binary.BigEndian.PutUint16(ip[2:], uint16(20+n))
		ip[6], ip[9], ip[10], ip[11] = 0, core.ProtoUDP, 0, 0 // may be fragmented
		binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip))
	}
	pseudo := pseudoOfUDP(ip, n)
	l4 := len(b)
	b = append(b, 0x30, 0x39, 0, 80, byte(n>>8), byte(n), 0, 0)
	sum := onesSum(pseudo)
	if !partial {
		sum = ^onesSum(pseudo, b[l4:], pay)
	}
	binary.BigEndian.PutUint16(b[l4+6:], sum)
	if tci != 0 {
		b = append(core.AppendTag(bytes.Clone(b[:12]), core.EthVLAN, tci), b[12:]...)
		l4 += 4
	}
	head := make([]byte, core.VnetLen, core.VnetLen+len(b))
	head[1] = kind
	binary.LittleEndian.PutUint16(head[2:], uint16(l4+8))
	binary.LittleEndian.PutUint16(head[4:], gsoSegment)
	if partial {
		head[0] = core.VnetCsum
		binary.LittleEndian.PutUint16(head[6:], uint16(l4))
		binary.LittleEndian.PutUint16(head[8:], 6)
	}
	return append(head, b...)
}

func pseudoOfUDP(ip []byte, n int) []byte {
	p := pseudoHeader(ip, n)
	if ip[0]>>4 == 4 {
		p[9] = core.ProtoUDP
	} else {
		p[39] = core.ProtoUDP
	}
	return p
}

// fragment is what an IP frame has behind its IP headers, and where that belongs.
func fragment(f []byte) (ip, data []byte, at int, more, fragmented bool) {
	ip = f[core.L3Offset(f):]
	if ip[0]>>4 == 4 {
		ip = ip[:binary.BigEndian.Uint16(ip[2:])]
		off := binary.BigEndian.Uint16(ip[6:])
		return ip, ip[20:], int(off&0x1fff) * 8, off&0x2000 != 0, off&0x3fff != 0
	}
	ip = ip[:40+binary.BigEndian.Uint16(ip[4:])]
	if ip[6] != 44 {
		return ip, ip[40:], 0, false, false
	}
	off := binary.BigEndian.Uint16(ip[42:])
	return ip, ip[48:], int(off &^ 7), off&1 != 0, true
}

// realTap is hosts whose PVM is behind a tap, as it is read and written by guest.
func realTap(t *testing.T) (guest userTap, h *hosts, client *wire) {
	t.Helper()
	devices(t)
	check(t, netlink.LinkDel(linkOf(t, "tapP")))
	guest = newTap(t, "tapP", 0)
	check(t, netlink.LinkSetMaster(linkOf(t, "tapP"), linkOf(t, "br")))
	return guest, openHosts(t), newWire(t, "client")
}

// TestReleaseOfDatagramsMutation: released as the other kind, one datagram in fragments
// becomes many datagrams.
func TestReleaseOfDatagramsMutation(t *testing.T) {
	guest, h, client := realTap(t)
	h.p.NoUFO = true
	pay := randomBytes(10000)
	if _, err := unix.Write(guest.fd, append(datagramHead(false, 0, core.GSOFragments, true, pay), pay...)); err != nil {
		t.Fatal(err)
	}
	apply(t, h.p, compare.Effect{Op: compare.OpForward, Slot: event(t, h.p, compare.EvPVM).Slot})
	if _, _, _, _, fragmented := fragment(client.recv()); fragmented {
		t.Error("it leaves in fragments although the rule is turned off")
	}
}

// What a guest leaves to the device as one datagram in fragments (UFO) leaves as that,
// and what it leaves as many datagrams (USO) as those.
func TestReleaseOfDatagrams(t *testing.T) {
	guest, h, client := realTap(t)
	for _, c := range []struct {
		name         string
		kind         byte
		partial      bool
		tag, v6, uso bool
	}{
		{name: "UFO", kind: core.GSOFragments, partial: true},
		{name: "UFO, tagged", kind: core.GSOFragments, partial: true, tag: true},
		{name: "UFO, IPv6", kind: core.GSOFragments, partial: true, v6: true},
		{name: "UFO, IPv6, tagged", kind: core.GSOFragments, partial: true, v6: true, tag: true},
		{name: "UFO, checksum whole", kind: core.GSOFragments},
		{name: "UFO, IPv6, checksum whole", kind: core.GSOFragments, v6: true},
		{name: "USO", kind: core.GSODatagrams, partial: true, uso: true},
		{name: "USO, tagged", kind: core.GSODatagrams, partial: true, tag: true, uso: true},
		{name: "USO, IPv6", kind: core.GSODatagrams, partial: true, v6: true, uso: true},
		{name: "USO, IPv6, tagged", kind: core.GSODatagrams, partial: true, v6: true, tag: true, uso: true},
	} {
		pay := randomBytes(10000)
		tci := uint16(0)
		if c.tag {
			tci = 5
		}
		if _, err := unix.Write(guest.fd, append(datagramHead(c.v6, tci, c.kind, c.partial, pay), pay...)); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		s := event(t, h.p, compare.EvPVM)
		if !s.Datagram || int(s.Len) != len(pay) {
			t.Fatalf("%s: held %+v", c.name, s)
		}
		apply(t, h.p, compare.Effect{Op: compare.OpForward, Slot: s.Slot})
		got := make([]byte, 0, len(pay)+8)
		datagrams := 0
		for more := true; more; {
			f := client.recv()
			ip, data, at, follows, fragmented := fragment(f)
			if tagged := core.L3Offset(f) != core.EthLen; tagged != c.tag {
				t.Errorf("%s: tagged %v", c.name, tagged)
			}
			if fragmented == c.uso {
				t.Fatalf("%s: left fragmented: %v", c.name, fragmented)
			}
			if c.uso {
				if onesSum(pseudoOfUDP(ip, len(data)), data) != 0xffff {
					t.Errorf("%s: wrong checksum", c.name)
				}
				datagrams++
				got = append(got, data[8:]...)
				more = len(got) < len(pay)
				continue
			}
			if at != len(got) {
				t.Fatalf("%s: fragment at %d, want %d", c.name, at, len(got))
			}
			got, more = append(got, data...), follows
			if !more && onesSum(pseudoOfUDP(ip, len(got)), got) != 0xffff {
				t.Errorf("%s: wrong checksum", c.name)
			}
		}
		if !c.uso {
			got = got[8:]
		} else if want := (len(pay) + gsoSegment - 1) / gsoSegment; datagrams != want {
			t.Errorf("%s: %d datagrams, want %d", c.name, datagrams, want)
		}
		if !bytes.Equal(got, pay) {
			t.Errorf("%s: other bytes left", c.name)
		}
	}
	if c, err := h.p.Counters(); err != nil || c["release_lost"] != 0 {
		t.Errorf("%d frames lost, %v", c["release_lost"], err)
	}
}
