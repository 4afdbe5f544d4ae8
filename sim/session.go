// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"encoding/binary"
	"errors"
	"net"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/state"
)

// session is one connection of the control link.
type session struct {
	w     *world
	ends  [2]*daemon // P's, S's; nil: that end is gone
	last  [2]int64   // when the newest message to that end arrives
	heard [2]int64
}

func (l *session) end(d *daemon) int {
	if l.ends[0] == d {
		return 0
	}
	return 1
}

// send delivers a message in order. What is behind a cut waits for its end, as in TCP.
func (l *session) send(from *daemon, m peerlink.Message) {
	i := l.end(from)
	to := 1 - i
	l.last[to] = max(l.last[to]+1, l.w.now+l.w.between(rndControl, 40*us, 600*us))
	l.deliver(i, to, l.last[to]-l.w.now, m)
}

func (l *session) deliver(from, to int, d int64, m peerlink.Message) {
	l.w.after(d, func() {
		t := l.ends[to]
		if t == nil || t.link != l {
			return
		}
		if l.w.cut.control > 0 {
			l.deliver(from, to, 20*ms, m)
			return
		}
		t.do(func() {
			if t.link == l {
				l.heard[to] = l.w.now
				t.received(m)
			}
		})
	})
}

// watch gives up a link that is silent.
func (l *session) watch(d *daemon) {
	i := l.end(d)
	d.post(silence/4, func() {
		if d.link != l {
			return
		}
		if l.w.now-l.heard[i] > silence {
			d.unlink(l, true)
			return
		}
		l.watch(d)
	})
}

func (l *session) ping(d *daemon) {
	d.post(pingEvery, func() {
		if d.link == l {
			d.send(peerlink.Ping{})
			l.ping(d)
		}
	})
}

// drop: one end is closed. The other one finds out, if anything arrives.
func (l *session) drop(d *daemon, told bool) {
	i := l.end(d)
	o := l.ends[1-i]
	l.ends[i] = nil
	if d.link == l {
		d.link = nil
	}
	if !told || o == nil {
		return
	}
	var tell func()
	tell = func() {
		switch {
		case o.link != l:
		case l.w.cut.control > 0 || !d.h.alive:
			if d.h.alive {
				l.w.after(20*ms, tell)
			}
		default:
			o.do(func() { o.unlink(l, false) })
		}
	}
	l.w.after(max(l.last[1-i]-l.w.now, 0)+l.w.between(rndControl, 40*us, 600*us), tell)
}

func (d *daemon) send(m peerlink.Message) {
	if d.link != nil {
		d.w.logf("%s: sends %s", d.h.name, m.Type())
		d.link.send(d, m)
	}
}

// unlink gives the link up.
func (d *daemon) unlink(l *session, timeout bool) {
	if l == nil || d.link != l {
		return
	}
	l.drop(d, true)
	d.linkUp = false
	d.w.reach("link lost")
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvLinkDown})
	d.repl.giveUp()
	d.pair.step(failover.Event{Kind: failover.EvLinkDown, OK: !timeout})
	if !d.isPrimary() {
		d.connect(retryFirst)
	}
}

// connect makes the link to the primary, again and again (S).
func (d *daemon) connect(pause int64) {
	d.post(pause, func() {
		o := d.h.other()
		p := o.daemon
		if d.link != nil {
			return
		}
		if !d.prepared || d.h.monitor == nil || d.w.cut.control > 0 || p == nil || !p.isPrimary() || !p.started || !p.runs() || p.ended != endNone || p.h.monitor == nil && p.pair.p.State() != failover.PrimaryPair {
			d.connect(min(2*pause, retryMax))
			return
		}
		h := peerlink.Hello{Whole: d.checks.s.Whole(), Fresh: !d.recovered && d.sessions == 0, Epoch: d.epoch, COLO: d.h.qemu.colo == "secondary"}
		h.Party.NICs = []string{d.h.nic.MAC().String()}
		known, err := d.loop.Offsets()
		d.fail(err)
		h.Connections = known
		p.do(func() {
			l := &session{w: d.w, ends: [2]*daemon{p, d}, heard: [2]int64{d.w.now, d.w.now}}
			p.unlink(p.link, false)
			if p.ended == endNone {
				p.offer(l, h, d)
			}
		})
		d.post(silence, func() {
			if d.link == nil {
				d.connect(retryFirst)
			}
		})
	})
}

// offer begins a session with the secondary (P). Nothing leaves until it holds.
func (d *daemon) offer(l *session, h peerlink.Hello, to *daemon) {
	d.link, d.linkUp = l, false
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvHandshake})
	mine := d.loop.Primary.Stats().Connections
	known := d.recovered || d.sessions > 0
	none := mine == 0 && h.Connections == 0
	d.peerWhole = h.Whole && (none || known && !h.Fresh && h.Epoch == d.epoch)
	d.keyGen = max(d.keyGen, to.keyGen) + 1
	d.repl.helloCOLO = h.COLO
	ses := peerlink.Session{Epoch: d.epoch, Record: d.pair.p.Term(), Sign: d.w.seed()}
	ses.Term = d.keyGen
	ses.Pair = d.pair.p.State() == failover.PrimaryPair || d.pair.p.State() == failover.PrimaryStart && d.h.monitor != nil && d.qmp.colo == "primary"
	ses.Doubt = !d.peerWhole || d.checks.p.InDoubt()
	ses.Digest, _ = binary.Append(nil, binary.LittleEndian, d.loop.Keys)
	d.install(d.loop.Keys, ses.Sign, false)
	l.watch(d)
	l.ping(d)
	// It is the first message, so S has no link yet.
	d.w.after(d.w.between(rndControl, 40*us, 600*us), func() {
		if d.w.cut.control > 0 || d.link != l {
			return
		}
		to.do(func() {
			if to.link == nil && d.link == l && to.h.qemu != nil {
				to.joined(l, ses, h.COLO)
			}
		})
	})
}

// seed is a new secret.
func (w *world) seed() []byte {
	b := make([]byte, peerlink.SeedLen)
	for i := range b {
		b[i] = byte(w.rnd(rndKeys).Uint32())
	}
	return b
}

// install gives the NIC the session of the present key generation and epoch.
func (d *daemon) install(digest *compare.Keys, sign []byte, rotated bool) {
	ses := datapath.Session{Term: d.keyGen, Epoch: d.epoch, Digest: *digest, Rotated: rotated, PeerMAC: d.h.other().mac()}
	ses.TxKey, ses.RxKey = peerlink.SignKeys([peerlink.SeedLen]byte(sign))
	if !d.isPrimary() {
		ses.TxKey, ses.RxKey = ses.RxKey, ses.TxKey
	}
	d.fail(d.loop.Install(ses))
}

// mac is the peer device's.
func (h *host) mac() net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 1, byte(h.id)} }

// joined begins a session (S).
func (d *daemon) joined(l *session, ses peerlink.Session, colo bool) {
	if ses.Term <= d.keyGen && d.keyGen != 0 {
		d.connect(retryFirst) // it is out of date
		return
	}
	var keys compare.Keys
	if _, err := binary.Decode(ses.Digest, binary.LittleEndian, &keys); err != nil {
		d.fail(err)
	}
	d.keyGen, d.epoch = ses.Term, ses.Epoch
	d.install(&keys, ses.Sign, false)
	d.link = l
	l.heard[1] = d.w.now
	l.watch(d)
	l.ping(d)
	d.send(peerlink.OK{})
	d.up(!ses.Doubt)

	d.pair.step(failover.Event{Kind: failover.EvLinkUp, Term: ses.Record})
	d.remember(func(st *state.State) {
		st.Replicated = true
		if !d.pair.s.Covered() {
			st.Covered = 0
		}
	})
	switch {
	case ses.Pair:
	case d.pair.s.Covered():
		d.pair.step(failover.Event{Kind: failover.EvPeerDead})
	case colo:
		d.ended = endAfresh
	}
}

// up: the session holds.
func (d *daemon) up(ok bool) {
	d.linkUp = true
	d.sessions++
	if d.isPrimary() && d.sessions == 1 && ok {
		// A daemon that starts again knows of no STOP that there was before. It goes by S, whose SVM has not been
		// stopped (R23): the PVM runs only after S has loaded what QEMU took of it.
		d.w.check.doubt = false
	}
	d.w.reach("session")
	d.checks.step(checkpoint.Event{Kind: checkpoint.EvLinkUp, OK: ok})
	d.repl.paired()
}

var errMessage = errors.New("a message that makes no sense here")

// received takes a message of the peer.
func (d *daemon) received(m peerlink.Message) {
	if d.isPrimary() {
		d.fromSecondary(m)
		return
	}
	d.fromPrimary(m)
}

func (d *daemon) fromSecondary(m peerlink.Message) {
	if _, ok := m.(peerlink.OK); ok && !d.linkUp {
		d.up(d.peerWhole)
		return
	}
	if !d.linkUp {
		return
	}
	d.pair.step(failover.Event{Kind: failover.EvReceived})
	switch m := m.(type) {
	case peerlink.Dead:
		d.repl.giveUp()
		d.pair.step(failover.Event{Kind: failover.EvPeerDead, OK: true})
	case peerlink.Yield:
		d.pair.step(failover.Event{Kind: failover.EvYield})
	case peerlink.Ready:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvReady, Epoch: m.Epoch, OK: true})
	case peerlink.Stopped:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPeerStopped, Epoch: m.Epoch, OK: true})
	case peerlink.Resumed:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPeerResumed, Epoch: m.Epoch, OK: true})
	case peerlink.Abort:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPeerAbort, Epoch: m.Epoch, OK: true, Cause: m.Cause})
	case peerlink.OK, peerlink.Ping:
	default:
		d.fail(errMessage)
	}
}

func (d *daemon) fromPrimary(m peerlink.Message) {
	d.pair.step(failover.Event{Kind: failover.EvReceived})
	switch m := m.(type) {
	case peerlink.Dead:
		d.pair.step(failover.Event{Kind: failover.EvPeerDead, OK: true})
	case peerlink.Covered:
		d.pair.step(failover.Event{Kind: failover.EvCovered, Term: m.Term})
		if d.pair.s.Covered() {
			d.remember(func(st *state.State) { st.Covered = m.Term })
		}
	case peerlink.Edges:
		d.fail(d.h.nic.AddEdges(m.Edges))
	case peerlink.PoweredOff:
		d.pair.step(failover.Event{Kind: failover.EvPoweredOff})
	case peerlink.Dismiss:
		d.pair.step(failover.Event{Kind: failover.EvDismissed})
	case peerlink.Prepare:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvPrepare, Epoch: m.Epoch, OK: true})
	case peerlink.Abort:
		d.checks.step(checkpoint.Event{Kind: checkpoint.EvAbort, Epoch: m.Epoch, OK: true, Cause: m.Cause, Unasked: m.Unasked})
	case peerlink.Rekey:
		d.keyGen = m.Term
		d.install(d.loop.Keys, m.Sign, true)
		d.send(peerlink.OK{})
	case peerlink.Ping:
	default:
		d.fail(errMessage)
	}
}

// rotate begins the next key generation (P).
func (d *daemon) rotate() {
	if !d.isPrimary() || !d.linkUp {
		return
	}
	d.w.reach("keys rotated")
	d.keyGen++
	sign := d.w.seed()
	d.install(d.loop.Keys, sign, true)
	d.send(peerlink.Rekey{Term: d.keyGen, Sign: sign})
}
