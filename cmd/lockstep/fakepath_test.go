// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// fakePath is a data path without frames.
type fakePath struct {
	wake, closed chan struct{}
}

func newFakePath() *fakePath {
	return &fakePath{wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

func (p *fakePath) Poll(wait time.Duration, evs []compare.Event) ([]compare.Event, error) {
	select {
	case <-p.wake:
	case <-time.After(wait):
	}
	return evs, nil
}

func (p *fakePath) Wake() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *fakePath) Close() error {
	close(p.closed)
	return nil
}

func (p *fakePath) Programs() []datapath.Program {
	return []datapath.Program{{Name: "ls_fake", Device: "tapP", Attach: "tcx-ingress"}}
}

func (p *fakePath) Now() int64                                         { return time.Now().UnixNano() }
func (p *fakePath) MAC() net.HardwareAddr                              { return net.HardwareAddr{2, 0, 0, 0, 0, 1} }
func (p *fakePath) Apply([]compare.Effect) error                       { return nil }
func (p *fakePath) SetMode(datapath.Mode) error                        { return nil }
func (p *fakePath) SetEpoch(uint32) error                              { return nil }
func (p *fakePath) SetLeaseUntil(int64) error                          { return nil }
func (p *fakePath) SetLeaseDuration(time.Duration) error               { return nil }
func (p *fakePath) RequestEcho() error                                 { return nil }
func (p *fakePath) LastEcho() int64                                    { return 0 }
func (p *fakePath) TakeOver(uint32, bool) error                        { return nil }
func (p *fakePath) Edges() ([]datapath.Edge, error)                    { return nil, nil }
func (p *fakePath) AddEdges([]datapath.Edge) error                     { return nil }
func (p *fakePath) MarkStop() error                                    { return nil }
func (p *fakePath) InstallSession(datapath.Session) error              { return nil }
func (p *fakePath) ResetOffsets() error                                { return nil }
func (p *fakePath) Sweep(_, _ time.Duration) (int, error)              { return 0, nil }
func (p *fakePath) DrainTap(context.Context) error                     { return nil }
func (p *fakePath) Counters() (map[string]uint64, error)               { return map[string]uint64{}, nil }
func (p *fakePath) Offsets(func(compare.Tuple, datapath.Offset)) error { return nil }
func (p *fakePath) Recovered() *datapath.Recovered                     { return nil }
func (p *fakePath) CheckOrder() (string, bool, error)                  { return "", false, nil }
func (p *fakePath) SetTap(bool) error                                  { return nil }
func (p *fakePath) Acked(compare.Tuple) (uint32, bool)                 { return 0, false }
