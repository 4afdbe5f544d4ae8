// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
)

// stranger is connection i of a flood, or of none.
func stranger(i int) flow {
	f := flows["IPv4"]
	f.remote = netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i >> 16)}), uint16(i))
	return f
}

// What opens connections, or ends some that were never open, takes half of the ring at
// most, wherever it comes from: events of other connections still have room.
func TestFlood(t *testing.T) {
	synRecord := func(k *kit, f flow) []byte {
		return k.fromPeer(&bpf.LockstepLsRec{Version: abiVersion, Type: data, Dir: s2p, KeyGen: keyGen, Epoch: epoch, T: f.tuple(), TcpFlags: syn | ack})
	}
	// Slots are not what runs out here.
	k := newKit(t, func(s *ebpf.CollectionSpec) { s.Maps["ls_slots"].MaxEntries = 8192 }, variable("ls_nslots", 8192))
	flood := 0
	for name, c := range map[string]struct {
		mode  bpf.LockstepLsMode
		prog  func(k *kit) *ebpf.Program
		frame func(k *kit, f flow) []byte
	}{
		"SYNs of remotes":                {hold, func(k *kit) *ebpf.Program { return k.LsMirror }, func(_ *kit, f flow) []byte { return f.to(seg{flags: syn}) }},
		"RSTs of remotes":                {hold, func(k *kit) *ebpf.Program { return k.LsMirror }, func(_ *kit, f flow) []byte { return f.to(seg{flags: rst}) }},
		"FINs of remotes":                {hold, func(k *kit) *ebpf.Program { return k.LsMirror }, func(_ *kit, f flow) []byte { return f.to(seg{flags: fin | ack}) }},
		"SYNs of the PVM":                {hold, func(k *kit) *ebpf.Program { return k.LsPriOut }, func(_ *kit, f flow) []byte { return f.from(seg{flags: syn | ack}) }},
		"RSTs of the PVM":                {hold, func(k *kit) *ebpf.Program { return k.LsPriOut }, func(_ *kit, f flow) []byte { return f.from(seg{flags: rst | ack}) }},
		"records of SYNs":                {hold, func(k *kit) *ebpf.Program { return k.LsDigestRx }, synRecord},
		"SYNs for an SVM that is parked": {park, func(k *kit) *ebpf.Program { return k.LsSecIn }, func(_ *kit, f flow) []byte { return f.to(seg{flags: syn}) }},
	} {
		t.Run(name, func(t *testing.T) {
			k.TB = t
			k.setMode(c.mode)
			k.events()
			before := k.counters()
			const frames = 1000 // more than the ring holds
			flood++
			for i := range frames {
				k.run(c.prog(k), input{frame: c.frame(k, stranger(flood*frames+i))})
			}
			if m := k.moved(before); m["crowded"] == 0 || m["crowded"] == frames || m["no_ring"] != 0 {
				t.Errorf("of %d frames of a flood: %v", frames, m)
			}
			// As many as that half held of larger or equal size have room beside it.
			f := flows["IPv4"]
			k.run(k.LsMirror, input{frame: f.to(seg{flags: ack})}) // it is open
			before = k.counters()
			const others = 150
			for range others {
				if c.mode == park {
					k.run(k.LsSecIn, input{frame: f.to(seg{flags: ack, payload: []byte("x")})})
				} else {
					k.run(k.LsPriOut, input{frame: f.from(seg{flags: ack, payload: []byte("x")})})
				}
			}
			if moved := k.moved(before); moved["held"]+moved["parked"] != others {
				t.Errorf("beside the flood: %v", moved)
			}
			if c.mode == hold {
				k.check(k.LsMirror, f.to(seg{flags: rst | ack}), next, "mirrored") // an open connection's
			}
			k.events()
			before = k.counters()
			k.run(c.prog(k), input{frame: c.frame(k, stranger(-1))})
			if m := k.moved(before); m["crowded"] != 0 {
				t.Errorf("with an empty ring: %v", m)
			}
		})
	}
}

// SYNs that are held take a quarter of the slots at most.
func TestFloodOfSlots(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	for i := range 3 * nslots {
		k.run(k.LsPriOut, input{frame: stranger(i).from(seg{flags: syn | ack})})
		k.events()
	}
	if n := k.used(); n != nslots/4 {
		t.Errorf("%d of %d slots hold SYNs", n, nslots)
	}
	before := k.counters()
	for i := 0; k.moved(before)["held"] < tcpSlots-nslots/4; i++ {
		if k.run(k.LsPriOut, input{frame: flows["IPv4"].from(seg{flags: ack, payload: []byte("x")})}); i > 10*nslots {
			t.Fatalf("beside the flood: %v", k.moved(before))
		}
		k.events()
	}
}

// A run of full slots, such as a flood's SYNs, costs no other frame its slot.
func TestFullRun(t *testing.T) {
	const slots = 4096
	k := newKit(t, func(s *ebpf.CollectionSpec) { s.Maps["ls_slots"].MaxEntries = slots }, variable("ls_nslots", slots))
	k.setMode(hold)
	for i := range 2 * slots / 4 {
		k.run(k.LsPriOut, input{frame: stranger(i).from(seg{flags: syn | ack})})
		if i%100 == 0 {
			k.events()
		}
	}
	k.events()
	frame := flows["IPv4"].from(seg{flags: ack, payload: []byte("x")})
	for range 2 * slots { // more than once around
		k.check(k.LsPriOut, frame, drop, "held")
		k.slot(one[*bpf.LockstepLsEv](k).Slot)
	}
}
