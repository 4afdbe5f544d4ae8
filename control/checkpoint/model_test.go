// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// model runs both machines against a model of two QEMUs, with channels that
// delay and break, an operator, and checkpoints that stop half way. It knows
// what the machines cannot: which state the SVM really has.
type model struct {
	rng    *rand.Rand
	now    int64
	agenda []appointment // by time, then order of making
	made   int
	log    []string
	err    error

	p        *Primary
	s        *Secondary
	calm     bool // no more faults
	link     bool
	linkGen  int
	qmpGen   [2]int
	qmp      [2]bool
	stopped  [2]bool
	flight   int // messages and QEMU events under way
	inQEMU   int // 0: no checkpoint under way, else its number
	queued   bool
	ours     bool // the PVM was stopped to ask for a checkpoint
	lastTx   int
	resumeAt map[int]int64
	loaded   int // checkpoint the SVM last loaded

	running   bool // S's kernel lets output out
	offsets   int  // checkpoint since which S's offsets count
	sEpoch    uint32
	pEpoch    uint32
	frozen    bool
	sawStop   bool // P took a STOP since the last commit
	commits   int
	channelAt [4]int64 // ordered channels: P's and S's QMP, link both ways
}

type appointment struct {
	at    int64
	order int
	do    func()
}

const (
	chQMPP = iota
	chQMPS
	chToS
	chToP
)

func newModel(seed uint64, mutate func(*Config)) *model {
	m := &model{
		rng: rand.New(rand.NewPCG(seed, 1)), resumeAt: make(map[int]int64), sEpoch: 1, pEpoch: 1,
	}
	cfg := DefaultConfig()
	cfg.QMP, cfg.MinInterval, cfg.Period = true, int64(20*time.Millisecond), int64(time.Second)
	if m.rng.IntN(2) == 0 {
		cfg.PeriodicAbove, cfg.PeriodicEnough = 1+m.rng.IntN(8), 1+m.rng.IntN(3)
		cfg.PeriodicFirst, cfg.PeriodicMost = int64(300*time.Millisecond), int64(2*time.Second)
		cfg.Epoch = int64(10+m.rng.IntN(90)) * int64(time.Millisecond)
	}
	mutate(&cfg)
	m.p, m.s = NewPrimary(cfg), NewSecondary(cfg)
	return m
}

func (m *model) after(d int64, do func()) { m.at(m.now+d, do) }

func (m *model) at(at int64, do func()) {
	m.made++
	a := appointment{at, m.made, do}
	i, _ := slices.BinarySearchFunc(m.agenda, a, func(x, y appointment) int {
		if x.at != y.at {
			return int(min(max(x.at-y.at, -1), 1))
		}
		return x.order - y.order
	})
	m.agenda = slices.Insert(m.agenda, i, a)
}

// ms is a random time up to n milliseconds, now and then far longer.
func (m *model) ms(n int64) int64 {
	if !m.calm {
		switch r := m.rng.IntN(200); {
		case r < 5:
			n *= 200
		case r < 7:
			n *= 5000
		}
	}
	return m.rng.Int64N(n*int64(time.Millisecond)) + 1
}

// send delivers in order on a channel.
func (m *model) send(ch int, do func()) {
	at := max(m.now+m.ms(3), m.channelAt[ch]+1)
	m.channelAt[ch] = at
	m.flight++
	m.at(at, func() { m.flight--; do() })
}

func (m *model) failf(format string, args ...any) {
	if m.err == nil {
		m.err = fmt.Errorf(format, args...)
	}
}

func (m *model) note(who string, ev Event, fx []Effect) {
	line := fmt.Sprintf("%v %s %s(%d) ok=%t:", time.Duration(m.now), who, kindNames[ev.Kind], ev.Epoch, ev.OK)
	for _, f := range fx {
		line += " " + f.String()
	}
	m.log = append(m.log, line)
}

func (m *model) stepP(ev Event) {
	if ev.Kind == EvStop {
		m.sawStop = true
	}
	fx := slices.Clone(m.p.Step(m.now, ev))
	m.note("P", ev, fx)
	for _, f := range fx {
		m.effectP(f)
	}
	if d := m.p.NextDeadline(); d < 1<<62 && len(m.agenda) < 10000 {
		m.at(max(d, m.now+1), func() {
			if m.p.NextDeadline() <= m.now {
				m.stepP(Event{Kind: EvTick})
			}
		})
	}
}

func (m *model) effectP(f Effect) {
	switch f.Op {
	case OpFreeze:
		m.frozen = true
	case OpThaw:
		if m.sawStop {
			m.failf("thawed although the PVM had stopped since the last commit")
		}
		m.frozen = false
	case OpCommit:
		m.commits++
		m.frozen, m.sawStop = false, false
		switch {
		case m.loaded == 0:
			m.failf("commit of %d: the SVM never loaded a checkpoint", f.Epoch)
		case f.At > m.resumeAt[m.loaded] && m.resumeAt[m.loaded] != 0:
			m.failf("commit of %d at %v: checkpoint %d ended at %v", f.Epoch, time.Duration(f.At), m.loaded, time.Duration(m.resumeAt[m.loaded]))
		case m.running && m.offsets != m.loaded:
			m.failf("commit of %d: offsets since %d, loaded %d", f.Epoch, m.offsets, m.loaded)
		}
	case OpEpoch:
		m.pEpoch = f.Epoch
	case OpPrepare:
		m.toS(Event{Kind: EvPrepare, Epoch: f.Epoch})
	case OpAbort:
		m.toS(Event{Kind: EvAbort, Epoch: f.Epoch, Cause: f.Cause, Unasked: f.Unasked})
	case OpAsk:
		m.ask(f.Epoch)
	case OpCOLO:
		m.query(chQMPP, f.Epoch)
	}
}

func (m *model) stepS(ev Event, tx int) {
	fx := slices.Clone(m.s.Step(m.now, ev))
	m.note("S", ev, fx)
	for _, f := range fx {
		switch f.Op {
		case OpPark:
			m.running = false
		case OpDrain:
			ok := m.calm || m.rng.IntN(20) > 0
			drained := func() { m.stepS(Event{Kind: EvDrained, Epoch: f.Epoch, OK: ok}, 0) }
			if f.Events {
				m.send(chQMPS, drained)
				break
			}
			m.after(m.ms(3), drained)
		case OpReady:
			m.toP(Event{Kind: EvReady, Epoch: f.Epoch})
		case OpReset:
			if m.running {
				m.failf("offsets reset while output was open")
			}
			m.offsets = tx
		case OpBegin:
			m.sEpoch = f.Epoch
		case OpStopped:
			m.toP(Event{Kind: EvPeerStopped, Epoch: f.Epoch})
		case OpRun:
			m.running = true
		case OpResumed:
			m.toP(Event{Kind: EvPeerResumed, Epoch: f.Epoch})
		case OpAbort:
			m.toP(Event{Kind: EvPeerAbort, Epoch: f.Epoch, Cause: f.Cause})
		case OpCOLO:
			m.query(chQMPS, f.Epoch)
		}
	}
}

func (m *model) toS(ev Event) {
	if gen := m.linkGen; m.link {
		m.send(chToS, func() {
			if m.link && gen == m.linkGen {
				m.stepS(ev, 0)
			}
		})
	}
}

func (m *model) toP(ev Event) {
	if gen := m.linkGen; m.link {
		m.send(chToP, func() {
			if m.link && gen == m.linkGen {
				m.stepP(ev)
			}
		})
	}
}

// cutLink breaks the link and makes another session later, as the daemon does.
func (m *model) cutLink() {
	if m.link {
		m.link = false
		m.linkGen++
		m.stepP(Event{Kind: EvLinkDown})
		m.stepS(Event{Kind: EvLinkDown}, 0)
	}
}

func (m *model) join() {
	if m.link {
		return
	}
	m.linkGen++
	gen := m.linkGen
	whole := m.s.Whole()
	m.send(chToP, func() {
		if gen != m.linkGen {
			return
		}
		m.stepP(Event{Kind: EvHandshake})
		m.link = true
		calm := m.p.doubt == "" && whole
		m.sEpoch, m.pEpoch = m.p.committed, m.p.committed
		// S first, then P, with other things in between.
		m.send(chToS, func() {
			if gen != m.linkGen {
				return
			}
			m.stepS(Event{Kind: EvLinkUp, OK: calm}, 0)
			m.toP(Event{Kind: EvLinkUp, OK: whole})
		})
	})
}

// event is QEMU's, seen by its daemon when the connection lives.
func (m *model) event(side int, kind Kind, tx int) {
	m.stopped[side] = kind == EvStop
	at := m.now
	if gen := m.qmpGen[side]; m.qmp[side] {
		m.send(chQMPP+side, func() {
			if gen != m.qmpGen[side] {
				return
			}
			if ev := (Event{Kind: kind, At: at}); side == 0 {
				m.stepP(ev)
			} else {
				m.stepS(ev, tx)
			}
		})
	}
}

func (m *model) setQMP(side int, up bool) {
	if m.qmp[side] == up {
		return
	}
	m.qmp[side] = up
	m.qmpGen[side]++
	gen, running := m.qmpGen[side], !m.stopped[side]
	m.send(chQMPP+side, func() {
		if up && gen != m.qmpGen[side] {
			return
		}
		ev := Event{Kind: EvQMPDown}
		if up {
			ev = Event{Kind: EvQMPUp, OK: running}
		}
		if side == 0 {
			m.stepP(ev)
		} else {
			m.stepS(ev, 0)
		}
	})
}

func (m *model) query(ch int, epoch uint32) {
	gen := m.qmpGen[ch]
	m.send(ch, func() {
		if gen != m.qmpGen[ch] {
			return
		}
		if ev := (Event{Kind: EvCOLO, Epoch: epoch, OK: true}); ch == chQMPP {
			m.stepP(ev)
		} else {
			m.stepS(ev, 0)
		}
	})
}

// ask is the request at QEMU: the daemon stops the PVM, and asks. The request may be
// refused; then the PVM goes on.
func (m *model) ask(epoch uint32) {
	if !m.qmp[0] {
		return
	}
	gen := m.qmpGen[0]
	answer := func(ok bool) {
		m.send(chQMPP, func() {
			if gen == m.qmpGen[0] {
				m.stepP(Event{Kind: EvAsked, Epoch: epoch, OK: ok, Cause: "refused"})
			}
		})
	}
	m.after(m.ms(2), func() {
		switch {
		case gen != m.qmpGen[0]: // the connection closed before QEMU was asked
		case m.stopped[0] || !m.calm && m.rng.IntN(20) == 0:
			answer(false)
		default:
			m.event(0, EvStop, 0)
			m.ours = true
			// The daemon asks when it has read that the PVM is stopped.
			m.at(max(m.now+m.ms(2), m.channelAt[chQMPP]+1), func() {
				if !m.calm && m.rng.IntN(20) == 0 || gen != m.qmpGen[0] {
					m.unpause() // by the same daemon, or the one after it
					answer(false)
					return
				}
				m.queued = true
				answer(true)
				m.after(m.ms(2), m.transaction)
			})
		}
	})
}

// unpause has the PVM go on that a daemon stopped.
func (m *model) unpause() {
	if m.inQEMU == 0 && m.ours {
		m.ours = false
		m.event(0, EvResume, 0)
	}
}

// transaction is COLO's checkpoint.
func (m *model) transaction() {
	if m.inQEMU != 0 || !m.queued || m.stopped[0] && !m.ours {
		if m.queued && m.inQEMU == 0 {
			m.after(m.ms(20), m.transaction)
		}
		return
	}
	m.lastTx++
	tx := m.lastTx
	m.inQEMU = tx
	if !m.stopped[1] { // an operator's stop becomes the checkpoint's
		m.event(1, EvStop, tx)
	}
	m.after(m.ms(2), func() {
		m.queued = false
		if m.ours = false; !m.stopped[0] { // an operator resumed it
			m.event(0, EvStop, tx)
		}
		m.after(m.ms(4), func() {
			m.loaded = tx
			m.event(1, EvResume, tx)
			m.after(m.ms(2), func() {
				m.resumeAt[tx] = m.now
				m.event(0, EvResume, tx)
				m.inQEMU = 0
				if m.queued {
					m.transaction()
				}
			})
		})
	})
}
