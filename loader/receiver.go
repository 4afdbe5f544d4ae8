// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// batch bounds the events of one Poll.
const batch = 256

// receiver turns the records in the kernel's ring into events.
type receiver struct {
	core.Decoder
	ring     *ringbuf.Reader
	waiter   *waiter
	counters *counters
	buffers  [batch]core.Buffer // until the next Poll
	record   ringbuf.Record
}

func newReceiver(ring *ebpf.Map, f *core.Store, c *counters) (*receiver, error) {
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return nil, fmt.Errorf("ring: %w", err)
	}
	reader.SetDeadline(time.Unix(1, 0)) // in the past: only the waiter waits
	w, err := newWaiter(ring.FD())
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return &receiver{Decoder: core.Decoder{Frames: f}, ring: reader, waiter: w, counters: c}, nil
}

func (r *receiver) close() error { return errors.Join(r.ring.Close(), r.waiter.close()) }

// Wake implements [datapath.NIC].
func (r *receiver) Wake() { r.waiter.wakeUp() }

// Poll implements [datapath.NIC].
func (r *receiver) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	if r.ring.AvailableBytes() == 0 {
		if err := r.waiter.wait(wait); err != nil {
			return evs, err
		}
	}
	for i := 0; i < batch && r.ring.AvailableBytes() > 0; i++ {
		b := &r.buffers[i]
		r.record.RawSample = core.BytesOf(&b.Sample)[:0]
		if err := r.ring.ReadInto(&r.record); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break // there were only discarded ones
			}
			return evs, fmt.Errorf("read ring: %w", err)
		}
		var ok bool
		if evs, ok = r.Event(b, len(r.record.RawSample), evs); !ok {
			r.counters.lost.events.Add(1)
		}
	}
	return evs, nil
}

// discard reads the ring empty.
func (r *receiver) discard() error {
	r.ring.SetDeadline(time.Now())
	rec := ringbuf.Record{RawSample: core.BytesOf(&r.buffers[0].Sample)[:0]}
	for {
		err := r.ring.ReadInto(&rec)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ring: %w", err)
		}
	}
}
