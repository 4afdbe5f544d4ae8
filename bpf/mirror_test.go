// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/bpf"
)

// cli is what the mirror keeps of f's remote, nil for nothing.
func (k *kit) cli(t bpf.LockstepLsTuple) *bpf.LockstepLsCli {
	k.Helper()
	var c bpf.LockstepLsCli
	if err := k.LsCli.Lookup(t, &c); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	} else if err != nil {
		k.Fatal(err)
	}
	return &c
}

// wantCli is what must be kept of s, whose frame is frame.
func wantCli(s *sample) *bpf.LockstepLsCli {
	c := &bpf.LockstepLsCli{
		Seq: s.pos + uint32(s.n) + uint32(s.seg.flags&syn>>1), Ack: s.seg.ack, Win: s.seg.win, TcpFlags: s.seg.flags,
		L4Off: uint16(s.l4), HdrLen: uint16(s.pay),
	}
	copy(c.Hdr[:], s.frame[:s.pay])
	return c
}

func (k *kit) sameCli(t bpf.LockstepLsTuple, want *bpf.LockstepLsCli) {
	k.Helper()
	got := k.cli(t)
	if got != nil && want != nil {
		if got.At == 0 {
			k.Error("entry without time")
		}
		clear(got.Hdr[got.HdrLen:]) // of hdr only hdr_len bytes count
		want.At = got.At
	}
	if diff := cmp.Diff(want, got); diff != "" {
		k.Errorf("ls_cli (-want +got):\n%s", diff)
	}
}

// Everything for the guest is mirrored as it is; of TCP the newest segment is kept,
// and nothing else is reported.
func TestLiveMirrorSamples(t *testing.T) {
	l := newLab(t)
	l.jumbo()
	k := l.kit()
	for _, s := range samples(false) {
		for _, m := range []bpf.LockstepLsMode{shut, run, park} {
			k.setMode(m)
			k.check(k.LsMirror, s.frame, drop, "shut")
		}
		k.setMode(solo)
		k.check(k.LsMirror, s.frame, next, "passed")
		if s.class == isTCP {
			if err := k.LsCli.Delete(s.tuple()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				t.Fatal(err)
			}
		}
		k.setMode(hold)
		k.check(k.LsMirror, s.frame, next, "mirrored")
		if s.class == isTCP {
			k.sameCli(s.tuple(), wantCli(s))
		}
		k.none()
		k.expect(counts{"released": 1}, func() {
			if v, out, mark := k.run(k.LsMirror, input{frame: s.frame, mark: markRel}); v != redirect || mark != markRel || !bytes.Equal(out, s.frame) {
				t.Errorf("verdict %d, mark %#x, frame\n% x", int32(v), mark, out)
			}
		})
		// For the PVM alone: it is not mirrored, and not kept as the newest segment.
		for m, want := range map[bpf.LockstepLsMode]string{hold: "sacked", solo: "shut", shut: "shut"} {
			k.setMode(m)
			k.expect(counts{want: 1}, func() {
				v, out, mark := k.run(k.LsMirror, input{frame: s.frame, mark: markIn})
				if mark != 0 || v != map[string]uint32{"sacked": next, "shut": drop}[want] || !bytes.Equal(out, s.frame) {
					t.Errorf("mode %d: verdict %d, mark %#x, frame\n% x", m, int32(v), mark, out)
				}
			})
			k.none()
		}
		if t.Failed() {
			t.Fatal(s.name)
		}
	}
}

// R6: a segment's ack decides whether it is the newest one.
func TestLiveClientKept(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	for family, f := range flows {
		var kept *bpf.LockstepLsCli
		receives := func(news bool, s seg) {
			t.Helper()
			frame := f.to(s)
			k.check(k.LsMirror, frame, next, "mirrored")
			if news {
				was := kept
				kept = wantCli(&sample{frame: frame, pos: s.seq, n: len(s.payload), l4: f.l4(s), pay: f.l4(s) + 20 + len(s.opts), seg: s})
				if was != nil {
					if kept.Reused = was.Reused; s.flags&syn != 0 && was.TcpFlags&syn == 0 {
						kept.Reused = 1 // the ports of one that was there just now
					}
				}
			}
			k.sameCli(f.tuple(), kept)
			if evs := k.events(); len(evs) != int(s.flags&syn>>1|s.flags&fin|s.flags&rst>>2) {
				t.Errorf("%d events", len(evs))
			}
		}
		const ackOf = 0xf0000000 // behind 0 in sequence space: a SYN's ack means nothing
		ts := timestamps(1, 2)
		receives(true, seg{seq: 100, flags: syn, win: 5, opts: withTS(1, 0)})
		receives(true, seg{seq: 101, ack: ackOf, flags: ack, win: 6, opts: ts})
		receives(true, seg{seq: 101, ack: ackOf, flags: ack | psh, win: 7, opts: ts, payload: []byte("request")})
		receives(false, seg{seq: 108, ack: ackOf - 1, flags: ack, win: 8})
		receives(false, seg{seq: 108, flags: psh, win: 8}) // no ACK
		receives(true, seg{seq: 50, ack: ackOf, flags: ack, win: 9})
		receives(true, seg{seq: 108, ack: 10, flags: ack, win: 10, opts: ts}) // over the wrap
		receives(false, seg{seq: 108, ack: ackOf, flags: ack, win: 11})
		receives(true, seg{seq: 108, ack: 10, flags: fin | ack, win: 12})
		receives(true, seg{seq: 109, flags: rst})
		receives(true, seg{seq: 109, ack: ackOf, flags: ack}) // after a RST that was ignored
		receives(true, seg{seq: 109, ack: 0x30000000, flags: rst | ack})
		receives(true, seg{seq: 109, ack: ackOf, flags: ack})
		receives(true, seg{seq: 7, flags: syn}) // begins anew
		receives(true, seg{seq: 8, ack: 5, flags: ack})
		receives(true, seg{seq: 7, ack: 3, flags: syn | ack})
		if t.Failed() {
			t.Fatal(family)
		}
	}
}

// A FIN of the remote that cannot be reported to user space reaches neither guest.
func TestLiveMirrorFull(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	f := flows["IPv4"]
	k.check(k.LsMirror, f.to(seg{flags: ack}), next, "mirrored")
	for k.counters()["no_ring"] == 0 {
		k.run(k.LsMirror, input{frame: f.to(seg{flags: fin | ack})})
	}
	k.check(k.LsMirror, f.to(seg{flags: fin | ack}), drop, "no_ring")
	k.check(k.LsMirror, f.to(seg{flags: ack}), next, "mirrored")
}
