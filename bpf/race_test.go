// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

// race runs the programs on several threads, n times each.
func race(t *testing.T, n int, fs ...func(i int)) {
	t.Helper()
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(func() {
			for i := range n {
				f(i)
			}
		})
	}
	wg.Wait()
}

func (k *kit) raw(prog *ebpf.Program, frame []byte) uint32 {
	v, err := prog.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, 4096)})
	if err != nil {
		k.Error(err)
	}
	return v
}

// A slot has one owner at a time: it holds the frame of its event, whoever claims
// slots and gives them back meanwhile.
func TestSlotRace(t *testing.T) {
	k := newKit(t)
	k.setMode(hold)
	mem, err := unix.Mmap(k.LsSlots.FD(), 0, nslots*int(unsafe.Sizeof(bpf.LockstepLsSlot{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	slots := unsafe.Slice((*bpf.LockstepLsSlot)(unsafe.Pointer(&mem[0])), nslots)

	const n = 3000
	sender := func(id uint32) func(int) {
		f := flows["IPv4"]
		return func(i int) {
			payload := make([]byte, 700)
			for at := 0; at < len(payload); at += 4 {
				binary.BigEndian.PutUint32(payload[at:], id<<24|uint32(i))
			}
			k.raw(k.LsPriOut, f.from(seg{seq: id<<24 | uint32(i), flags: ack, payload: payload}))
		}
	}
	stop := make(chan struct{})
	var held uint64
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			last := false
			select {
			case <-stop:
				last = true
			default:
			}
			for _, e := range k.events() {
				ev := e.(*bpf.LockstepLsEv)
				if ev.Slot == noSlot {
					continue
				}
				s := &slots[ev.Slot]
				for at := 54; at < int(s.Len); at += 4 {
					if got := binary.BigEndian.Uint32(s.Data[at:]); got != ev.Seq {
						t.Errorf("slot %d has %#x at %d, want %#x", ev.Slot, got, at, ev.Seq)
						break
					}
				}
				if !atomic.CompareAndSwapUint32(&s.State, 2, 0) {
					t.Errorf("slot %d of an event was in state %d", ev.Slot, s.State)
				}
				held++
			}
			if last {
				return
			}
		}
	})
	race(t, n, sender(1), sender(2), sender(3))
	close(stop)
	reader.Wait()
	c := k.counters()
	if c["held"] != held || c["held"]+c["no_slot"]+c["no_ring"] != 3*n || held < 40 {
		t.Errorf("%d events, counted %v", held, c)
	}
	if n := k.used(); n != 0 {
		t.Errorf("%d slots left", n)
	}
}

// An announcement and the SVM's SYN|ACK meet: the one that comes second, or both, inform P.
func TestPairRace(t *testing.T) {
	k := newKit(t, func(spec *ebpf.CollectionSpec) { spec.Maps["ls_half"].MaxEntries = 1 << 14 })
	k.setMode(run)
	const n = 2000
	var sent [2][n]bool
	port := func(i int) flow {
		f := flows["IPv4"]
		f.remote = netip.AddrPortFrom(f.remote.Addr(), uint16(i))
		return f
	}
	var at [2]atomic.Int64
	meet := func(me, i int) {
		for at[me].Store(int64(i)); at[1-me].Load() < int64(i); {
			runtime.Gosched()
		}
	}
	race(t, n,
		func(i int) { meet(0, i); sent[0][i] = k.raw(k.LsSecOut, port(i).from(svmSynAck)) == redirect },
		func(i int) { meet(1, i); sent[1][i] = k.raw(k.LsSecIn, k.announcement(port(i), pvmSynAck)) == redirect })
	both := 0
	for i := range n {
		if !sent[0][i] && !sent[1][i] {
			t.Fatalf("connection %d: P was not informed", i)
		}
		if sent[0][i] && sent[1][i] {
			both++
		}
	}
	t.Logf("both informed P of %d of %d", both, n)
}
