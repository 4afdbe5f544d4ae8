// SPDX-License-Identifier: Apache-2.0

package loadertest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestImpair: the bad link does what it counts, and the same again for
// the same seed.
func TestImpair(t *testing.T) {
	NeedRoot(t)
	w := NewWorld(t, Impaired)
	// A frame of the hosts' own would take a place in the sequence.
	for _, ns := range []string{w.HostP, w.HostS} {
		Run(t, "nsenter", "--net=/run/netns/"+ns, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	}
	// Frames sent on two CPUs may overtake each other before the program sees them.
	OneCPU(t)
	const n, ethertype = 2000, 0x88b6
	frame := func(i int) []byte {
		f := make([]byte, 60)
		binary.BigEndian.PutUint16(f[12:], ethertype)
		binary.BigEndian.PutUint32(f[14:], uint32(i))
		return f
	}
	ours := func(f []byte) bool { return binary.BigEndian.Uint16(f[12:]) == ethertype }
	for dir, ends := range map[Direction][2]string{P2S: {w.HostP, w.HostS}, S2P: {w.HostS, w.HostP}} {
		devices := [2]string{"peerP", "peerS"}
		if dir == S2P {
			devices = [2]string{"peerS", "peerP"}
		}
		from, to := OpenWire(t, ends[0], devices[0]), OpenWire(t, ends[1], devices[1])
		var first []uint32
		for round := range 2 {
			before := w.Impair.Counts(t, dir)
			to.Forget()
			w.Impair.Set(t, dir, Rates{Loss: 50, Duplicate: 50, Reorder: 50}, 7)
			for i := range n {
				from.Send(t, frame(i))
			}
			var c ImpairCounts
			Eventually(t, 10*time.Second, func() (bool, string) {
				c = w.Impair.Counts(t, dir)
				came := uint64(len(to.Frames(ours)))
				lost, dup := c.Lost-before.Lost, c.Duplicated-before.Duplicated
				return c.Seen-before.Seen >= n && came == n-lost+dup, fmt.Sprintf("%d frames of %d, %d lost, %d doubled", came, n, lost, dup)
			})
			var order []uint32
			for _, f := range to.Frames(ours) {
				order = append(order, binary.BigEndian.Uint32(f[14:]))
			}
			for what, hits := range map[string]uint64{"lost": c.Lost - before.Lost, "duplicated": c.Duplicated - before.Duplicated, "reordered": c.Reordered - before.Reordered} {
				if hits < n*50/1000/2 || hits > n*50/1000*2 {
					t.Errorf("%d frames %s, want about %d", hits, what, n*50/1000)
				}
			}
			if slices.IsSorted(order) {
				t.Error("every frame came in its place")
			}
			slices.Sort(order)
			if round == 0 {
				first = order
			} else if !slices.Equal(order, first) {
				t.Error("the same seed hit other frames")
			}
		}
		before := w.Impair.Counts(t, dir)
		w.Impair.Set(t, dir, Rates{}, 0)
		to.Forget()
		record := make([]byte, 200)
		copy(record[12:], []byte{0x88, 0xb5, 'L', 'S', 18, 0})
		record[18+9] = 8
		w.Impair.Drop(t, dir, Filter{Types: []uint8{8}}, 2)
		for range 5 {
			from.Send(t, record)
		}
		Eventually(t, 10*time.Second, func() (bool, string) {
			came := to.Count("LS")
			return came >= 3, fmt.Sprint(came, " records")
		})
		if c := w.Impair.Counts(t, dir); c.Filtered-before.Filtered != 2 || c.Types[8]-before.Types[8] != 5 || to.Count("LS") != 3 {
			t.Errorf("of 5 records %d came, 2 were to be dropped: %+v", to.Count("LS"), c)
		}
	}
}
