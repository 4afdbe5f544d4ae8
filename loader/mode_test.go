// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"sync"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// lateRecord reports whether an SVM that sends large frames without pause was recorded, in one
// of so many turns, after SetMode(ModeQuiet) had returned: the record may then be
// confirmed, and what it is of leave, though S takes over (R21).
func lateRecord(t *testing.T, h *hosts, turns int) bool {
	c, err := newPacketConn(linkOf(t, "guestS").Attrs().Index, 0)
	check(t, err)
	defer c.close()
	e := compare.Effect{Seq: 1 << 20, Ack: 1, Win: 2, Flags: compare.ACK}
	pay := randomBytes(60000)
	head, ok := core.BuildHeader(newHead(), l2l3(false, 0), []byte{0, 80, 0, 81}, &e, core.EthVLAN, 0, len(pay), gsoSegment)
	if !ok {
		t.Fatal("refused")
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.Queue(head, pay)
				_, _ = c.flush() // one that finds no room is one less
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	count := func(r bpf.LockstepLsReason) uint64 {
		n, err := h.s.counter(uint32(r))
		check(t, err)
		return n
	}
	// Copies soon find no slot, which does not affect records.
	records := func() uint64 {
		return count(bpf.LockstepLsReasonLS_R_copyLost) + count(bpf.LockstepLsReasonLS_R_recordOut)
	}
	grows := func(f func() uint64) {
		for was := f(); f() == was; {
		}
	}
	for range turns {
		check(t, h.s.SetMode(datapath.ModeRun))
		grows(records)
		check(t, h.s.SetMode(datapath.ModeQuiet))
		was := records()
		grows(func() uint64 { return count(bpf.LockstepLsReasonLS_R_shut) })
		grows(func() uint64 { return count(bpf.LockstepLsReasonLS_R_shut) })
		if records() != was {
			return true
		}
	}
	return false
}

// TestQuietAtOnce: when SetMode returns no program goes by the mode before.
func TestQuietAtOnce(t *testing.T) {
	h := newHosts(t)
	if lateRecord(t, h, 10) {
		t.Error("a record was made after SetMode had returned")
	}
}

// TestMutationWait: without the wait TestQuietAtOnce fails.
func TestMutationWait(t *testing.T) {
	h := newHosts(t)
	h.s.skipWait = true
	if !lateRecord(t, h, 10000) {
		t.Error("no record was made after a SetMode that does not wait")
	}
}
