// SPDX-License-Identifier: Apache-2.0

package loadertest

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -go-package loadertest -target bpfel -output-stem impair impair impair.bpf.c -- -std=gnu11 -O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

import (
	"bytes"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Devices of the namespace in the middle of an Impaired peer link: the ends of
// peerP's and peerS's cables.
const MidP, MidS = "midP", "midS"

// The long way of reordered frames: those for S enter at slowP and come out of
// slowS, where a socket takes them. The others go the other way.
const slowP, slowS = "slowP", "slowS"

// slowness is how long a reordered frame stays behind.
const slowness = time.Millisecond

// Direction of frames on the peer link.
type Direction uint32

// Directions, as in enum ls_dir of abi.h.
const (
	P2S Direction = iota
	S2P
)

// Rates of one direction, per mille of its frames.
type Rates struct{ Loss, Duplicate, Reorder int }

// Filter chooses frames: records by type, mirrored TCP segments by flags.
type Filter struct {
	Types []uint8 // enum ls_rec_type of abi.h
	// Segments whose flags under TCPMask are TCPFlags; a mask of 0 chooses none.
	TCPMask, TCPFlags uint8
	Pure              bool // only segments without payload
}

// AllOf is the number for Drop to drop every frame.
const AllOf = math.MaxInt64

// Impair makes the peer link of an Impaired world bad. It begins good.
type Impair struct{ objs impairObjects }

// Set sets a direction's rates. The seed decides which frames are hit.
func (i *Impair) Set(t testing.TB, d Direction, r Rates, seed uint32) {
	t.Helper()
	rule := impairRule{Loss: uint32(r.Loss), Dup: uint32(r.Duplicate), Reorder: uint32(r.Reorder), Seed: seed}
	if err := i.objs.Rules.Put(uint32(d), &rule); err != nil {
		t.Fatalf("set rates: %v", err)
	}
}

// Drop drops the next n frames of a direction that f chooses; 0 ends it.
func (i *Impair) Drop(t testing.TB, d Direction, f Filter, n int64) {
	t.Helper()
	filter := impairFilter{Mask: f.TCPMask, Flags: f.TCPFlags, Budget: n}
	for _, typ := range f.Types {
		filter.Types |= 1 << typ
	}
	if f.Pure {
		filter.Pure = 1
	}
	if err := i.objs.Filters.Put(uint32(d), &filter); err != nil {
		t.Fatalf("set filter: %v", err)
	}
}

// ImpairCounts is what became of a direction's frames.
type ImpairCounts struct {
	Seen, Lost, Duplicated, Reordered, Filtered uint64
	Types                                       [16]uint64 // seen, by record type; 0: mirrored frames
}

// Counts are a direction's counters.
func (i *Impair) Counts(t testing.TB, d Direction) ImpairCounts {
	t.Helper()
	var c impairCounts
	if err := i.objs.Counted.Lookup(uint32(d), &c); err != nil {
		t.Fatalf("read counts: %v", err)
	}
	return ImpairCounts{Seen: c.Seen, Lost: c.Lost, Duplicated: c.Dup, Reordered: c.Reordered, Filtered: c.Filtered, Types: c.Types}
}

// addImpair attaches the programs to the devices of namespace ns.
func addImpair(t testing.TB, ns string) *Impair {
	t.Helper()
	i := new(Impair)
	spec, err := loadImpair()
	if err != nil {
		t.Fatal(err)
	}
	out := [...]int{P2S: Index(t, ns, MidS), S2P: Index(t, ns, MidP)}
	slow := [...]int{P2S: Index(t, ns, slowP), S2P: Index(t, ns, slowS)}
	for name, devs := range map[string][2]int{"out": out, "slow": slow} {
		if err := spec.Variables[name].Set([]uint32{uint32(devs[0]), uint32(devs[1])}); err != nil {
			t.Fatal(err)
		}
	}
	if err := spec.LoadAndAssign(&i.objs, nil); err != nil {
		t.Fatalf("load impair: %v", err)
	}
	t.Cleanup(func() { i.objs.Close() })
	In(t, ns, func() {
		for dev, prog := range map[int]*ebpf.Program{out[S2P]: i.objs.ImpairP2s, out[P2S]: i.objs.ImpairS2p} {
			l, err := link.AttachTCX(link.TCXOptions{Interface: dev, Program: prog, Attach: ebpf.AttachTCXIngress})
			if err != nil {
				t.Fatalf("attach impair: %v", err)
			}
			t.Cleanup(func() { l.Close() })
		}
	})
	delay(t, ns, slow[S2P], out[P2S])
	delay(t, ns, slow[P2S], out[S2P])
	return i
}

// delay passes on what comes in at one device to another, later. A VLAN tag
// would get lost.
func delay(t testing.TB, ns string, from, to int) {
	t.Helper()
	fd := packetSocket(t, ns, from)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		t.Fatalf("packet socket: %v", err) // partial checksums stay partial
	}
	var waiting sync.WaitGroup
	receive(t, fd, false, func(frame, _ []byte) {
		f := bytes.Clone(frame)
		waiting.Add(1)
		time.AfterFunc(slowness, func() {
			defer waiting.Done()
			unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: to}) // an error is a loss
		})
	}, waiting.Wait)
}
