// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
)

// fill has a guest write at rate into overlays that have room, and a checkpoint empty them
// some time after it was asked for. It returns the least room there was, and how many were
// asked for.
func fill(w *overlayWatch, room, rate int64, checkpoint time.Duration) (least int64, asked int) {
	const base = 400 << 10 // of two empty overlays
	used, empty := int64(base), int64(0)
	least = room
	for now := int64(overlayEvery); now < int64(2*time.Minute); now += int64(overlayEvery) {
		used = min(used+rate/int64(time.Second/overlayEvery), room)
		if empty != 0 && now >= empty {
			used, empty = base, 0
		}
		least = min(least, room-used)
		if _, ask := w.sample(now, []qemu.OverlaySpace{{Dir: "/o", Disks: []string{"d"}, Used: used, Free: room - used}}); ask != "" && empty == 0 {
			asked++
			empty = now + int64(checkpoint)
		}
	}
	return least, asked
}

// TestOverlayWatch: whatever a guest writes, as far as a checkpoint can come in time at
// all, the overlays are never full; one that writes little costs none.
func TestOverlayWatch(t *testing.T) {
	for _, room := range []int64{32 << 20, 1 << 30, 1 << 40} {
		for _, seconds := range []int64{5, 20, 60} { // to fill it all
			for _, checkpoint := range []time.Duration{10 * time.Millisecond, time.Second} {
				name := fmt.Sprintf("%d MiB in %d s, a checkpoint takes %v", room>>20, seconds, checkpoint)
				if least, asked := fill(new(overlayWatch), room, room/seconds, checkpoint); least <= 0 || asked == 0 {
					t.Errorf("%s: %d bytes were left at the worst, %d checkpoints were asked for", name, least, asked)
				} else if most := 120/seconds*4 + 1; int64(asked) > most {
					t.Errorf("%s: %d checkpoints were asked for", name, asked)
				}
				// Mutation: nobody asks.
				if least, _ := fill(&overlayWatch{never: true}, room, room/seconds, checkpoint); least > 0 {
					t.Errorf("%s: never full, though nobody asks", name)
				}
			}
		}
	}
	if _, asked := fill(new(overlayWatch), 1<<30, 1<<10, time.Second); asked != 0 {
		t.Errorf("a guest that writes next to nothing: %d checkpoints were asked for", asked)
	}
	// Somebody else has filled the file system: a checkpoint would free nothing.
	w := new(overlayWatch)
	for i := range int64(10) {
		if _, ask := w.sample(i*int64(time.Second)+1, []qemu.OverlaySpace{{Dir: "/o", Used: 400<<10 + i<<10, Free: 8 << 10}}); ask != "" {
			t.Error("a checkpoint is asked for that frees nothing")
		}
	}
}
