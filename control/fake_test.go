// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// fakePath is a data path without a kernel: a test puts events in and looks at
// what the daemon did, in order.
type fakePath struct {
	lease int64 // of SetLeaseUntil
	mac   net.HardwareAddr
	wake  chan struct{}

	mu      sync.Mutex
	events  []compare.Event
	trace   []string // modes, epochs, resets, sends...
	changed chan struct{}
	session datapath.Session
	mode    datapath.Mode
	nextIn  compare.Slot // slots given out
	drain   func(context.Context) error
	offsets map[compare.Tuple]datapath.Offset
	failure error
	closed  bool
	echoed  int64
	edges   []datapath.Edge
	known   func(int)

	adopted  *datapath.Recovered
	acked    map[compare.Tuple]uint32
	intruder string
	onTap    bool
	tapDown  bool
	orderErr error
}

func newFakePath(last byte) *fakePath {
	return &fakePath{
		lease: 1, mac: net.HardwareAddr{2, 0, 0, 0, 0, last}, wake: make(chan struct{}, 1),
		changed: make(chan struct{}), offsets: make(map[compare.Tuple]datapath.Offset),
	}
}

func (f *fakePath) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trace = append(f.trace, fmt.Sprintf(format, args...))
	f.signal()
	return f.failure
}

func (f *fakePath) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakePath) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		f.mu.Lock()
		switch {
		case f.closed:
			f.mu.Unlock()
			return evs, os.ErrClosed
		case f.failure != nil:
			defer f.mu.Unlock()
			return evs, f.failure
		case len(f.events) > 0:
			evs = append(evs, f.events...)
			f.events = nil
			f.mu.Unlock()
			return evs, nil
		}
		f.mu.Unlock()
		select {
		case <-f.wake:
			return evs, nil
		case <-t.C:
			return evs, nil
		}
	}
}

func (f *fakePath) Wake() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *fakePath) Apply(effs []compare.Effect) error {
	for i := range effs {
		switch e := &effs[i]; e.Op {
		case compare.OpSend:
			f.note("send %d+%d", e.Seq, e.To-e.From)
		case compare.OpDeliver:
			f.note("deliver %d", e.Slot)
		case compare.OpCheckpoint, compare.OpAdopt, compare.OpAsk, compare.OpAnnounce, compare.OpQuery, compare.OpRemirror:
		default:
			f.note("op %d slot %d %v", e.Op, e.Slot, e.Reason)
		}
	}
	return nil
}

func (f *fakePath) Now() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return ts.Nano()
}

func (f *fakePath) SetMode(m datapath.Mode) error {
	f.mu.Lock()
	f.mode = m
	f.mu.Unlock()
	return f.note("mode %s", [...]string{"shut", "hold", "run", "park", "solo", "quiet"}[m])
}
func (f *fakePath) SetEpoch(e uint32) error {
	f.mu.Lock()
	f.session.Epoch = e
	f.mu.Unlock()
	return f.note("epoch %d", e)
}
func (f *fakePath) SetLeaseUntil(at int64) error {
	f.mu.Lock()
	f.lease = at
	f.mu.Unlock()
	return f.note("speak")
}
func (f *fakePath) SetLeaseDuration(time.Duration) error { return f.note("speak") }
func (f *fakePath) MarkStop() error                      { return f.note("mark") }

// Echo comes back at once.
func (f *fakePath) RequestEcho() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.echoed = f.Now()
	return nil
}

func (f *fakePath) LastEcho() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.echoed
}
func (f *fakePath) TakeOver(uint32, bool) error     { return f.note("take over") }
func (f *fakePath) Edges() ([]datapath.Edge, error) { return f.edges, nil }
func (f *fakePath) AddEdges(e []datapath.Edge) error {
	f.mu.Lock()
	f.edges = append(f.edges, e...)
	n := len(f.edges)
	f.mu.Unlock()
	if f.known != nil {
		f.known(n)
	}
	return nil
}
func (f *fakePath) InstallSession(s datapath.Session) error {
	f.mu.Lock()
	f.session = s
	f.mu.Unlock()
	if s.Rotated {
		return f.note("rotated %d", s.Term)
	}
	return f.note("session %d", s.Term)
}
func (f *fakePath) ResetOffsets() error { return f.note("reset") }

func (f *fakePath) Sweep(linger, idle time.Duration) (int, error) { return 0, nil }

func (f *fakePath) DrainTap(ctx context.Context) error {
	f.mu.Lock()
	drain := f.drain
	f.mu.Unlock()
	if drain == nil {
		return nil
	}
	return drain(ctx)
}
func (f *fakePath) MAC() net.HardwareAddr { return f.mac }
func (f *fakePath) Counters() (map[string]uint64, error) {
	return map[string]uint64{"held": 7, "no_slot": 2, "muted": 0}, nil
}
func (f *fakePath) Offsets(yield func(compare.Tuple, datapath.Offset)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for t, o := range f.offsets {
		yield(t, o)
	}
	return nil
}
func (f *fakePath) Programs() []datapath.Program {
	return []datapath.Program{{Name: "ls_mirror", Device: "tap0", Attach: "tcx-egress"}}
}
func (f *fakePath) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

// put gives the daemon an event.
func (f *fakePath) put(ev compare.Event) {
	f.mu.Lock()
	f.events = append(f.events, ev)
	f.mu.Unlock()
	f.Wake()
}

// fail makes every further call fail.
func (f *fakePath) fail(err error) {
	f.mu.Lock()
	f.failure = err
	f.mu.Unlock()
	f.Wake()
}

// mark is a place in the trace.
func (f *fakePath) mark() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.trace)
}

// since is the trace from a mark on.
func (f *fakePath) since(mark int) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.trace[mark:])
}

// await returns when the trace from mark on holds all of want, in this order.
func (f *fakePath) await(t *testing.T, mark int, want ...string) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		f.mu.Lock()
		changed, trace := f.changed, f.trace[mark:]
		i := 0
		for _, line := range trace {
			if i < len(want) && line == want[i] {
				i++
			}
		}
		f.mu.Unlock()
		if i == len(want) {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			t.Fatalf("waited for %q, saw %q", want[i], f.since(mark))
		}
	}
}

var testTuple = compare.Tuple{
	Guest:     [16]byte{10: 0xff, 11: 0xff, 12: 10, 15: 2},
	Remote:    [16]byte{10: 0xff, 11: 0xff, 12: 10, 15: 9},
	GuestPort: 80, RemotePort: 40000, Proto: unix.IPPROTO_TCP,
}

// segment is data of testTuple, n bytes from seq on.
func (f *fakePath) segment(seq uint32, b []byte) compare.Segment {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nextIn++
	return compare.Segment{
		Tuple: testTuple, Seq: seq, Len: uint32(len(b)), Ack: 1, Win: 1000, Flags: compare.ACK | compare.PSH,
		Sum: f.session.Digest.Sum(seq, b), Slot: f.nextIn, Payload: b,
	}
}

// pvm has the PVM say b at seq, captured now.
func (f *fakePath) pvm(seq uint32, b string) {
	s := f.segment(seq, []byte(b))
	s.At = f.Now()
	f.put(compare.Event{Kind: compare.EvPVM, Seg: s})
}

// svm brings the record of the SVM's saying b at seq in an epoch.
func (f *fakePath) svm(epoch, seq uint32, b string) {
	s := f.segment(seq, []byte(b))
	s.Slot, s.Payload, s.Inherited, s.Epoch = compare.NoSlot, nil, true, epoch
	f.put(compare.Event{Kind: compare.EvSVM, Seg: s})
}

func (f *fakePath) Recovered() *datapath.Recovered {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.adopted
}

func (f *fakePath) CheckOrder() (string, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.intruder, f.onTap, f.orderErr
}

// SetTap notes changes: the tap is up at first.
func (f *fakePath) SetTap(up bool) error {
	f.mu.Lock()
	same := f.tapDown == !up
	f.tapDown = !up
	f.mu.Unlock()
	if same {
		return nil
	}
	return f.note("tap %s", map[bool]string{true: "up", false: "down"}[up])
}

func (f *fakePath) Acked(t compare.Tuple) (uint32, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ack, ok := f.acked[t]
	return ack, ok
}

// left is what a daemon finds after this one's end.
func (f *fakePath) left() *datapath.Recovered {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &datapath.Recovered{Term: f.session.Term, Epoch: f.session.Epoch, Mode: f.mode, Digest: f.session.Digest}
}

// intrude puts a foreign program in front; "" takes it away.
func (f *fakePath) intrude(name string, onTap bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.intruder, f.onTap = name, onTap
}

// aloneLoop is a P's loop over path, which no daemon drives.
func aloneLoop(path *fakePath) *nicloop.Loop {
	return nicloop.NewPrimary(0, path, slog.New(slog.DiscardHandler), func(nicloop.Request) {}, compare.Config{}, compare.Keys{})
}
