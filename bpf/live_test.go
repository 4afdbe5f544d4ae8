// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

var liveSizes = []struct{ n, gso int }{
	{1, 0}, {1428, 0}, {1429, 1428}, {20000, 1428}, {20000, 536}, {65000, 1428}, {65000, 536}, {60000, 1},
}

// Frames of every size and offload are held as they are, their digest right.
func TestLiveHold(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	r := rand.New(rand.NewPCG(13, 14))
	for _, f := range flows {
		for _, c := range liveSizes {
			for _, tci := range []uint16{0, 5, 0xa005} {
				s := seg{seq: -uint32(r.IntN(c.n + 5000)), ack: 1, flags: ack | psh, opts: timestamps(1, 2), payload: randBytes(r, c.n)}
				v, frame := f.offloaded(s, f.from(s), c.gso)
				onWire, wireV := frame, v
				if tci != 0 {
					onWire, wireV.csumStart = tagged(frame, tci), v.csumStart+4
					if v.hdrLen > 0 {
						wireV.hdrLen += 4
					}
				}
				k.expect(counts{"held": 1}, func() { l.write(l.tap, wireV, onWire) })
				g := f
				g.vlan = tci & 0xfff
				want := wantEvent(bpf.LockstepLsEvTypeLS_EV_PVM, g, s, frame)
				if want.Tci = tci; c.gso == 0 {
					want.Sum = k.sum(s.seq, s.payload)
				}
				ev := l.liveEvent(k, want, v)
				if got := k.slot(ev.Slot); !bytes.Equal(got, frame) {
					t.Errorf("%d bytes by %d: slot differs", c.n, c.gso)
				}
			}
		}
	}
	l.empty(l.out)
}

// Frames too short for PROG_TEST_RUN.
func TestLiveTruncated(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	for _, f := range flows {
		s := seg{seq: 1, flags: ack, payload: []byte("x")}
		whole := f.from(s)
		for n := 14; n < len(whole); n++ {
			k.setMode(hold)
			k.expect(counts{"malformed": 1}, func() { l.write(l.tap, vnet{}, whole[:n]) })
		}
	}
	k.none()
	l.empty(l.out)
}

// A frame longer than any slot: its padding makes it so.
func TestLiveTooLong(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	s := seg{seq: 1, flags: ack, payload: []byte("x")}
	limit := int(bpf.LockstepLsConstLS_GSLOT_DATA)
	s.padding = make([]byte, limit-55)
	k.expect(counts{"held": 1}, func() { l.write(l.tap, vnet{}, flows["IPv4"].from(s)) })
	if got := k.slot(one[*bpf.LockstepLsEv](k).Slot); len(got) != limit {
		t.Errorf("%d bytes held, want %d", len(got), limit)
	}
	s.padding = append(s.padding, 0)
	k.expect(counts{"too_long": 1}, func() { l.write(l.tap, vnet{}, flows["IPv4"].from(s)) })
	k.none()
}

// An announcement leaves on the peer link, without the VLAN tag, which is in it.
func TestLiveAnnounce(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	for _, f := range flows {
		for _, tci := range []uint16{0, 0x6123} {
			s := seg{seq: 9, ack: 8, flags: syn | ack, opts: withTS(1, 2)}
			v, frame := f.offloaded(s, f.from(s), 0)
			onWire, wireV := frame, v
			if tci != 0 {
				onWire, wireV.csumStart = tagged(frame, tci), v.csumStart+4
			}
			k.expect(counts{"announced": 1}, func() { l.write(l.tap, wireV, onWire) })
			_, got := l.read(l.far)
			g := f
			g.vlan = tci & 0xfff
			rec := segRecord(g, s, s.seq)
			rec.Type, rec.Dir = announce, p2s
			if want := k.record(rec, got, frame, f.l4(s)+20); !bytes.Equal(got, want) {
				t.Errorf("announcement\n% x, want\n% x", got, want)
			}
			want := wantEvent(bpf.LockstepLsEvTypeLS_EV_PVM, g, s, frame)
			want.Tci = tci
			k.slot(l.liveEvent(k, want, v).Slot)
		}
	}
	l.empty(l.out)
}

// The SVM's output becomes one record frame, however large, and a translated copy.
func TestLiveRecord(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(run)
	l.attach(k.LsSecOut, l.tapLink, ebpf.AttachTCXIngress)
	r := rand.New(rand.NewPCG(15, 16))
	for _, f := range flows {
		for _, vlan := range []uint16{0, 77} {
			f.vlan = vlan
			k.connect(f)
			for _, c := range liveSizes {
				s := seg{seq: isnSVM + 1 + r.Uint32N(10000), ack: 1, flags: ack | psh, opts: timestamps(tsSVM+3, 2), payload: randBytes(r, c.n)}
				v, frame := f.offloaded(s, f.from(s), c.gso)
				onWire, wireV := frame, v
				if vlan != 0 {
					onWire, wireV.csumStart = tagged(frame, vlan), v.csumStart+4
					if v.hdrLen > 0 {
						wireV.hdrLen += 4
					}
				}
				k.expect(counts{"record_out": 1}, func() { l.write(l.tap, wireV, onWire) })
				_, got := l.read(l.far)

				want := s
				want.seq, want.opts = s.seq-off, timestamps(tsPVM+3, 2)
				_, translated := f.offloaded(want, f.from(want), c.gso)
				rec := segRecord(f, want, isnPVM)
				rec.Sum = k.sum(want.seq, want.payload)
				stride, nsum, bound := k.bounds(want.seq, want.payload, c.gso)
				rec.Stride, rec.Nsum, rec.Bound = uint32(stride), uint16(nsum), bound
				if want := k.record(rec, got, translated[:min(134, len(translated))], f.l4(s)+20); !bytes.Equal(got, want) {
					t.Errorf("%d bytes by %d: record\n% x, want\n% x", c.n, c.gso, got, want)
				}
				wantEv := wantEvent(bpf.LockstepLsEvTypeLS_EV_COPY, f, want, translated)
				wantEv.Inc, wantEv.CliAck, wantEv.Sum, wantEv.Tci = isnPVM, isnPVM+1, rec.Sum, vlan
				ev := l.liveEvent(k, wantEv, v)
				if got := k.slot(ev.Slot); !bytes.Equal(got, translated) {
					t.Errorf("%d bytes by %d: copy differs", c.n, c.gso)
				}
			}
		}
	}
	l.empty(l.out)
}

// connect puts f into ls_conn as if it had been opened there: a handshake with
// VLAN tags cannot go through PROG_TEST_RUN.
func (k *kit) connect(f flow) {
	k.Helper()
	c := bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, CliAck: isnPVM + 1, IsnSvm: isnSVM}
	if err := k.LsConn.Put(f.tuple(), &c); err != nil {
		k.Fatal(err)
	}
}

// A device without checksum offload completes the partial checksum that a record
// frame still has: in front of the record, which stays authentic.
func TestLiveRecordCompleted(t *testing.T) {
	l := newLab(t)
	if out, err := exec.Command("ethtool", "-K", "lspeer", "tx", "off").CombinedOutput(); err != nil {
		t.Fatalf("ethtool: %v\n%s", err, out)
	}
	k := l.kit()
	k.setMode(run)
	l.attach(k.LsSecOut, l.tapLink, ebpf.AttachTCXIngress)
	for _, f := range flows {
		s := seg{seq: 5, ack: 1, flags: ack, opts: timestamps(1, 2), payload: make([]byte, 20000)}
		v, frame := f.offloaded(s, f.from(s), 1448)
		l.write(l.tap, v, frame)
		gotV, got := l.read(l.far)
		l4 := f.l4(s)
		if gotV.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 || bytes.Equal(got[l4+16:l4+18], frame[l4+16:l4+18]) {
			t.Fatal("checksum not completed: the test shows nothing")
		}
		copy(got[l4+16:], frame[l4+16:l4+18])
		rec := segRecord(f, s, 0)
		rec.Flags, rec.Sum = inherited, k.sum(s.seq, s.payload)
		stride, nsum, bound := k.bounds(s.seq, s.payload, 1448)
		rec.Stride, rec.Nsum, rec.Bound = uint32(stride), uint16(nsum), bound
		if want := k.record(rec, got, frame[:min(134, len(frame))], l4+20); !bytes.Equal(got, want) {
			t.Errorf("record\n% x, want\n% x", got, want)
		}
	}
}

// Mirrored frames reach the guest translated: GSO and partial checksums stay what
// they are, and checksums are right once they are complete.
func TestLiveDeliver(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(run)
	l.attach(k.LsSecIn, l.peerLink, ebpf.AttachTCXIngress)
	l.attach(k.LsSecGate, l.tapLink, ebpf.AttachTCXEgress)
	r := rand.New(rand.NewPCG(17, 18))
	for _, guestOffloads := range []int{unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6, 0} {
		l.offloads(guestOffloads)
		for _, f := range flows {
			for _, vlan := range []uint16{0, 77} {
				f.vlan = vlan
				k.connect(f)
				for _, c := range liveSizes {
					if c.gso == 1 {
						continue // 60000 segments
					}
					for _, partial := range []bool{false, true} {
						if !partial && c.gso > 0 {
							continue // GSO frames have partial checksums
						}
						s := seg{seq: 1, ack: isnPVM + r.Uint32N(20000), flags: ack, opts: timestamps(1, tsPVM+3), payload: randBytes(r, c.n)}
						v, frame := vnet{}, f.to(s)
						if partial {
							v, frame = f.offloaded(s, frame, c.gso)
						}
						onWire, wireV := frame, v
						if vlan != 0 {
							onWire = tagged(frame, vlan)
							if v.csumStart > 0 {
								wireV.csumStart += 4
							}
							if v.hdrLen > 0 {
								wireV.hdrLen += 4
							}
						}
						in := 1
						if c.gso > 0 && guestOffloads == 0 {
							in = (c.n + c.gso - 1) / c.gso
						}
						k.expect(counts{"delivered": 1, "let_in": uint64(in)}, func() {
							l.write(l.far, wireV, onWire)
							want := s
							want.ack, want.opts = s.ack+off, timestamps(1, tsSVM+3)
							l.checkDelivered(f, want, c.gso, partial && guestOffloads != 0)
						})
						if t.Failed() {
							t.Fatalf("%d bytes by %d, VLAN %d, partial %v, guest's offloads %#x", c.n, c.gso, vlan, partial, guestOffloads)
						}
					}
				}
			}
		}
	}
	k.none()
	l.empty(l.tap)
}

// checkDelivered reads the guest's frames until s is whole.
func (l *lab) checkDelivered(f flow, s seg, gso int, offloaded bool) {
	l.Helper()
	l4 := f.l4(s)
	for len(s.payload) > 0 {
		v, got := l.read(l.tap)
		if f.vlan != 0 {
			if !bytes.Equal(got[12:16], be.AppendUint16([]byte{0x81, 0}, f.vlan)) {
				l.Fatalf("tag % x", got[12:16])
			}
			got = append(bytes.Clone(got[:12]), got[16:]...)
		}
		part := s
		if !offloaded && gso > 0 {
			part.payload = s.payload[:min(gso, len(s.payload))]
		}
		want := f.to(part)
		if offloaded {
			var wantV vnet
			wantV, want = f.offloaded(part, want, gso)
			if v.flags != wantV.flags || v.gsoSize != wantV.gsoSize || v.gsoType != wantV.gsoType {
				l.Errorf("vnet header %+v, want %+v", v, wantV)
			}
		} else if v.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 || !f.checksumRight(got, l4) {
			l.Errorf("checksum wrong: vnet header %+v", v)
		}
		if f.guest.Addr().Is4() { // segmentation numbers them
			copy(want[18:20], got[18:20])
			copy(want[24:26], got[24:26])
		}
		if !bytes.Equal(got, want) {
			l.Fatalf("guest got\n% x, want\n% x", got[:min(len(got), 120)], want[:min(len(want), 120)])
		}
		s.seq += uint32(len(part.payload))
		s.payload = s.payload[len(part.payload):]
	}
}

// The mirror: both guests get the frame, and SYN, FIN and RST are reported to user space.
func TestLiveMirror(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	l.attach(k.LsMirror, l.tapLink, ebpf.AttachTCXEgress)
	r := rand.New(rand.NewPCG(19, 20))
	mirrored := func(v vnet, frame []byte) {
		t.Helper()
		k.expect(counts{"mirrored": 1}, func() {
			l.write(l.out, v, frame)
			for _, fd := range []int{l.far, l.tap} {
				if gotV, got := l.read(fd); !bytes.Equal(got, frame) || gotV.gsoSize != v.gsoSize || gotV.gsoType != v.gsoType || gotV.flags&1 != v.flags&1 {
					t.Errorf("%+v\n% x, want %+v\n% x", gotV, got[:min(len(got), 120)], v, frame[:min(len(frame), 120)])
				}
			}
		})
	}
	k.setMode(hold)
	for _, f := range flows {
		for _, c := range liveSizes {
			s := seg{seq: 1, flags: ack, payload: randBytes(r, c.n)}
			v, frame := f.offloaded(s, f.to(s), c.gso)
			mirrored(v, frame)
		}
		for flags := range uint8(32) {
			s := seg{seq: 1, ack: 2, flags: flags, win: 3, opts: timestamps(4, 5)}
			frame := f.to(s)
			mirrored(vnet{}, frame)
			if flags&(syn|fin|rst) == 0 {
				k.none()
				continue
			}
			k.same(one[*bpf.LockstepLsEv](k), wantEvent(bpf.LockstepLsEvTypeLS_EV_CLIENT, f, s, frame))
		}
	}
	for name, frame := range linkFrames() {
		if name == "LLDP" || name == "no: LLC" {
			continue // a bridge keeps it
		}
		mirrored(vnet{}, frame)
	}
	k.none()

	frame := flows["IPv4"].to(seg{flags: ack})
	for _, m := range []bpf.LockstepLsMode{shut, run, park} {
		k.setMode(m)
		k.expect(counts{"shut": 1}, func() { l.write(l.out, vnet{}, frame) })
	}
	k.setMode(solo)
	k.expect(counts{"passed": 1}, func() { l.write(l.out, vnet{}, frame); l.read(l.tap) })

	k.setMode(hold)
	l.must(netlink.LinkSetDown(l.farDev))
	k.expect(counts{"mirror_failed": 1}, func() { l.write(l.out, vnet{}, frame); l.read(l.tap) })
	l.must(netlink.LinkSetUp(l.farDev))
	for k.counters()["no_ring"] == 0 {
		l.write(l.out, vnet{}, flows["IPv4"].to(seg{flags: fin | ack}))
		if _, err := unix.Read(l.tap, make([]byte, 2000)); err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
	}
}

// A released frame goes through the tap's egress into its ingress and leaves by
// the bridge as the guest sent it.
func TestLiveRelease(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	l.attach(k.LsMirror, l.tapLink, ebpf.AttachTCXEgress)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	fd := l.socket("lstap")
	l.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, markRel))
	for _, f := range flows {
		s := seg{seq: 1, flags: ack, payload: make([]byte, 20000)}
		v, frame := f.offloaded(s, f.from(s), 1448)
		k.expect(counts{"released": 1, "released_out": 1}, func() {
			l.write(fd, v, frame)
			if gotV, got := l.read(l.out); !bytes.Equal(got, frame) || gotV.gsoSize != v.gsoSize {
				t.Errorf("%+v, %d bytes", gotV, len(got))
			}
		})
		k.conf.LeaseUntil = 1
		k.setConf()
		k.expect(counts{"released": 1, "muted": 1}, func() { l.write(fd, v, frame) })
		k.conf.LeaseUntil = 1<<64 - 1
		k.setConf()
	}
	l.empty(l.out)
	l.empty(l.far)
}
