// SPDX-License-Identifier: Apache-2.0

package nicloop

import (
	"log/slog"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// knownAcks is a data path that knows what some remotes have acknowledged, and sends nothing.
type knownAcks struct {
	datapath.NIC
	acked map[compare.Tuple]uint32
}

func (k knownAcks) Now() int64                   { return 1 }
func (k knownAcks) Apply([]compare.Effect) error { return nil }
func (k knownAcks) Acked(t compare.Tuple) (uint32, bool) {
	ack, ok := k.acked[t]
	return ack, ok
}

// askingCore asks on a tick what the remotes of tuples have acknowledged, and notes its events.
type askingCore struct {
	core
	tuples []compare.Tuple
	events []compare.Event
}

func (c *askingCore) Step(_ int64, ev *compare.Event, out []compare.Effect) []compare.Effect {
	c.events = append(c.events, *ev)
	if ev.Kind == compare.EvTick {
		for _, t := range c.tuples {
			out = append(out, compare.Effect{Op: compare.OpAdopt, Tuple: t})
		}
	}
	return out
}

// The core is given what the remote has acknowledged by now, where anybody knows (R23).
func TestAdoptAgain(t *testing.T) {
	known, unknown := compare.Tuple{RemotePort: 1}, compare.Tuple{RemotePort: 2}
	c := &askingCore{tuples: []compare.Tuple{known, unknown}}
	n := newLoop(0, knownAcks{acked: map[compare.Tuple]uint32{known: 99}}, slog.New(slog.DiscardHandler), nil, compare.Keys{})
	n.core = c
	n.stepNow(compare.Event{Kind: compare.EvTick})
	if len(c.events) != 2 || c.events[1].Kind != compare.EvAdopt || c.events[1].Seg.Tuple != known || c.events[1].Seg.Seq != 99 {
		t.Errorf("events %+v", c.events)
	}
}

// sweeps counts them.
type sweeps struct {
	datapath.NIC
	n int
}

func (s *sweeps) Wake() {}
func (s *sweeps) Sweep(time.Duration, time.Duration) (int, error) {
	s.n++
	return 0, nil
}

// While S waits for the arbiter no connection ends, however long that takes (R11).
func TestNoSweepWhileQuiet(t *testing.T) {
	for mode, want := range map[datapath.Mode]int{datapath.ModeRun: 1, datapath.ModeQuiet: 0} {
		dp := new(sweeps)
		n := newLoop(0, dp, slog.New(slog.DiscardHandler), nil, compare.Keys{})
		n.mode = mode
		go func() { (<-n.cmds)() }()
		if err := n.Sweep(time.Second, time.Hour); err != nil || dp.n != want {
			t.Errorf("mode %v: swept %d times, %v", mode, dp.n, err)
		}
	}
}
