// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// own makes the kernel the owner of f, of which everything below seq has left.
func own(k *kit, f flow, seq uint32, ts bool) {
	k.Helper()
	if err := k.LsFast.Put(ptr(f.tuple()), &bpf.LockstepLsFast{}); err != nil {
		k.Fatal(err)
	}
	acked := compare.Acked{Ack: 1000, Edge: 1500}
	ctx := bpf.LockstepLsFastCtx{T: f.tuple(), Op: uint32(bpf.LockstepLsFastOpLS_FAST_GRANT), S: core.ToFast(&compare.Handover{
		Inherited: true, Released: seq, TS: ts, PVM: acked, SVM: acked, Sent: acked,
	})}
	fastOrder(k, &ctx)
	if ctx.Done == 0 {
		k.Fatal("the kernel does not take the connection")
	}
}

// fastOrder gives the programs an order about a connection's owner.
func fastOrder(k *kit, ctx *bpf.LockstepLsFastCtx) {
	k.Helper()
	opts := ebpf.RunOptions{Data: structBytes(ctx), DataOut: make([]byte, 1024)}
	if _, err := k.LsFastOrder.Run(&opts); err != nil || copy(structBytes(ctx), opts.DataOut) != int(unsafe.Sizeof(*ctx)) {
		k.Fatal(err)
	}
}

// fastRecord is the frame of the record of what the SVM sent, in a frame that may have a partial checksum.
func fastRecord(k *kit, f flow, s seg) []byte {
	r := bpf.LockstepLsRec{
		Version: abiVersion, Type: data, Dir: s2p, Flags: inherited, KeyGen: keyGen, Epoch: epoch, T: f.tuple(), Seq: s.seq, End: s.end(), Ack: s.ack,
		Win: s.win, TcpFlags: s.flags, Optlen: uint8(len(s.opts)), Opts: opts40(s.opts), Sum: k.sum(s.seq, s.payload),
	}
	off := (f.l4(s) + 21) &^ 1
	return peerFrame(make([]byte, off), off, sign(k.number(&r, userStream), k.sipRx), ownMAC, peerMAC)
}

// What the kernel makes of a record's frame leaves the host as the guest's frame would, whatever the checksums
// of both are like: complete, or left to the device.
func TestLiveFastPath(t *testing.T) {
	l := newLab(t)
	k := l.kit(variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	l.attach(k.LsDigestRx, l.peerLink, ebpf.AttachTCXIngress)
	r := rand.New(rand.NewPCG(15, 16))
	port := uint16(30000)
	for _, f := range flows {
		for _, n := range []int{0, 1, 2, 3, 100, 479, 480, 481, 1000, 1428} {
			for _, partial := range []bool{false, true} {
				for _, record := range []bool{false, true} {
					port++
					f.remote = netip.AddrPortFrom(f.remote.Addr(), port)
					s := seg{seq: r.Uint32(), ack: 1100, win: 700, flags: ack, payload: randBytes(r, n)}
					stamped := n > 3 || r.IntN(2) == 0 // without, a short frame is padded
					if stamped {
						s.opts = timestamps(5, 6)
					}
					v, frame := vnet{}, f.from(s)
					if partial {
						v, frame = f.offloaded(s, frame, 0)
					}
					frame = append(frame, randBytes(r, max(60-len(frame), 0))...) // padding, which is left out
					own(k, f, s.seq, len(s.opts) > 0)
					k.expect(counts{"fast_held": 1}, func() { l.write(l.tap, v, frame) })

					other := s
					other.ack, other.win = 1050, 600
					if stamped {
						other.opts = timestamps(9, 4)
					}
					var vr vnet
					if record {
						vr = vnet{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: uint16(f.l4(s)), csumOffset: 16}
					}
					if record && !partial { // it cannot become such a frame
						k.expect(counts{"record_in": 1}, func() { l.write(l.far, vr, fastRecord(k, f, other)) })
						k.events()
						freeSlots(k)
						continue
					}
					k.expect(counts{"fast_in": 1, "fast_out": 1, "released_out": 1}, func() { l.write(l.far, vr, fastRecord(k, f, other)) })
					gotV, got := l.read(l.out)

					// The ACK, window and echo are those that both guests have (R2).
					want := s
					want.ack, want.win = 1050, 600
					if stamped {
						want.opts = timestamps(5, 4)
					}
					l4 := f.l4(s)
					if gotV.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
						_, offloaded := f.offloaded(want, f.from(want), 0)
						if !bytes.Equal(got, offloaded) || int(gotV.csumStart) != l4 || gotV.csumOffset != 16 {
							t.Errorf("%v, %d bytes, partial %v, record %v: %+v\n% x, want\n% x", f.remote, n, partial, record, gotV, got, offloaded)
						}
					} else if !bytes.Equal(got, f.from(want)) {
						t.Errorf("%v, %d bytes, partial %v, record %v:\n% x, want\n% x", f.remote, n, partial, record, got, f.from(want))
					}
				}
			}
		}
	}
	if n := k.used(); n != 0 {
		t.Errorf("%d slots are not free", n)
	}
	l.empty(l.out)
	l.empty(l.far)
}

// A SYN|ACK of Linux is the kernel's from the start, and leaves as it was with the SVM's record, whatever its checksum is like.
func TestLiveFastOpen(t *testing.T) {
	l := newLab(t)
	k := l.kit(variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
	k.setMode(hold)
	l.attach(k.LsPriOut, l.tapLink, ebpf.AttachTCXIngress)
	l.attach(k.LsDigestRx, l.peerLink, ebpf.AttachTCXIngress)
	port := uint16(30000)
	for name, f := range flows {
		for _, partial := range []bool{false, true} {
			port++
			f.remote = netip.AddrPortFrom(f.remote.Addr(), port)
			s := seg{seq: 99, ack: 1100, win: 700, flags: syn | ack}
			s.opts = slices.Concat([]byte{2, 4, 5, 180, 4, 2}, timestamps(5, 6)[2:], []byte{1, 3, 3, 7})
			v, frame := vnet{}, f.from(s)
			if partial {
				v, frame = f.offloaded(s, frame, 0)
			}
			k.expect(counts{"announced": 1}, func() { l.write(l.tap, v, frame) })
			evs := k.events()
			if len(evs) != 1 || evs[0].(*bpf.LockstepLsEv).Flags&uint8(bpf.LockstepLsEvFlagLS_EV_OPENED) == 0 {
				t.Fatalf("%s: told of %+v", name, evs)
			}
			other := s
			other.opts = slices.Concat(s.opts[:6], timestamps(9, 6)[2:], s.opts[16:])
			r := fastRec(f, other, k)
			r.Inc = s.seq
			off := (f.l4(s) + 21) &^ 1
			k.expect(counts{"fast_in": 1, "fast_out": 1, "released_out": 1}, func() {
				l.write(l.far, vnet{}, peerFrame(make([]byte, off), off, sign(k.number(&r, userStream), k.sipRx), ownMAC, peerMAC))
			})
			if _, got := l.read(l.out); !bytes.Equal(got, f.from(s)) {
				t.Errorf("%s, partial %v:\n% x, want\n% x", name, partial, got, f.from(s))
			}
			var c bpf.LockstepLsFast
			if err := k.LsFast.Lookup(ptr(f.tuple()), &c); err != nil || c.S.Owner != uint32(bpf.LockstepLsOwnerLS_OWNER_KERNEL) || c.S.Released != s.seq+1 || c.S.Scale != 7 {
				t.Errorf("%s: %+v, %v", name, c.S, err)
			}
		}
	}
	if n := k.used(); n != 0 {
		t.Errorf("%d slots are not free", n)
	}
	l.empty(l.out)
}

// What waits for the other guest too long is user space's again, which is told; a ring without room for that is
// tried again.
func TestFastPathLate(t *testing.T) {
	k := newKit(t, variable("ls_fast_on", 1), variable("ls_fast_wait", 1000))
	k.setMode(hold)
	f := flows["IPv4"]
	s := seg{seq: 100, ack: 1100, win: 700, flags: ack, payload: []byte("x")}
	for _, full := range []bool{false, true} {
		own(k, f, s.seq, false)
		k.events()
		if full {
			for i := 0; k.counters()["no_ring"] == 0; i++ {
				k.run(k.LsPriOut, input{frame: stranger(i).from(seg{flags: ack})})
			}
		}
		before := k.counters()
		if k.run(k.LsPriOut, input{frame: f.from(s)}); k.moved(before)["fast_held"] != 1 {
			t.Fatalf("counted %v", k.moved(before))
		}
		for deadline := time.Now().Add(10 * time.Second); full; { // the timer has found no room
			var c bpf.LockstepLsFast
			if err := k.LsFast.Lookup(ptr(f.tuple()), &c); err != nil || time.Now().After(deadline) {
				t.Fatalf("the ring is full, and %+v, %v", c.S, err)
			}
			if c.Untold != 0 {
				break
			}
		}
		var yielded *bpf.LockstepLsEv
		for deadline := time.Now().Add(10 * time.Second); yielded == nil; {
			for _, e := range k.events() {
				if ev, ok := e.(*bpf.LockstepLsEv); ok && ev.Type == uint32(bpf.LockstepLsEvTypeLS_EV_YIELD) {
					yielded = ev
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("full ring %v: nobody is told", full)
			}
		}
		if yielded.T != f.tuple() || yielded.Number != 1 {
			t.Errorf("told of %+v, number %d", yielded.T, yielded.Number)
		}
		ctx := bpf.LockstepLsFastCtx{T: f.tuple(), Op: uint32(bpf.LockstepLsFastOpLS_FAST_TAKE)}
		fastOrder(k, &ctx)
		if ctx.S.Nheld != 1 || ctx.S.Held[0].Seq != s.seq || ctx.S.Released != s.seq || ctx.S.PvmEnd != s.seq+1 {
			t.Errorf("taken back with %+v", ctx.S)
		}
		freeSlots(k)
	}
}

// A frame that is longer than the kernel can sum up is user space's: as a record's frame it could have to leave with a
// complete checksum.
func TestFastTooLong(t *testing.T) {
	k := newKit(t, variable("ls_fast_on", 1), variable("ls_fast_wait", 60e6))
	k.setMode(hold)
	f := flows["IPv4"]
	longest := int(bpf.LockstepLsConstLS_FAST_LEN)
	for n, reason := range map[int]string{longest: "fast_held", longest + 1: "held"} {
		f.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(n))
		s := seg{seq: 100, ack: 1100, win: 700, flags: ack, payload: make([]byte, n-54)}
		own(k, f, s.seq, false)
		_, datagram := f.udpFrom(make([]byte, n-42), false)
		for _, frame := range [][]byte{f.from(s), datagram} {
			before := k.counters()
			if k.run(k.LsPriOut, input{frame: frame}); len(frame) != n || k.moved(before)[reason] != 1 {
				t.Errorf("%d bytes: counted %v", len(frame), k.moved(before))
			}
		}
		k.events()
		freeSlots(k)
	}
}
