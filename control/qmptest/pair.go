// SPDX-License-Identifier: Apache-2.0

package qmptest

import (
	"errors"
	"path/filepath"
	"sync"
	"time"
)

// Stage is a step of a checkpoint, in COLO's order.
type Stage int

// Stages of a checkpoint.
const (
	SecondaryStop Stage = iota
	PrimaryStop
	SecondaryResume
	PrimaryResume
	stages
)

func (s Stage) String() string {
	return [...]string{"secondary STOP", "primary STOP", "secondary RESUME", "primary RESUME"}[s]
}

// Pair plays the two QEMUs of a COLO pair. Setting x-checkpoint-delay on the
// primary makes them go through a checkpoint; a primary that is stopped already sends no
// STOP of its own there. As in QEMU, requests coalesce
// until the primary has stopped; a later one makes another checkpoint.
type Pair struct {
	Primary, Secondary *Server

	mu      sync.Mutex
	pending bool
	busy    bool
	before  func(Stage) bool
	delay   [stages]time.Duration
	count   int
	work    sync.WaitGroup
	closed  chan struct{}
}

// NewPair starts both servers, on sockets in dir.
func NewPair(dir string) (*Pair, error) {
	p, err := Listen(filepath.Join(dir, "primary.qmp"), "primary")
	if err != nil {
		return nil, err
	}
	s, err := Listen(filepath.Join(dir, "secondary.qmp"), "secondary")
	if err != nil {
		p.Close()
		return nil, err
	}
	pair := &Pair{Primary: p, Secondary: s, closed: make(chan struct{})}
	p.mu.Lock()
	p.handle = func(r Request) {
		if r.Execute == "migrate-set-parameters" {
			pair.request()
		}
	}
	p.mu.Unlock()
	return pair, nil
}

// Close ends both servers. A hook that holds a checkpoint has to return first.
func (p *Pair) Close() error {
	close(p.closed)
	err := errors.Join(p.Primary.Close(), p.Secondary.Close())
	p.work.Wait()
	return err
}

// SetDelay makes each checkpoint wait before stage.
func (p *Pair) SetDelay(stage Stage, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay[stage] = d
}

// SetHook has f called before every stage; it may block to hold the checkpoint
// there. When it returns false the checkpoint ends there, as if a QEMU had died.
func (p *Pair) SetHook(f func(Stage) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = f
}

// Checkpoints returns the number of checkpoints that were completed.
func (p *Pair) Checkpoints() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

func (p *Pair) request() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending = true
	if !p.busy {
		p.busy = true
		p.work.Go(p.run)
	}
}

// run makes the checkpoints that were requested, one after the other.
func (p *Pair) run() {
	for {
		p.mu.Lock()
		if !p.pending {
			p.busy = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		p.checkpoint()
	}
}

func (p *Pair) checkpoint() {
	for stage := range stages {
		p.mu.Lock()
		delay, before := p.delay[stage], p.before
		if stage == PrimaryStop {
			p.pending = false // requests until now were for this checkpoint
		}
		p.mu.Unlock()
		if delay > 0 {
			t := time.NewTimer(delay)
			select {
			case <-t.C:
			case <-p.closed:
				t.Stop()
				return
			}
		}
		if before != nil && !before(stage) {
			p.mu.Lock()
			p.pending = false
			p.mu.Unlock()
			return
		}
		switch stage {
		case SecondaryStop:
			p.Secondary.Stop()
		case PrimaryStop:
			p.Primary.Stop()
		case SecondaryResume:
			p.Secondary.Resume()
		case PrimaryResume:
			p.mu.Lock()
			p.count++
			p.mu.Unlock()
			p.Primary.Resume()
		}
	}
}
