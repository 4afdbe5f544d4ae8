// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
)

// dgramRecord is the record of a datagram, its sum apart.
func (s *sample) dgramRecord() *bpf.LockstepLsRec {
	return &bpf.LockstepLsRec{
		Type: dgram, Dir: s2p, T: s.tuple(), Seq: s.pos, End: s.pos + uint32(s.n), Frag: s.frag,
	}
}

// The PVM's output: segments and datagrams are held as they are, their digest at
// their positions, whatever stands in front of them and behind.
func TestPriOutSamples(t *testing.T) {
	k := newKit(t)
	for _, s := range samples(true) {
		t.Run(s.name, func(t *testing.T) {
			k.TB = t
			k.conf.LeaseUntil = math.MaxUint64
			k.setMode(hold)
			switch s.class {
			case isBad:
				k.check(k.LsPriOut, s.frame, drop, "malformed")
			case isLink, isAsk:
				k.check(k.LsPriOut, s.frame, next, "passed")
				k.conf.LeaseUntil = 1
				k.setConf()
				k.check(k.LsPriOut, s.frame, drop, "muted")
			default:
				k.conf.LeaseUntil = 1 // holding needs no lease
				k.setConf()
				k.check(k.LsPriOut, s.frame, drop, "held")
				ev := one[*bpf.LockstepLsEv](k)
				want := s.event(bpf.LockstepLsEvTypeLS_EV_PVM)
				want.Slot, want.Sum = ev.Slot, k.sum(s.pos, s.payload())
				k.same(ev, want)
				if got := k.slot(ev.Slot); !bytes.Equal(got, s.frame) {
					t.Errorf("slot holds\n% x, want\n% x", got, s.frame)
				}
			}
			k.none()
		})
	}
	k.TB = t
	if n := k.used(); n != 0 {
		t.Errorf("%d slots taken", n)
	}
}

// The SVM's output: datagrams become records, without copies; neighbour requests are
// passed to the primary.
func TestSecOutSamples(t *testing.T) {
	k := newKit(t)
	for _, s := range samples(true) {
		t.Run(s.name, func(t *testing.T) {
			k.TB = t
			k.setMode(run)
			defer k.none()
			var reason string
			var want *bpf.LockstepLsRec
			at := s.recOff()
			switch s.class {
			case isBad:
				k.check(k.LsSecOut, s.frame, drop, "malformed")
				return
			case isLink:
				k.check(k.LsSecOut, s.frame, drop, "svm_only")
				return
			case isAsk:
				reason, at = "neigh_out", 128
				want = &bpf.LockstepLsRec{Type: neigh, Dir: s2p, T: s.tuple(), Optlen: 6, Opts: opts40(guestMAC)}
			case isDgram:
				reason, want = "record_out", s.dgramRecord()
				want.Sum = k.sum(s.pos, s.payload())
			default:
				reason = "record_out"
				want = &bpf.LockstepLsRec{
					Type: data, Dir: s2p, Flags: inherited, T: s.tuple(), Seq: s.pos, End: s.pos + uint32(s.n),
					Ack: s.seg.ack, Win: s.seg.win, TcpFlags: s.seg.flags, Sum: k.sum(s.pos, s.payload()),
				}
			}
			var verdict uint32
			var out []byte
			k.expect(counts{reason: 1}, func() { verdict, out, _ = k.run(k.LsSecOut, input{frame: s.frame}) })
			if wantFrame := k.record(want, out, s.frame, at); verdict != redirect || !bytes.Equal(out, wantFrame) {
				t.Errorf("verdict %d, record\n% x, want\n% x", int32(verdict), out, wantFrame)
			}
			if s.class != isTCP {
				return
			}
			ev := one[*bpf.LockstepLsEv](k)
			wantEv := s.event(bpf.LockstepLsEvTypeLS_EV_COPY)
			wantEv.Slot, wantEv.CliAck, wantEv.Sum = ev.Slot, s.pos-1<<30, want.Sum
			wantEv.Flags = uint8(bpf.LockstepLsEvFlagLS_EV_INHERITED)
			k.same(ev, wantEv)
			if got := k.slot(ev.Slot); !bytes.Equal(got, s.frame) {
				t.Errorf("copy\n% x, want\n% x", got, s.frame)
			}
		})
	}
}

// What comes from the remote: delivered as it is, and parked with the flow that the
// guest's own frames are of.
func TestSecInSamples(t *testing.T) {
	k := newKit(t)
	for _, s := range samples(false) {
		t.Run(s.name, func(t *testing.T) {
			k.TB = t
			k.setMode(run)
			k.expect(counts{"delivered": 1}, func() {
				if v, out, mark := k.run(k.LsSecIn, input{frame: s.frame}); v != redirect || mark != markIn || !bytes.Equal(out, s.frame) {
					t.Errorf("verdict %d, mark %#x, frame\n% x", int32(v), mark, out)
				}
			})
			k.none()
			k.setMode(park)
			k.check(k.LsSecIn, s.frame, drop, "parked")
			ev := one[*bpf.LockstepLsEv](k)
			if s.class == isTCP || s.class == isDgram {
				want := s.event(bpf.LockstepLsEvTypeLS_EV_PARK)
				want.Slot = ev.Slot
				k.same(ev, want)
			}
			if got := k.slot(ev.Slot); !bytes.Equal(got, s.frame) {
				t.Errorf("parked\n% x, want\n% x", got, s.frame)
			}
		})
	}
}

// Alone, everything passes as it is while speaking is allowed.
func TestSoloSamples(t *testing.T) {
	k := newKit(t)
	for _, s := range samples(true) {
		t.Run(s.name, func(t *testing.T) {
			k.TB = t
			for _, prog := range []*ebpf.Program{k.LsSecOut, k.LsPriOut} {
				k.conf.LeaseUntil = math.MaxUint64
				k.setMode(solo)
				k.check(prog, s.frame, next, "passed")
				k.conf.LeaseUntil = 1
				k.setConf()
				k.check(prog, s.frame, drop, "muted")
			}
			k.check(k.LsSecGate, s.frame, next, "passed")
		})
	}
}

// setRules puts primary-only rules in place.
func setRules(rules ...bpf.LockstepLsRule) func(*ebpf.CollectionSpec) {
	return func(spec *ebpf.CollectionSpec) {
		variable("ls_nrules", uint32(len(rules)))(spec)
		for i, r := range rules {
			spec.Maps["ls_rules"].Contents = append(spec.Maps["ls_rules"].Contents, ebpf.MapKV{Key: uint32(i), Value: r})
		}
	}
}

// A rule names datagrams by protocol and ports; they leave from the PVM, uncompared,
// under R20, and not from the SVM.
func TestPrimaryOnly(t *testing.T) {
	udp := func(g, r uint16) bpf.LockstepLsRule { return bpf.LockstepLsRule{Proto: 17, Gport: g, Rport: r} }
	unused := slices.Repeat([]bpf.LockstepLsRule{udp(1, 1)}, 15)
	for _, c := range []struct {
		name  string
		rules []bpf.LockstepLsRule
		match []string // samples
	}{
		{"any port", []bpf.LockstepLsRule{udp(0, 0)}, nil},
		{"guest's port", []bpf.LockstepLsRule{udp(gport, 0)}, nil},
		{"remote's port", []bpf.LockstepLsRule{udp(0, rport)}, nil},
		{"both", []bpf.LockstepLsRule{udp(gport, rport)}, nil},
		{"last of 16", append(unused, udp(gport, 0)), nil},
		{"other guest's port", []bpf.LockstepLsRule{udp(gport+1, 0)}, []string{}},
		{"other remote's port", []bpf.LockstepLsRule{udp(0, rport+1)}, []string{}},
		{"one of two", []bpf.LockstepLsRule{udp(gport, rport+1)}, []string{}},
		{"ports swapped", []bpf.LockstepLsRule{udp(rport, gport)}, []string{}},
		{"ICMP echo", []bpf.LockstepLsRule{{Proto: 1, Gport: 8}}, []string{"ICMP echo"}},
		{"ethertype", []bpf.LockstepLsRule{{Proto: 255, Gport: 0x88f7}}, []string{"PTP"}},
		{"TCP", []bpf.LockstepLsRule{{Proto: 6}}, []string{"TCP fragment", "routing TCP", "TCP beyond the limit"}},
		{"none", nil, []string{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKit(t, setRules(c.rules...))
			for _, s := range samples(true) {
				matches := slices.Contains(c.match, s.name)
				if c.match == nil { // every UDP datagram with these ports
					matches = s.proto == 17 && s.gport == gport && s.rport == rport
					if c.name == "any port" {
						matches = s.proto == 17
					}
				}
				if s.class != isDgram && (s.class != isTCP || matches) {
					continue
				}
				if !matches {
					k.setMode(hold)
					k.check(k.LsPriOut, s.frame, drop, "held")
					k.slot(one[*bpf.LockstepLsEv](k).Slot)
					continue
				}
				k.conf.LeaseUntil = math.MaxUint64
				k.setMode(hold)
				k.check(k.LsPriOut, s.frame, next, "primary_only")
				k.conf.LeaseUntil = 1
				k.setConf()
				k.check(k.LsPriOut, s.frame, drop, "muted")
				k.setMode(run)
				k.check(k.LsSecOut, s.frame, drop, "svm_only")
				k.none()
				if t.Failed() {
					t.Fatal(s.name)
				}
			}
			if n := k.used(); n != 0 {
				t.Errorf("%d slots taken", n)
			}
		})
	}
}

// A class that has filled its slots of either size leaves the other's alone.
func TestSlotShares(t *testing.T) {
	pin(t)
	f := flows["IPv4"]
	tcp := [2][]byte{f.from(seg{flags: ack, payload: []byte("x")}), f.from(seg{flags: ack, payload: make([]byte, 3000)})}
	var udp [2][]byte
	for _, s := range samples(true) {
		switch s.name {
		case "UDP":
			udp[0] = s.frame
		case "UDP large":
			udp[1] = s.frame
		}
	}
	for name, c := range map[string]struct {
		first, second [2][]byte
		share, rest   [2]int
	}{
		"datagrams first": {udp, tcp, [2]int{nslots - tcpSlots, ngslots - tcpGslots}, [2]int{tcpSlots, tcpGslots}},
		"TCP first":       {tcp, udp, [2]int{tcpSlots, tcpGslots}, [2]int{nslots - tcpSlots, ngslots - tcpGslots}},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t)
			k.setMode(hold)
			for size := range 2 {
				for range c.share[size] {
					k.check(k.LsPriOut, c.first[size], drop, "held")
				}
				k.check(k.LsPriOut, c.first[size], drop, "no_slot")
				for range c.rest[size] {
					k.check(k.LsPriOut, c.second[size], drop, "held")
				}
				k.check(k.LsPriOut, c.second[size], drop, "no_slot")
			}
			seen := make(map[uint32]bool)
			for _, e := range k.events() {
				ev := e.(*bpf.LockstepLsEv)
				if ev.Slot == noSlot { // a dropped frame is reported only for TCP
					if ev.T.Proto != 6 {
						t.Errorf("a dropped frame of protocol %d is reported", ev.T.Proto)
					}
					continue
				}
				if n := ev.Slot &^ slotGSO; (n < nslots/4 && ev.Slot&slotGSO == 0 || n < ngslots/4 && ev.Slot&slotGSO != 0) != (ev.T.Proto == 17) {
					t.Errorf("slot %#x for protocol %d", ev.Slot, ev.T.Proto)
				}
				seen[ev.Slot] = true
				k.slot(ev.Slot)
			}
			if len(seen) != nslots+ngslots {
				t.Errorf("%d slots used, want %d", len(seen), nslots+ngslots)
			}
		})
	}
}

// Few slots are still shared out, and one is better than none.
func TestSlotSharesFew(t *testing.T) {
	k := newKit(t, func(spec *ebpf.CollectionSpec) { spec.Maps["ls_slots"].MaxEntries = 2 }, variable("ls_nslots", 2))
	k.setMode(hold)
	for _, s := range samples(true) {
		if s.name == "UDP" || s.name == "TCP" {
			k.check(k.LsPriOut, s.frame, drop, "held")
			k.slot(one[*bpf.LockstepLsEv](k).Slot)
		}
	}
}

// The outer of two tags stands beside the bytes: both are in the tuple, and the peer
// frame has neither.
func TestLiveQinQ(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	l.attach(k.LsSecOut, l.tapLink, ebpf.AttachTCXIngress)
	k.setMode(run)
	for _, s := range samples(true) {
		if s.name != "UDP" && s.name != "UDPv6" && s.name != "ARP request" {
			continue
		}
		want, reason, off := s.dgramRecord(), "record_out", s.recOff()+4
		if s.class == isAsk {
			want, reason, off = &bpf.LockstepLsRec{Type: neigh, Dir: s2p, T: s.tuple(), Optlen: 6, Opts: opts40(guestMAC)}, "neigh_out", 128
		} else {
			want.Sum = k.sum(s.pos, s.payload())
		}
		want.T.Vlan, want.T.Vlan2 = 100, 5
		var got []byte
		k.expect(counts{reason: 1}, func() {
			l.write(l.tap, vnet{}, tagged(tagged(s.frame, 0xa005), 0x6064))
			_, got = l.read(l.far)
		})
		if want := k.record(want, got, s.frame, off); !bytes.Equal(got, want) {
			t.Errorf("%s: record\n% x, want\n% x", s.name, got, want)
		}
	}
	k.none()
}
