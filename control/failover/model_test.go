// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/control/datapath"
)

// model is two hosts with their kernels, QEMUs and daemons, the links between
// them and the arbiter, driven by a seed. What it checks at all times: never two
// transmitters, and none that P's last commit does not cover.
type model struct {
	rng   *rand.Rand
	cfg   Config
	now   int64
	queue []timed
	trace []string
	fault string

	peerLink, control, arbiter bool
	record                     modelEntry
	waiting                    []func() // claims that do not reach the arbiter
	host                       [2]modelHost
	linked                     bool // a session holds
	linkGen                    int
	svmCovered                 bool // the truth: a commit in HOLD made the SVM a copy
	forced                     bool // an operator has forced a takeover

	off bool // S was told, before it claimed, that the guest powered off

	mask    bool // mutation: QEMU has a vote threshold of 1
	broken  bool // S's replica of the disk takes no writes
	stopped bool // QEMU has stopped the PVM, with a write queued
	pending bool // a write was confirmed that S's replica lacks
	missed  bool // and the SVM was loaded since with a state that counts on it
}

type timed struct {
	at int64
	f  func()
}

type modelEntry struct {
	term    uint64
	speaker int
}

// modelHost is one side: 0 is P, 1 is S.
type modelHost struct {
	p       *Primary
	s       *Secondary
	rate    float64 // of its clock
	frozen  bool    // the daemon, by SIGSTOP
	missed  []Event
	qemu    bool
	mode    datapath.Mode
	until   int64 // P's kernel: transmits before it
	echoed  int64 // this host's clock
	covered bool  // on disk
}

const modelRun = int64(20 * time.Second)

func (m *model) clock(h int) int64 { return int64(float64(m.now) * m.host[h].rate) }

func (m *model) after(d int64, f func()) { m.queue = append(m.queue, timed{m.now + d, f}) }

func (m *model) ms(n int) int64 { return int64(m.rng.IntN(n*1000)) * int64(time.Microsecond) }

func (m *model) note(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf("%9.3fms ", float64(m.now)/1e6)+fmt.Sprintf(format, args...))
}

func (m *model) step(h int, ev Event) {
	x := &m.host[h]
	if h == 1 && ev.Kind == EvTakeOver && ev.OK {
		m.forced = true
	}
	if h == 1 && ev.Kind == EvPoweredOff && !x.frozen && x.s.state < SecondaryClaim {
		m.off = true
	}
	if x.frozen {
		if ev.Kind != EvTick {
			x.missed = append(x.missed, ev)
		}
		return
	}
	ev.Echoed = x.echoed
	var fx []Effect
	if h == 0 {
		fx = slices.Clone(x.p.Step(m.clock(0), ev))
	} else {
		fx = slices.Clone(x.s.Step(m.clock(1), ev))
	}
	if ev.Kind != EvTick && ev.Kind != EvReceived || len(fx) > 0 {
		m.note("%s %v: %v", [...]string{"P", "S"}[h], ev, fx)
	}
	if h == 0 && x.p.sick && x.p.covered && (ev.Kind == EvTick || ev.Kind == EvCOLOExit) && slices.ContainsFunc(fx, func(e Effect) bool { return e.Op == OpClaim }) {
		m.fault = "a host whose guest cannot go on competes with its covered secondary"
	}
	for _, e := range fx {
		m.carryOut(h, e)
	}
	m.check()
}

func (m *model) carryOut(h int, e Effect) {
	x := &m.host[h]
	switch e.Op {
	case OpClaim:
		m.after(m.ms(30), func() { m.claim(h, e.Term) })
	case OpShut, OpQuiet:
		x.mode = datapath.ModeShut
		if e.Op == OpQuiet {
			m.after(m.ms(60), func() { m.step(h, Event{Kind: EvRuns}) })
		}
	case OpSolo:
		if h == 1 && x.qemu && !m.svmCovered && !m.forced {
			m.fault = "the SVM transmits, and no commit covers it"
		}
		if h == 1 && x.qemu && m.missed {
			m.fault = "the SVM transmits, and its disk lacks a confirmed write"
		}
		if h == 1 && m.off {
			m.fault = "the SVM transmits, and its guest has powered off"
		}
		if h == 0 {
			m.detached()
		}
		x.mode = datapath.ModeSolo
	case OpTellDead:
		m.send(h, Event{Kind: EvPeerDead, OK: true})
	case OpFenced:
		x.qemu = false
	case OpYield:
		m.send(1, Event{Kind: EvYield})
	case OpPoweredOff:
		x.qemu = false
		if h == 0 {
			m.send(0, Event{Kind: EvPoweredOff})
		}
	case OpSync:
		m.forceSometimes()
		m.after(m.ms(300), func() { m.step(0, Event{Kind: EvSynced, OK: m.linked && m.host[1].qemu}) })
	case OpPair:
		m.detached() // the disks were copied
		m.missed = false
		x.mode = datapath.ModeHold
		m.forceSometimes()
		gen := m.linkGen
		m.after(m.ms(400), func() {
			if m.linked && m.linkGen == gen && m.host[0].p.state == PrimaryPair && m.host[1].qemu && x.qemu && !x.frozen && !m.host[1].frozen {
				m.svmCovered = true
				m.step(0, Event{Kind: EvCommitted})
			}
		})
	case OpTellCovered:
		x.covered = true
		m.send(0, Event{Kind: EvCovered, Term: e.Term})
	case OpUnpair:
		x.covered = false
	case OpQEMU:
		m.after(m.ms(20), func() { m.step(h, Event{Kind: EvQEMU, OK: x.qemu}) })
	}
}

// detached: S's replica is none of the disk's any more, and a write that waited is done.
func (m *model) detached() { m.broken, m.stopped, m.pending = false, false, false }

// write is one of the PVM's (R24). QEMU's event of one that failed comes late where it is
// but an event, and is what stops the guest where the threshold is 2.
func (m *model) write() {
	p := &m.host[0]
	if !m.broken || m.stopped || !p.qemu || p.p.state != PrimaryPair || p.mode != datapath.ModeHold {
		return
	}
	late := 20
	if m.stopped, m.pending = !m.mask, m.mask; m.mask {
		late = 1200
	}
	m.after(m.ms(late), func() {
		if m.stopped || m.pending {
			m.step(0, Event{Kind: EvReplica})
		}
	})
}

// commit is a checkpoint's of a pair that is covered.
func (m *model) commit() {
	p, s := &m.host[0], &m.host[1]
	if m.pending && m.linked && p.qemu && s.qemu && !p.frozen && !s.frozen && p.p.state == PrimaryPair && p.covered {
		m.missed = true
	}
}

// forceSometimes: an operator loses patience with a secondary that is not covered yet,
// behind a cut of the control link or on a whole one.
func (m *model) forceSometimes() {
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
		m.step(1, Event{Kind: EvTakeOver, OK: m.host[1].qemu && m.host[0].p.state != PrimaryStart})
	})
}

// claim is the arbiter's. An answer that is lost is asked for until it comes.
func (m *model) claim(h int, from uint64) {
	if !m.arbiter {
		m.waiting = append(m.waiting, func() { m.claim(h, from) })
		return
	}
	won := m.record.term == from && m.record.speaker == 0
	if won {
		m.record = modelEntry{from + 1, h}
	}
	m.note("arbiter: %d claims %d: %v", h, from, won)
	answer := Event{Kind: EvClaimed, OK: won, Term: m.record.term}
	m.after(m.ms(30)+int64(m.rng.IntN(2))*m.ms(1500), func() { m.step(h, answer) })
}

func (m *model) send(from int, ev Event) {
	gen := m.linkGen
	m.after(m.ms(2), func() {
		if m.linked && gen == m.linkGen && m.control {
			m.step(1-from, ev)
		}
	})
}

// session is made when both daemons can.
func (m *model) session() {
	p, s := &m.host[0], &m.host[1]
	if m.linked || !m.control || p.frozen || s.frozen || p.p.state >= PrimaryFenced || s.s.state > SecondaryPair {
		return
	}
	m.linked = true
	m.linkGen++
	pair := p.p.state == PrimaryPair && s.qemu || m.rng.IntN(2) == 0
	m.step(1, Event{Kind: EvLinkUp, Term: p.p.term})
	if !pair && s.s.Covered() {
		m.step(1, Event{Kind: EvPeerDead})
	}
	m.step(0, Event{Kind: EvLinkUp, OK: pair})
}

func (m *model) unlink(lives bool) {
	if m.linked {
		m.linked = false
		m.linkGen++
		m.step(0, Event{Kind: EvLinkDown, OK: lives})
		m.step(1, Event{Kind: EvLinkDown, OK: lives})
	}
}

// echo is one of R20: P's daemon asks, S's kernel answers.
func (m *model) echo() {
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
				p.until, p.echoed = asked+m.cfg.lease, m.clock(0)
			}
		})
	})
}

func (m *model) check() {
	p, s := &m.host[0], &m.host[1]
	transmits := p.mode == datapath.ModeSolo || p.mode == datapath.ModeHold && m.now < p.until
	if transmits && p.qemu && s.mode == datapath.ModeSolo && s.qemu && m.fault == "" {
		m.fault = "two hosts transmit"
	}
}

// trouble is something that goes wrong, or right again.
func (m *model) trouble() {
	h := m.rng.IntN(2)
	x := &m.host[h]
	switch m.rng.IntN(13) {
	case 10: // a disk fails, or the guest panics; now and then it goes on later
		m.step(h, Event{Kind: EvGuestFailed})
		if m.rng.IntN(2) == 0 {
			m.after(m.ms(4000), func() { m.step(h, Event{Kind: EvGuestHealthy}) })
		}
	case 11:
		m.broken = true
	case 12:
		if m.rng.IntN(8) == 0 && m.host[0].qemu {
			m.step(0, Event{Kind: EvPoweredOff})
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
			m.step(h, Event{Kind: EvQEMUDead})
			if m.rng.IntN(2) == 0 {
				m.after(m.ms(10), func() { m.step(1-h, Event{Kind: EvCOLOExit}) })
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
				m.step(0, Event{Kind: EvDoubt, OK: m.rng.IntN(2) == 0})
			} else if m.rng.IntN(2) == 0 {
				m.step(h, Event{Kind: EvTakeOver, OK: h == 1 && x.qemu && m.rng.IntN(2) == 0})
			} else {
				m.step(0, Event{Kind: EvYield})
			}
		}
	default:
		m.unlink(true)
	}
}

// restart is kill -9 and a new daemon over what is pinned and on disk (R23).
func (m *model) restart(h int) {
	m.note("daemon %d starts again", h)
	m.unlink(true)
	x := &m.host[h]
	if h == 1 {
		l := x.s
		if l.state <= SecondaryPair {
			x.s = NewSecondary(m.cfg, l.term, l.covered, m.clock(1))
		}
		return
	}
	switch l := x.p; {
	case l.state == PrimaryPair:
		x.p = NewPrimary(m.cfg, l.term, PrimaryPair, l.covered, m.clock(0))
	case l.state == PrimarySolo:
		x.p = NewPrimary(m.cfg, l.term, PrimarySolo, false, m.clock(0))
	}
}
