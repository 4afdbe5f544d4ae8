// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// fastPath hands connections over to the kernel and takes them back (R27).
type fastPath struct {
	table   *ebpf.Map      // ls_fast
	order   *ebpf.Program  // ls_fast_order
	buckets *core.Buckets  // of datagrams
	on      *ebpf.Variable // ls_fast_on
	decoder *core.Decoder
	seen    *core.Numbers // of its events
	answer  [4096]byte    // room for an order's
}

func newFastPath(objs *bpf.LockstepObjects, d *core.Decoder) *fastPath {
	d.Seen = core.NewNumbers()
	f := &fastPath{table: objs.LsFast, order: objs.LsFastOrder, on: objs.LsFastOn, decoder: d, seen: d.Seen}
	f.buckets = core.NewBuckets(func(ctx *bpf.LockstepLsBucketCtx) error { return f.run(objs.LsBucketOrder, core.BytesOf(ctx)) })
	d.Buckets = f.buckets
	return f
}

// SetFast implements [datapath.FastPath].
func (f *fastPath) SetFast(on bool) error {
	v := uint32(0)
	if on {
		v = 1
	}
	if err := f.on.Set(v); err != nil {
		return fmt.Errorf("switch the fast path: %w", err)
	}
	return nil
}

// Grant implements [datapath.FastPath].
func (f *fastPath) Grant(t compare.Tuple, h *compare.Handover) (bool, error) {
	key := core.ToTuple(t)
	seen, known := f.seen.Of(t)
	if !known {
		// Its events are numbered from now on. Those that are on their way are not.
		if err := f.table.Update(&key, &bpf.LockstepLsFast{}, ebpf.UpdateAny); err != nil {
			return false, fmt.Errorf("fast path: %w", err)
		}
		f.seen.Begin(t)
		return false, nil
	}
	ctx := bpf.LockstepLsFastCtx{T: key, Op: uint32(bpf.LockstepLsFastOpLS_FAST_GRANT), S: core.ToFast(h)}
	ctx.S.Number = seen
	if err := f.run(f.order, core.BytesOf(&ctx)); err != nil {
		return false, err
	}
	if ctx.Done == 0 && f.seen.Refused(t) {
		return false, f.Forget(t) // an event was lost, and its number is never seen
	}
	return ctx.Done != 0, nil
}

// Take implements [datapath.FastPath].
func (f *fastPath) Take(t compare.Tuple, evs []compare.Event) (*compare.Handover, []compare.Event, error) {
	ctx := bpf.LockstepLsFastCtx{T: core.ToTuple(t), Op: uint32(bpf.LockstepLsFastOpLS_FAST_TAKE)}
	if err := f.run(f.order, core.BytesOf(&ctx)); err != nil {
		return nil, evs, err
	}
	if ctx.Done == 0 {
		return nil, evs, fmt.Errorf("fast path: the kernel does not know %v", t)
	}
	h, evs := f.decoder.Fast(&ctx, evs)
	return h, evs, nil
}

// Forget implements [datapath.FastPath].
func (f *fastPath) Forget(t compare.Tuple) error {
	key := core.ToTuple(t)
	f.seen.End(t)
	if err := f.table.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("fast path: %w", err)
	}
	return nil
}

// TakeDatagrams implements [datapath.FastPath].
func (f *fastPath) TakeDatagrams(evs []compare.Event) ([]compare.Event, error) {
	return f.buckets.All(f.decoder, bootTime(), evs)
}

// Even implements [datapath.FastPath].
func (f *fastPath) Even(t compare.Tuple, now int64) error { return f.buckets.Even(t, now) }

// run has a program carry out the order in b, which has the answer afterwards.
func (f *fastPath) run(order *ebpf.Program, b []byte) error {
	opts := ebpf.RunOptions{Data: b, DataOut: f.answer[:]}
	if _, err := order.Run(&opts); err != nil {
		return fmt.Errorf("fast path: %w", err)
	}
	if n := copy(b, opts.DataOut); n != len(b) {
		return fmt.Errorf("fast path: %d bytes of an answer", n)
	}
	return nil
}

// ForgetAll implements [datapath.FastPath].
func (f *fastPath) ForgetAll() error {
	f.seen.EndAll()
	if err := empty[bpf.LockstepLsFast](f.table); err != nil {
		return fmt.Errorf("fast path: %w", err)
	}
	return nil
}
