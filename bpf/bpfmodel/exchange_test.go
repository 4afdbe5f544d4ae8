// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
)

// The simulator's packets go through the table, or through the table and the kernel's
// programs, which have to agree on verdicts, bytes, records and tables.

// fight prepares the duel for the next packet.
func (w *world) fight() *duel {
	w.duel.T, w.duel.now = w.T, int64(w.now)-1 // which counts it up
	return w.duel
}

// tagged is the frame of s with its VLAN's tag in its bytes: PROG_TEST_RUN has none beside them.
func (w *world) tagged(s seg) []byte {
	if w.flow.tci == 0 {
		return s.bytes()
	}
	return slices.Insert(s.bytes(), 12, be.AppendUint16([]byte{0x81, 0}, w.flow.tci)...)
}

func (w *world) untagged(frame []byte) []byte {
	if w.flow.tci == 0 {
		return frame
	}
	return slices.Delete(slices.Clone(frame), 12, 16)
}

func (w *world) inbound(s seg) (bpfmodel.Verdict, []byte) {
	if w.duel == nil {
		frame := s.bytes()
		return w.tab.Inbound(parse(w.T, w.flow, frame, true), int64(w.now)), frame
	}
	d := w.fight()
	v := d.inbound(w.tagged(s))
	d.sameTables()
	return v, w.untagged(d.changed)
}

func (w *world) outbound(s seg) (v bpfmodel.Verdict, sent bool, r bpfmodel.Record, frame []byte) {
	if w.duel == nil {
		frame = s.bytes()
		v, sent = w.tab.Outbound(parse(w.T, w.flow, frame, false), int64(w.now), &r)
		return v, sent, r, frame
	}
	d := w.fight()
	v, sent, r = d.outbound(w.tagged(s))
	d.sameTables()
	return v, sent, r, w.untagged(d.changed)
}

func (w *world) announce(a *bpfmodel.Record) (v bpfmodel.Verdict, sent bool, r bpfmodel.Record) {
	if w.duel == nil {
		v, sent = w.tab.Announce(a, int64(w.now), &r)
		return v, sent, r
	}
	d := w.fight()
	v, sent, r = d.announce(a)
	d.sameTables()
	return v, sent, r
}

// reset is a checkpoint.
func (w *world) reset() {
	w.tab.Reset()
	if w.duel != nil {
		w.duel.k.reset(w.T)
	}
}

// R9, R10 as TestExchange has them, with the kernel's programs beside the model.
func TestKernelExchange(t *testing.T) {
	const size, halves = 4, 4096
	k := loadKernel(t, size, halves)
	rapid.Check(t, func(t *rapid.T) {
		k.reset(t)
		tab := newTable(size, halves)
		w := &world{T: t, tab: tab, duel: &duel{T: t, k: k, tab: tab}, flow: drawFlow(t), used: map[uint32]bool{0: true}}
		w.begin()
		t.Repeat(w.actions())
	})
}
