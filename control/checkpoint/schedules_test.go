// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// quiet checks what holds whenever nothing is under way.
func (m *model) quiet() {
	if m.flight == 0 && m.link && m.s.link && m.p.link && m.s.void && !m.frozen {
		m.failf("matching although S is void")
	}
	if m.p.periodic.on && m.p.stage == pIdle && !m.p.able() && m.p.doubt == "" {
		m.failf("periodic mode, and no checkpoint is to be had")
	}
	if !m.frozen && m.p.started && !m.p.qmp {
		m.failf("matching without QMP")
	}
	if m.flight == 0 && m.inQEMU == 0 && m.qmp[0] && m.qmp[1] && !m.frozen && m.running && m.link {
		if m.offsets != m.loaded {
			m.failf("matching with offsets since %d, loaded %d", m.offsets, m.loaded)
		}
		if m.sEpoch != m.pEpoch {
			m.failf("matching with S in epoch %d, P in %d", m.sEpoch, m.pEpoch)
		}
	}
}

func (m *model) fault() {
	if m.calm {
		return
	}
	switch m.rng.IntN(12) {
	case 0:
		m.cutLink()
	case 1, 2:
		m.join()
	case 3:
		m.setQMP(m.rng.IntN(2), false)
	case 4, 5:
		m.setQMP(m.rng.IntN(2), true)
	case 6:
		// An operator's stop and cont. Those of the SVM cannot be told from a checkpoint's where they come between the PVM's STOP
		// and the checkpoint's of the SVM, a millisecond or two later: QEMU does not say why it stops. That STOP follows,
		// and both hosts are in doubt.
		side := m.rng.IntN(2)
		if m.inQEMU == 0 && !m.queued && !m.stopped[side] && !m.ours {
			m.event(side, EvStop, 0)
			m.after(m.ms(30), func() {
				if m.inQEMU == 0 && m.stopped[side] && !m.ours {
					m.event(side, EvResume, 0)
				}
			})
		}
	case 7:
		m.stepP(Event{Kind: EvInside, Epoch: m.p.last})
	case 8:
		m.stepP(Event{Kind: EvReleased})
	default:
		m.stepP(Event{Kind: EvWant, Diverged: m.rng.IntN(2) == 0})
	}
}

func (m *model) run(until int64) {
	for len(m.agenda) > 0 && m.agenda[0].at <= until && m.err == nil {
		a := m.agenda[0]
		m.agenda = m.agenda[1:]
		m.now = a.at
		a.do()
		m.quiet()
	}
	m.now = until
}

func (m *model) story() error {
	m.setQMP(0, true)
	m.setQMP(1, true)
	m.join()
	for range 150 {
		m.after(m.ms(40), func() { m.fault() })
		m.run(m.now + m.ms(40))
	}
	// Peace: everything heals, and a request is served.
	m.calm = true
	m.run(m.now + int64(time.Minute))
	m.setQMP(0, true)
	m.setQMP(1, true)
	m.join()
	for side := range m.stopped {
		if m.stopped[side] && m.inQEMU == 0 {
			m.event(side, EvResume, 0)
		}
	}
	m.run(m.now + int64(time.Minute))
	if m.p.periodic.on {
		m.failf("periodic mode after a minute in which nothing differed")
	}
	before := m.commits
	m.stepP(Event{Kind: EvWant})
	m.run(m.now + int64(time.Minute))
	switch {
	case m.err != nil:
		return m.err
	case m.commits == before:
		return errors.New("in peace a request was not served")
	case m.p.doubt != "":
		return fmt.Errorf("doubt in peace: %s", m.p.doubt)
	case m.s.void:
		return errors.New("S is void in peace")
	}
	return nil
}

// TestCkptSchedules: whatever fails and whenever, matching goes on only with an
// S whose offsets are those of its SVM, a commit covers only what S loaded, and
// in peace the pair gets well.
func TestCkptSchedules(t *testing.T) {
	n := uint64(500)
	if testing.Short() {
		n = 100
	}
	commits, periodic := 0, 0
	for seed := range n {
		m := newModel(seed, func(*Config) {})
		if err := m.story(); err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, strings.Join(m.log[max(0, len(m.log)-60):], "\n"))
		}
		commits += m.commits
		periodic += m.p.periodic.begun
	}
	if periodic < int(n)/5 {
		t.Errorf("periodic mode began %d times in %d stories", periodic, n)
	}
	if commits < int(n)*10 {
		t.Errorf("only %d commits in %d stories", commits, n)
	}
}

// TestR14Mutation, TestR15Mutation: with the rule off the schedules go wrong.
func TestR14Mutation(t *testing.T) { schedulesGoWrong(t, func(c *Config) { c.noR14 = true }) }
func TestR15Mutation(t *testing.T) { schedulesGoWrong(t, func(c *Config) { c.noR15 = true }) }

func schedulesGoWrong(t *testing.T, mutate func(*Config)) {
	t.Helper()
	for seed := range uint64(200) {
		if err := newModel(seed, mutate).story(); err != nil {
			t.Logf("seed %d: %v", seed, err)
			return
		}
	}
	t.Error("no schedule noticed that the rule is off")
}
