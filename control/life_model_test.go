// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"lockstep/control/datapath"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// lifeModel is two hosts with their kernels, QEMUs and daemons, the links between
// them and the arbiter, driven by a seed. What it checks at all times: never two
// speakers, and none that P's last commit does not cover.
type lifeModel struct {
	rng   *rand.Rand
	cfg   lifeConfig
	now   int64
	queue []lifeTimed
	trace []string
	fault string

	peerLink, control, arbiter bool
	record                     lifeRecord
	waiting                    []func() // claims that the arbiter does not hear
	host                       [2]lifeHost
	linked                     bool // a session holds
	linkGen                    int
	svmCovered                 bool // the truth: a commit in HOLD made the SVM a copy
	forced                     bool // an operator has said that it need not be

	off bool // S has heard, before it claimed, that the guest powered off

	mask    bool // mutation: QEMU has a vote threshold of 1
	broken  bool // S's replica of the disk takes no writes
	stopped bool // QEMU has stopped the PVM, with a write queued
	pending bool // a write was confirmed that S's replica lacks
	missed  bool // and the SVM was loaded since with a state that counts on it
}

type lifeTimed struct {
	at int64
	f  func()
}

type lifeRecord struct {
	term    uint64
	speaker int
}

// lifeHost is one side: 0 is P, 1 is S.
type lifeHost struct {
	p       *lifePrimary
	s       *lifeSecondary
	rate    float64 // of its clock
	frozen  bool    // the daemon, by SIGSTOP
	missed  []lifeEvent
	qemu    bool
	mode    datapath.Mode
	until   int64 // P's kernel: speaks before it
	echoed  int64 // this host's clock
	covered bool  // on disk
}

const lifeRun = int64(20 * time.Second)

func (m *lifeModel) clock(h int) int64 { return int64(float64(m.now) * m.host[h].rate) }

func (m *lifeModel) after(d int64, f func()) { m.queue = append(m.queue, lifeTimed{m.now + d, f}) }

func (m *lifeModel) ms(n int) int64 { return int64(m.rng.IntN(n*1000)) * int64(time.Microsecond) }

func (m *lifeModel) note(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf("%9.3fms ", float64(m.now)/1e6)+fmt.Sprintf(format, args...))
}

func (m *lifeModel) step(h int, ev lifeEvent) {
	x := &m.host[h]
	if h == 1 && ev.Kind == lvTakeOver && ev.OK {
		m.forced = true
	}
	if h == 1 && ev.Kind == lvOff && !x.frozen && x.s.state < lsClaim {
		m.off = true
	}
	if x.frozen {
		if ev.Kind != lvTick {
			x.missed = append(x.missed, ev)
		}
		return
	}
	ev.Echoed = x.echoed
	var fx []lifeEffect
	if h == 0 {
		fx = slices.Clone(x.p.Step(m.clock(0), ev))
	} else {
		fx = slices.Clone(x.s.Step(m.clock(1), ev))
	}
	if ev.Kind != lvTick && ev.Kind != lvHeard || len(fx) > 0 {
		m.note("%s %v: %v", [...]string{"P", "S"}[h], ev, fx)
	}
	if h == 0 && x.p.sick && x.p.covered && (ev.Kind == lvTick || ev.Kind == lvCOLOExit) && slices.ContainsFunc(fx, func(e lifeEffect) bool { return e.Op == lxClaim }) {
		m.fault = "a host whose guest cannot go on competes with its covered secondary"
	}
	for _, e := range fx {
		m.carryOut(h, e)
	}
	m.check()
}

func (m *lifeModel) carryOut(h int, e lifeEffect) {
	x := &m.host[h]
	switch e.Op {
	case lxClaim:
		m.after(m.ms(30), func() { m.claim(h, e.Term) })
	case lxShut, lxQuiet:
		x.mode = datapath.ModeShut
		if e.Op == lxQuiet {
			m.after(m.ms(60), func() { m.step(h, lifeEvent{Kind: lvAwake}) })
		}
	case lxSolo:
		if h == 1 && x.qemu && !m.svmCovered && !m.forced {
			m.fault = "the SVM speaks, and no commit covers it"
		}
		if h == 1 && x.qemu && m.missed {
			m.fault = "the SVM speaks, and its disk lacks a confirmed write"
		}
		if h == 1 && m.off {
			m.fault = "the SVM speaks, and its guest has powered off"
		}
		if h == 0 {
			m.detached()
		}
		x.mode = datapath.ModeSolo
	case lxDead:
		m.send(h, lifeEvent{Kind: lvPeerDead})
	case lxOut:
		x.qemu = false
	case lxYield:
		m.send(1, lifeEvent{Kind: lvYield})
	case lxOff:
		x.qemu = false
		if h == 0 {
			m.send(0, lifeEvent{Kind: lvOff})
		}
	case lxSync:
		m.forceSometimes()
		m.after(m.ms(300), func() { m.step(0, lifeEvent{Kind: lvSynced, OK: m.linked && m.host[1].qemu}) })
	case lxPair:
		m.detached() // the disks were copied
		m.missed = false
		x.mode = datapath.ModeHold
		m.forceSometimes()
		gen := m.linkGen
		m.after(m.ms(400), func() {
			if m.linked && m.linkGen == gen && m.host[0].p.state == lpPair && m.host[1].qemu && x.qemu && !x.frozen && !m.host[1].frozen {
				m.svmCovered = true
				m.step(0, lifeEvent{Kind: lvCommitted})
			}
		})
	case lxCovered:
		x.covered = true
		m.send(0, lifeEvent{Kind: lvCovered, Term: e.Term})
	case lxUnpair:
		x.covered = false
	case lxQEMU:
		m.after(m.ms(20), func() { m.step(h, lifeEvent{Kind: lvQEMU, OK: x.qemu}) })
	}
}

// detached: S's replica is none of the disk's any more, and a write that waited is done.
func (m *lifeModel) detached() { m.broken, m.stopped, m.pending = false, false, false }

// write is one of the PVM's (R24). QEMU's event of one that failed comes late where it is
// but an event, and is what stops the guest where the threshold is 2.
func (m *lifeModel) write() {
	p := &m.host[0]
	if !m.broken || m.stopped || !p.qemu || p.p.state != lpPair || p.mode != datapath.ModeHold {
		return
	}
	late := 20
	if m.stopped, m.pending = !m.mask, m.mask; m.mask {
		late = 1200
	}
	m.after(m.ms(late), func() {
		if m.stopped || m.pending {
			m.step(0, lifeEvent{Kind: lvReplica})
		}
	})
}

// commit is a checkpoint's of a pair that is covered.
func (m *lifeModel) commit() {
	p, s := &m.host[0], &m.host[1]
	if m.pending && m.linked && p.qemu && s.qemu && !p.frozen && !s.frozen && p.p.state == lpPair && p.covered {
		m.missed = true
	}
}

// forceSometimes: an operator loses patience with a secondary that is not covered yet,
// behind a cut of the control link or on a whole one.
func (m *lifeModel) forceSometimes() {
	if m.rng.IntN(4) != 0 {
		return
	}
	if m.rng.IntN(3) != 0 {
		m.note("control link false")
		m.control = false
		gen := m.linkGen
		m.after(m.ms(300), func() {
			if gen == m.linkGen {
				m.unlink(m.rng.IntN(2) == 0)
			}
		})
	}
	m.after(m.ms(600), func() {
		m.step(1, lifeEvent{Kind: lvTakeOver, OK: m.host[1].qemu && m.host[0].p.state != lpStart})
	})
}

// claim is the arbiter's. An answer that is lost is asked for until it comes.
func (m *lifeModel) claim(h int, from uint64) {
	if !m.arbiter {
		m.waiting = append(m.waiting, func() { m.claim(h, from) })
		return
	}
	won := m.record.term == from && m.record.speaker == 0
	if won {
		m.record = lifeRecord{from + 1, h}
	}
	m.note("arbiter: %d claims %d: %v", h, from, won)
	answer := lifeEvent{Kind: lvClaimed, OK: won, Term: m.record.term}
	m.after(m.ms(30)+int64(m.rng.IntN(2))*m.ms(1500), func() { m.step(h, answer) })
}

func (m *lifeModel) send(from int, ev lifeEvent) {
	gen := m.linkGen
	m.after(m.ms(2), func() {
		if m.linked && gen == m.linkGen && m.control {
			m.step(1-from, ev)
		}
	})
}

// session is made when both daemons can.
func (m *lifeModel) session() {
	p, s := &m.host[0], &m.host[1]
	if m.linked || !m.control || p.frozen || s.frozen || p.p.state >= lpOut || s.s.state > lsPair {
		return
	}
	m.linked = true
	m.linkGen++
	m.step(1, lifeEvent{Kind: lvLinkUp, Term: p.p.term})
	m.step(0, lifeEvent{Kind: lvLinkUp, OK: p.p.state == lpPair && s.qemu || m.rng.IntN(2) == 0})
}

func (m *lifeModel) unlink(lives bool) {
	if m.linked {
		m.linked = false
		m.linkGen++
		m.step(0, lifeEvent{Kind: lvLinkDown, OK: lives})
		m.step(1, lifeEvent{Kind: lvLinkDown, OK: lives})
	}
}

// echo is one of R20: P's daemon asks, S's kernel answers.
func (m *lifeModel) echo() {
	p, s := &m.host[0], &m.host[1]
	if p.frozen || p.mode != datapath.ModeHold || !m.peerLink {
		return
	}
	asked := m.now
	m.after(m.ms(3), func() {
		if s.mode == datapath.ModeShut || s.mode == datapath.ModeSolo || !m.peerLink {
			return
		}
		s.echoed = m.clock(1)
		m.after(m.ms(3), func() {
			if m.peerLink {
				p.until, p.echoed = asked+m.cfg.speak, m.clock(0)
			}
		})
	})
}

func (m *lifeModel) check() {
	p, s := &m.host[0], &m.host[1]
	speaks := p.mode == datapath.ModeSolo || p.mode == datapath.ModeHold && m.now < p.until
	if speaks && p.qemu && s.mode == datapath.ModeSolo && s.qemu && m.fault == "" {
		m.fault = "two speakers"
	}
}

// trouble is something that goes wrong, or right again.
func (m *lifeModel) trouble() {
	h := m.rng.IntN(2)
	x := &m.host[h]
	switch m.rng.IntN(13) {
	case 10: // a disk fails, or the guest panics; now and then it goes on later
		m.step(h, lifeEvent{Kind: lvSick})
		if m.rng.IntN(2) == 0 {
			m.after(m.ms(4000), func() { m.step(h, lifeEvent{Kind: lvHealthy}) })
		}
	case 11:
		m.broken = true
	case 12:
		if m.rng.IntN(8) == 0 && m.host[0].qemu {
			m.step(0, lifeEvent{Kind: lvOff})
		}
	case 0:
		m.control = !m.control
		m.note("control link %v", m.control)
		if !m.control {
			gen := m.linkGen
			m.after(m.cfg.timeout, func() {
				if gen == m.linkGen {
					m.unlink(false)
				}
			})
		}
	case 1:
		m.peerLink = !m.peerLink
		m.note("peer link %v", m.peerLink)
	case 2:
		m.arbiter = !m.arbiter
		m.note("arbiter %v", m.arbiter)
		if m.arbiter {
			for _, f := range m.waiting {
				m.after(m.ms(500), f)
			}
			m.waiting = nil
		}
	case 3:
		if m.rng.IntN(3) == 0 && x.qemu {
			x.qemu = false
			m.note("QEMU %d dies", h)
			if h == 1 {
				m.svmCovered = false
			}
			m.step(h, lifeEvent{Kind: lvQEMUDead})
			if m.rng.IntN(2) == 0 {
				m.after(m.ms(10), func() { m.step(1-h, lifeEvent{Kind: lvCOLOExit}) })
			}
		}
	case 4, 5:
		if !x.frozen {
			x.frozen = true
			m.note("%d freezes", h)
			if m.linked {
				gen := m.linkGen
				m.after(m.cfg.timeout, func() {
					if gen == m.linkGen {
						m.unlink(false)
					}
				})
			}
			m.after(m.ms(3000), func() {
				m.note("%d wakes", h)
				x.frozen = false
				missed := x.missed
				x.missed = nil
				for _, ev := range missed {
					m.step(h, ev)
				}
			})
		}
	case 6:
		if !x.frozen {
			m.restart(h)
		}
	case 7:
		if m.rng.IntN(8) == 0 && h == 0 {
			m.note("host P is lost")
			x.frozen, x.qemu, x.mode = true, false, datapath.ModeShut
			m.after(m.cfg.timeout, func() { m.unlink(false) })
		}
	case 8:
		if m.rng.IntN(4) == 0 {
			if m.rng.IntN(3) == 0 {
				m.step(0, lifeEvent{Kind: lvDoubt, OK: m.rng.IntN(2) == 0})
			} else if m.rng.IntN(2) == 0 {
				m.step(h, lifeEvent{Kind: lvTakeOver, OK: h == 1 && x.qemu && m.rng.IntN(2) == 0})
			} else {
				m.step(0, lifeEvent{Kind: lvYield})
			}
		}
	default:
		m.unlink(true)
	}
}

// restart is kill -9 and a new daemon over what is pinned and on disk (R23).
func (m *lifeModel) restart(h int) {
	m.note("daemon %d starts again", h)
	m.unlink(true)
	x := &m.host[h]
	if h == 1 {
		l := x.s
		if l.state <= lsPair {
			x.s = newLifeSecondary(m.cfg, l.term, l.covered, m.clock(1))
		}
		return
	}
	switch l := x.p; {
	case l.state == lpPair:
		x.p = newLifePrimary(m.cfg, l.term, lpPair, l.covered, m.clock(0))
	case l.state == lpSolo:
		x.p = newLifePrimary(m.cfg, l.term, lpSolo, false, m.clock(0))
	}
}

func runLife(seed uint64, change func(*lifeConfig)) *lifeModel { return runLifeOn(seed, false, change) }

// runLifeOn has QEMUs that mask a replica's faults, or none.
func runLifeOn(seed uint64, mask bool, change func(*lifeConfig)) *lifeModel {
	rng := rand.New(rand.NewPCG(seed, 11))
	cfg := defaultLifeConfig(500*time.Millisecond, 400*time.Millisecond, 7*time.Second)
	if change != nil {
		change(&cfg)
	}
	m := &lifeModel{rng: rng, cfg: cfg, mask: mask, peerLink: true, control: true, arbiter: true, record: lifeRecord{1, 0}}
	for h := range m.host {
		m.host[h] = lifeHost{rate: 1 + (rng.Float64()-0.5)/100, qemu: true}
	}
	m.host[0].p = newLifePrimary(cfg, 1, lpStart, false, 0)
	m.host[1].s = newLifeSecondary(cfg, 0, false, 0)
	m.host[1].mode = datapath.ModeRun
	every := func(d int64, f func()) {
		var again func()
		again = func() { f(); m.after(d, again) }
		m.after(d, again)
	}
	every(int64(10*time.Millisecond), func() {
		for h := range m.host {
			m.step(h, lifeEvent{Kind: lvTick})
		}
	})
	every(int64(50*time.Millisecond), func() {
		m.echo()
		m.session()
		for h := range m.host {
			if m.linked && m.control && !m.host[1-h].frozen {
				m.step(h, lifeEvent{Kind: lvHeard})
			}
		}
	})
	every(int64(20*time.Millisecond), m.write)
	every(int64(300*time.Millisecond), m.commit)
	every(int64(time.Second), func() {
		if m.arbiter {
			m.step(0, lifeEvent{Kind: lvEntry, Term: m.record.term, OK: m.record.speaker == 0})
		}
	})
	m.after(int64(time.Second), func() { every(int64(100+rng.IntN(7000))*int64(time.Millisecond), m.trouble) })
	for m.now < lifeRun && m.fault == "" {
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

func (e lifeEvent) String() string {
	return fmt.Sprintf("%s(%v,%d)", [...]string{
		"", "tick", "link-up", "link-down", "heard", "peer-dead", "over", "qemu-dead", "colo-exit", "take-over", "claimed",
		"sick", "healthy", "off", "synced", "yield", "committed", "doubt", "replica", "entry", "covered", "awake", "qemu",
	}[e.Kind], e.OK, e.Term)
}

func (e lifeEffect) String() string {
	return fmt.Sprintf("%s(%d)", [...]string{
		"", "Claim", "Shut", "Solo", "Dead", "Out", "Off", "Sync", "Pair", "Unpair", "Covered", "Yield", "Quiet", "QEMU",
	}[e.Op], e.Term)
}

// TestLifeSchedules: whatever goes wrong in whatever order, there are never two
// speakers, and none that is not covered.
func TestLifeSchedules(t *testing.T) {
	takeovers, solos, paired := 0, 0, 0
	for seed := range uint64(3000) {
		m := runLife(seed, nil)
		if m.fault != "" {
			t.Fatalf("seed %d: %s\n%s", seed, m.fault, strings.Join(m.trace, "\n"))
		}
		if m.host[1].s.state == lsSolo {
			takeovers++
		}
		if m.host[0].p.state == lpSolo {
			solos++
		}
		if m.host[0].p.state == lpPair && m.host[1].s.state == lsPair && m.host[1].s.covered {
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
	for name, change := range map[string]func(*lifeConfig){
		"R18":           func(c *lifeConfig) { c.noR18 = true },
		"R21 claim":     func(c *lifeConfig) { c.noClaim = true },
		"R21 wait":      func(c *lifeConfig) { c.noWait = true },
		"R24":           func(c *lifeConfig) { c.noR24 = true },
		"R25":           func(c *lifeConfig) { c.noR25 = true },
		"R26 uncovered": func(c *lifeConfig) { c.noR26Uncovered = true },
		"R26 lease":     func(c *lifeConfig) { c.noR26Lease = true },
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
	cfg := defaultLifeConfig(500*time.Millisecond, 400*time.Millisecond, 7*time.Second)
	cfg.rejoin = int64(1500 * time.Millisecond)
	const ms = int64(time.Millisecond)
	s := newLifeSecondary(cfg, 1, true, 0)
	s.Step(0, lifeEvent{Kind: lvLinkUp, Term: 1})
	s.Step(100*ms, lifeEvent{Kind: lvHeard})
	s.Step(150*ms, lifeEvent{Kind: lvLinkDown, OK: true})
	if at := s.NextDeadline(); at != 1600*ms {
		t.Errorf("S takes over at %d ms", at/ms)
	}
	p := newLifePrimary(cfg, 1, lpPair, true, 0)
	p.Step(0, lifeEvent{Kind: lvLinkUp, OK: true})
	p.Step(100*ms, lifeEvent{Kind: lvHeard})
	p.Step(150*ms, lifeEvent{Kind: lvLinkDown, OK: true, Echoed: 1400 * ms})
	if at := p.NextDeadline(); at != 1600*ms {
		t.Errorf("P claims at %d ms, though S's kernel still answers", at/ms)
	}
}
