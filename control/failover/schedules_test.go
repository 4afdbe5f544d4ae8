// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/datapath"
)

func runLife(seed uint64, change func(*Config)) *model { return runLifeOn(seed, false, change) }

// runLifeOn has QEMUs that mask a replica's faults, or none.
func runLifeOn(seed uint64, mask bool, change func(*Config)) *model {
	rng := rand.New(rand.NewPCG(seed, 11))
	cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 7*time.Second)
	if change != nil {
		change(&cfg)
	}
	m := &model{rng: rng, cfg: cfg, mask: mask, peerLink: true, control: true, arbiter: true, record: modelEntry{1, 0}}
	for h := range m.host {
		m.host[h] = modelHost{rate: 1 + (rng.Float64()-0.5)/100, qemu: true}
	}
	m.host[0].p = NewPrimary(cfg, 1, PrimaryStart, false, 0)
	m.host[1].s = NewSecondary(cfg, 0, false, 0)
	m.host[1].mode = datapath.ModeRun
	every := func(d int64, f func()) {
		var again func()
		again = func() { f(); m.after(d, again) }
		m.after(d, again)
	}
	every(int64(10*time.Millisecond), func() {
		for h := range m.host {
			m.step(h, Event{Kind: EvTick})
		}
	})
	every(int64(50*time.Millisecond), func() {
		m.echo()
		m.session()
		for h := range m.host {
			if m.linked && m.control && !m.host[1-h].frozen {
				m.step(h, Event{Kind: EvReceived})
			}
		}
	})
	every(int64(20*time.Millisecond), m.write)
	every(int64(300*time.Millisecond), m.commit)
	every(int64(time.Second), func() {
		if m.arbiter {
			m.step(0, Event{Kind: EvEntry, Term: m.record.term, OK: m.record.speaker == 0})
		}
	})
	m.after(int64(time.Second), func() { every(int64(100+rng.IntN(7000))*int64(time.Millisecond), m.trouble) })
	for m.now < modelRun && m.fault == "" {
		i := 0
		for k := range m.queue {
			if m.queue[k].at < m.queue[i].at {
				i = k
			}
		}
		next := m.queue[i]
		m.queue = slices.Delete(m.queue, i, i+1)
		m.now = next.at
		next.f()
		m.check()
	}
	return m
}

func (e Event) String() string {
	return fmt.Sprintf("%s(%v,%d)", [...]string{
		"", "tick", "link-up", "link-down", "received", "peer-dead", "dismissed", "qemu-dead", "colo-exit", "take-over", "claimed",
		"sick", "healthy", "off", "synced", "yield", "committed", "doubt", "replica", "entry", "covered", "awake", "qemu",
	}[e.Kind], e.OK, e.Term)
}

func (e Effect) String() string {
	return fmt.Sprintf("%s(%d)", [...]string{
		"", "Claim", "Shut", "Solo", "Dead", "Out", "Off", "Sync", "Pair", "Unpair", "Covered", "Yield", "Quiet", "QEMU",
	}[e.Op], e.Term)
}

// TestLifeSchedules: whatever goes wrong in whatever order, there are never two
// transmitters, and none that is not covered.
func TestLifeSchedules(t *testing.T) {
	takeovers, solos, paired := 0, 0, 0
	for seed := range uint64(3000) {
		m := runLife(seed, nil)
		if m.fault != "" {
			t.Fatalf("seed %d: %s\n%s", seed, m.fault, strings.Join(m.trace, "\n"))
		}
		if m.host[1].s.state == SecondarySolo {
			takeovers++
		}
		if m.host[0].p.state == PrimarySolo {
			solos++
		}
		if m.host[0].p.state == PrimaryPair && m.host[1].s.state == SecondaryPair && m.host[1].s.covered {
			paired++
		}
	}
	t.Logf("of 3000 runs S took over in %d, P went on alone in %d, and %d ended as a covered pair", takeovers, solos, paired)
	if takeovers < 100 || solos < 100 || paired < 10 {
		t.Error("the schedules do not reach what they are to test")
	}
}

// TestLifeMutations: without each of the rules the schedules find the fault.
func TestLifeMutations(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"R18":           func(c *Config) { c.noR18 = true },
		"R21 claim":     func(c *Config) { c.noClaim = true },
		"R21 wait":      func(c *Config) { c.noWait = true },
		"R24":           func(c *Config) { c.noR24 = true },
		"R25":           func(c *Config) { c.noR25 = true },
		"R26 uncovered": func(c *Config) { c.noR26Uncovered = true },
		"R26 lease":     func(c *Config) { c.noR26Lease = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(3000) {
				if m := runLife(seed, change); m.fault != "" {
					t.Logf("seed %d: %s", seed, m.fault)
					return
				}
			}
			t.Error("3000 schedules did not find it")
		})
	}
	t.Run("R24 threshold", func(t *testing.T) {
		for seed := range uint64(3000) {
			if m := runLifeOn(seed, true, nil); strings.Contains(m.fault, "lacks a confirmed write") {
				t.Logf("seed %d: %s", seed, m.fault)
				return
			}
		}
		t.Error("3000 schedules did not find it")
	})
}

// TestRestartBound: how long either side waits for a daemon that ended on a living host.
func TestRestartBound(t *testing.T) {
	cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 7*time.Second)
	cfg.Rejoin = int64(1500 * time.Millisecond)
	const ms = int64(time.Millisecond)
	s := NewSecondary(cfg, 1, true, 0)
	s.Step(0, Event{Kind: EvLinkUp, Term: 1})
	s.Step(100*ms, Event{Kind: EvReceived})
	s.Step(150*ms, Event{Kind: EvLinkDown, OK: true})
	if at := s.NextDeadline(); at != 1600*ms {
		t.Errorf("S takes over at %d ms", at/ms)
	}
	p := NewPrimary(cfg, 1, PrimaryPair, true, 0)
	p.Step(0, Event{Kind: EvLinkUp, OK: true})
	p.Step(100*ms, Event{Kind: EvReceived})
	p.Step(150*ms, Event{Kind: EvLinkDown, OK: true, Echoed: 1400 * ms})
	if at := p.NextDeadline(); at != 1600*ms {
		t.Errorf("P claims at %d ms, though S's kernel still answers", at/ms)
	}
}
