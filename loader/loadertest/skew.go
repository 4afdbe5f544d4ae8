// SPDX-License-Identifier: Apache-2.0

package loadertest

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -go-package loadertest -target bpfel -output-stem skew skew skew.bpf.c -- -std=gnu11 -O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// Skew is the skew on one guest's link.
type Skew struct{ objs skewObjects }

// Counts are the segments changed on their way out and in, and the connections
// whose skewed ISN lies just below 2^32.
func (s *Skew) Counts(t testing.TB) (out, in, wrapping uint64) {
	t.Helper()
	for v, p := range map[*ebpf.Variable]*uint64{s.objs.Skewed: &out, s.objs.Unskewed: &in, s.objs.Wrapping: &wrapping} {
		if err := v.Get(p); err != nil {
			t.Fatal(err)
		}
	}
	return out, in, wrapping
}

// LoseTime has the guest's clock of TCP timestamps fall behind by so many ticks.
func (s *Skew) LoseTime(t testing.TB, ticks uint32) {
	t.Helper()
	if err := s.objs.Behind.Set(ticks); err != nil {
		t.Fatal(err)
	}
}

// Wrap has connections made from now on begin so many positions below 2^32, and their
// timestamps so many ticks; 0: anywhere.
func (s *Skew) Wrap(t testing.TB, positions, ticks uint32) {
	t.Helper()
	for v, n := range map[*ebpf.Variable]uint32{s.objs.WrapSeq: positions, s.objs.WrapTs: ticks} {
		if err := v.Set(n); err != nil {
			t.Fatal(err)
		}
	}
}

// Copy gives connections the numbers that they have in the other guest, as a checkpoint
// would: Linux's timestamps are a function of the addresses and the time, and both guests
// run on one kernel.
func (s *Skew) Copy(t testing.TB, of *Skew) {
	t.Helper()
	var k skewKey
	var from, to skewSkew
	all := of.objs.Skews.Iterate()
	for all.Next(&k, &from) {
		if err := s.objs.Skews.Lookup(&k, &to); err != nil {
			continue // it has no such connection
		}
		to.Seq, to.Ts = from.Isn+from.Seq-to.Isn, from.Ts
		if err := s.objs.Skews.Put(&k, &to); err != nil {
			t.Errorf("copy the numbers of a connection: %v", err)
		}
	}
	if err := all.Err(); err != nil {
		t.Errorf("copy the numbers of connections: %v", err)
	}
}

// AddSkew attaches the skew to a device of namespace ns.
func AddSkew(t testing.TB, ns, device string) *Skew {
	t.Helper()
	s := new(Skew)
	In(t, ns, func() {
		if err := loadSkewObjects(&s.objs, nil); err != nil {
			t.Fatalf("load skew: %v", err)
		}
		t.Cleanup(func() { s.objs.Close() })
		dev, err := netlink.LinkByName(device)
		if err != nil {
			t.Fatalf("%s in %s: %v", device, ns, err)
		}
		for prog, at := range map[*ebpf.Program]ebpf.AttachType{
			s.objs.SkewOut: ebpf.AttachTCXEgress, s.objs.SkewIn: ebpf.AttachTCXIngress,
		} {
			l, err := link.AttachTCX(link.TCXOptions{Interface: dev.Attrs().Index, Program: prog, Attach: at})
			if err != nil {
				t.Fatalf("attach skew: %v", err)
			}
			t.Cleanup(func() { l.Close() })
		}
	})
	return s
}
