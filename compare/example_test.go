// SPDX-License-Identifier: Apache-2.0

package compare_test

import (
	"crypto/rand"
	"fmt"

	"github.com/lockstep-ft/lockstep/compare"
)

// A datagram of the PVM is held in its slot until the SVM has transmitted an equal one.
func ExamplePrimary() {
	keys, err := compare.NewKeys(rand.Reader)
	if err != nil {
		fmt.Println(err)
		return
	}
	p := compare.NewPrimary(compare.Config{}, keys)
	payload := []byte("four and twenty")
	datagram := compare.Segment{
		Tuple: compare.Tuple{GuestPort: 53, RemotePort: 4711, Proto: 17}, Datagram: true,
		Len: uint32(len(payload)), Sum: keys.Sum(0, payload), Slot: compare.NoSlot,
	}

	fromPVM := datagram
	fromPVM.Slot, fromPVM.Payload = 7, payload
	effects := p.Step(1000, &compare.Event{Kind: compare.EvPVM, Seg: fromPVM}, nil)
	fmt.Println(len(effects), "effects,", p.Stats().HeldPackets, "held")

	effects = p.Step(2000, &compare.Event{Kind: compare.EvSVM, Seg: datagram}, nil)
	fmt.Println(effects[0].Op == compare.OpForward, "slot", effects[0].Slot)
	// Output:
	// 0 effects, 1 held
	// true slot 7
}
