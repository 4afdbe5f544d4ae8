// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// own makes the kernel the owner of f, of which everything below seq has left.
func own(k *kit, f flow, seq uint32) {
	k.Helper()
	if err := k.LsFast.Put(ptr(f.tuple()), &bpf.LockstepLsFast{}); err != nil {
		k.Fatal(err)
	}
	acked := compare.Acked{Ack: 1000, Edge: 1500}
	ctx := bpf.LockstepLsFastCtx{T: f.tuple(), Op: uint32(bpf.LockstepLsFastOpLS_FAST_GRANT), S: core.ToFast(&compare.Handover{
		Inherited: true, Released: seq, TS: true, PVM: acked, SVM: acked, Sent: acked,
	})}
	fastOrder(k, &ctx)
	if ctx.Done == 0 {
		k.Fatal("the kernel does not take the connection")
	}
}

// fastOrder gives the programs an order about a connection's owner.
func fastOrder(k *kit, ctx *bpf.LockstepLsFastCtx) {
	k.Helper()
	b := structBytes(ctx)
	if _, err := k.LsFastOrder.Run(&ebpf.RunOptions{Context: b, ContextOut: b}); err != nil {
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
	k := l.kit(variable("ls_fast_on", 1))
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
					s := seg{seq: r.Uint32(), ack: 1100, win: 700, flags: ack, opts: timestamps(5, 6), payload: randBytes(r, n)}
					v, frame := vnet{}, f.from(s)
					if partial {
						v, frame = f.offloaded(s, frame, 0)
					}
					own(k, f, s.seq)
					k.expect(counts{"fast_held": 1}, func() { l.write(l.tap, v, frame) })

					other := s
					other.ack, other.win, other.opts = 1050, 600, timestamps(9, 4)
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
					want.ack, want.win, want.opts = 1050, 600, timestamps(5, 4)
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
