// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"lockstep/compare"
	"lockstep/control/checkpoint"
	"lockstep/control/datapath"
	"lockstep/control/failover"
	"lockstep/control/journal"
)

// maxStrangers bounds the connections that have not said who they are.
const maxStrangers = 8

// party is what this daemon tells of itself, its term left out.
func (d *Daemon) party() party {
	p := party{
		Version: Version, VM: d.opt.VM, Node: d.opt.Node, Role: string(d.opt.Role),
		QMP: d.opt.QMP != "", Config: d.opt.ConfigDigest,
	}
	for _, n := range d.nics {
		p.NICs = append(p.NICs, n.dp.MAC().String())
	}
	return p
}

// accept lets the secondary in (P).
func (d *Daemon) accept(ctx context.Context, ln net.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	strangers := &strangers{peer: d.opt.PeerAddr}
	again := backoff{first: d.opt.link.retry, last: d.opt.link.retryMax}
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil {
				d.log.Warn("control link", "err", err)
			}
			if !again.wait(ctx) {
				return nil
			}
			continue
		}
		again.reset()
		if !strangers.take(conn) {
			d.refused(conn, fmt.Errorf("it comes from %s, and %s is %s: that node has to connect from its control address", conn.RemoteAddr(), d.opt.Peer, d.opt.PeerAddr))
			continue
		}
		d.work.Go(func() {
			err := d.greet(ctx, conn, func() bool { return strangers.known(conn) })
			strangers.known(conn)
			if err != nil {
				d.refused(conn, err)
			}
		})
	}
}

// refused closes a connection that does not become the link (P). Those who knock
// without end do not fill the log.
func (d *Daemon) refused(conn net.Conn, err error) {
	conn.Close()
	d.post(func() {
		if !d.linkUp {
			d.linkErr = err.Error()
		}
		if d.refusals++; time.Since(d.refusalLog) >= quietRequest {
			d.log.Warn("control connection refused", "from", conn.RemoteAddr(), "err", err, "connections", d.refusals)
			d.refusalLog, d.refusals = time.Now(), 0
		}
	})
}

// strangers are the connections that have not said who they are. Only the peer's
// address may have any; when they are too many, the oldest goes: the peer's daemon says
// who it is at once, and whoever stays silent was there before it.
type strangers struct {
	peer netip.Addr // the zero Addr: from everywhere

	mu   sync.Mutex
	list []net.Conn // oldest first
}

// take lets conn in; false: it comes from elsewhere.
func (s *strangers) take(conn net.Conn) bool {
	if from, ok := conn.RemoteAddr().(*net.TCPAddr); ok && s.peer.IsValid() && from.AddrPort().Addr().Unmap().WithZone("") != s.peer.WithZone("") {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.list) == maxStrangers {
		s.list[0].Close() // its greeting fails
		s.list = slices.Delete(s.list, 0, 1)
	}
	s.list = append(s.list, conn)
	return true
}

// known takes conn out; false: it had to go already.
func (s *strangers) known(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.list, conn)
	if i < 0 {
		return false
	}
	s.list = slices.Delete(s.list, i, i+1)
	return true
}

// greet takes a hello and, when it is the secondary's, hands the link to the
// controller (P). known is asked before that.
func (d *Daemon) greet(ctx context.Context, raw net.Conn, known func() bool) error {
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, err := d.secure(ctx, raw)
	if err != nil {
		return err
	}
	l := newLink(conn, d.opt.link)
	m, err := l.read(d.opt.link.handshake)
	if err != nil {
		return d.explain(err)
	}
	if m.Type != "hello" || m.Hello == nil {
		return fmt.Errorf("%q in place of hello", m.Type)
	}
	if err := checkPeer(d.party(), m.Hello.party, d.opt.Peer, string(datapath.RoleSecondary)); err != nil {
		_ = l.write(message{Type: "refuse", Cause: err.Error()})
		return err
	}
	if d.life != nil {
		own, err := d.life.diskSizes()
		if err == nil {
			err = checkSizes(d.life.Disks, own, m.Hello.Disks)
		}
		if err == nil {
			err = d.fitsQEMU(ctx, m.Hello)
		}
		if err != nil {
			_ = l.write(message{Type: "refuse", Cause: err.Error()})
			return err
		}
	}
	if !known() {
		return errors.New("newer connections took its place")
	}
	return d.ask(ctx, func() { d.offer(l, *m.Hello) })
}

// offer begins a session with the secondary (P). Nothing leaves until it holds.
func (d *Daemon) offer(l *link, h hello) {
	d.unlink(d.link, errors.New("the secondary connected anew"))
	d.link, d.linkUp, d.peerAddr, d.peerParty = l, false, l.conn.RemoteAddr().String(), h.party
	d.step(checkpoint.Event{Kind: checkpoint.EvHandshake})

	// Connections whose offsets S has lost, or of which this P knows nothing; or a
	// checkpoint that one of them has begun an epoch with and the other has not.
	mine := 0
	if err := d.each("count connections", func(n *nic) error {
		mine += n.primary.Stats().Connections
		return nil
	}); err != nil {
		l.close(err)
		return
	}
	known := d.adopted || d.sessions > 0
	none := mine == 0 && h.Connections == 0
	d.peerWhole = h.Whole && (none || known && !h.Fresh && h.Epoch == d.epoch)

	d.term = max(d.term, h.Term) + 1
	s := session{party: d.party(), Epoch: d.epoch, Digest: keyBytes(d.nics[0].keys)}
	s.Term = d.term
	if d.life != nil {
		d.life.hello = h
		// COLO may run already where somebody else has started it.
		s.Record = d.life.p.Term()
		s.Pair = d.life.p.State() == failover.PrimaryPair || d.life.p.State() == failover.PrimaryStart && d.qmp.conn != nil && d.qmp.info.colo == "primary"
	}
	s.Doubt = d.opt.QMP != "" && (!d.peerWhole || d.primary.InDoubt())
	s.Sign = newSeed()
	if err := d.install(d.nics[0].keys, s.Sign, false); err != nil {
		d.fatal = err
		return
	}
	d.follow(l, d.opt.link.handshake)
	l.send(message{Type: "session", Session: &s})
}

// newSeed is the secret of one term.
func newSeed() []byte {
	seed := make([]byte, seedLen)
	rand.Read(seed) // never fails
	return seed
}

// install gives every NIC the session of the present term and epoch; sign is the
// seed of its signing keys.
func (d *Daemon) install(digest *compare.Keys, sign []byte, rotated bool) error {
	s := datapath.Session{Term: d.term, Epoch: d.epoch, Digest: *digest, Rotated: rotated}
	s.TxKey, s.RxKey = signKeys([seedLen]byte(sign))
	if d.secondary != nil {
		s.TxKey, s.RxKey = s.RxKey, s.TxKey
	}
	for i, n := range d.nics {
		mac, err := net.ParseMAC(d.peerParty.NICs[i])
		if err != nil {
			return fmt.Errorf("nic %d: %w", i, err)
		}
		s.PeerMAC = mac
		if err := n.do(func() error { return n.install(s) }); err != nil {
			return fmt.Errorf("nic %d: install session: %w", i, err)
		}
	}
	return nil
}

// connect makes the link to the primary, again and again (S).
func (d *Daemon) connect(ctx context.Context) {
	if d.life != nil {
		select {
		case <-d.life.prepared:
		case <-ctx.Done():
			return
		}
	}
	again := backoff{first: d.opt.link.retry, last: d.opt.link.retryMax}
	for {
		up, err := d.join(ctx)
		if ctx.Err() != nil {
			return
		}
		if up {
			again.reset()
		}
		d.post(func() {
			if why := err.Error(); d.linkErr != why {
				d.linkErr = why
				d.log.Warn("no control link", "primary", d.opt.Control, "err", err)
			}
		})
		if !again.wait(ctx) {
			return
		}
	}
}

// join makes one link and stays until it ends (S). up: there was a session.
func (d *Daemon) join(ctx context.Context) (up bool, err error) {
	dialer := net.Dialer{Timeout: d.opt.link.handshake}
	if d.opt.OwnAddr.IsValid() { // the primary lets nobody else in
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.opt.OwnAddr, 0))
	}
	raw, err := dialer.DialContext(ctx, "tcp", d.opt.Control)
	if err != nil {
		return false, err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, err := d.secure(ctx, raw)
	if err != nil {
		return false, err
	}
	offsets := 0
	for _, n := range d.nics {
		known, err := n.offsets()
		if err != nil {
			return false, fmt.Errorf("nic %d: count connections: %w", n.index, err)
		}
		offsets += known
	}
	h := hello{Connections: offsets}
	if d.life != nil {
		if h.Disks, err = d.life.diskSizes(); err != nil {
			return false, err
		}
		if h.COLO, err = d.follows(ctx); err != nil {
			return false, err
		}
	}
	if err := d.ask(ctx, func() {
		h.party, h.Whole, h.Fresh = d.party(), d.secondary.Whole(), !d.adopted && d.sessions == 0
		h.Term, h.Epoch = d.term, d.epoch
		if d.life != nil {
			h.Machine, h.QEMU = d.life.caps.Machine, d.life.caps.Version
		}
	}); err != nil {
		return false, err
	}
	l := newLink(conn, d.opt.link)
	if err := l.write(message{Type: "hello", Hello: &h}); err != nil {
		return false, d.explain(err)
	}
	m, err := l.read(d.opt.link.handshake)
	switch {
	case err != nil:
		return false, d.explain(err)
	case m.Type == "refuse":
		return false, fmt.Errorf("the primary refused: %s", m.Cause)
	case m.Type != "session" || m.Session == nil:
		return false, fmt.Errorf("%q in place of session", m.Type)
	}
	if err := checkPeer(h.party, m.Session.party, d.opt.Peer, string(datapath.RolePrimary)); err != nil {
		return false, err
	}
	var installed error
	if err := d.ask(ctx, func() { installed = d.joined(l, m.Session, h.COLO) }); err != nil {
		return false, err
	}
	if installed != nil {
		return false, installed
	}
	<-l.done
	return true, l.err
}

// joined begins a session (S).
func (d *Daemon) joined(l *link, s *session, colo bool) error {
	if s.Term <= d.term {
		return fmt.Errorf("the primary offers term %d, but term %d is known here: it is out of date", s.Term, d.term)
	}
	keys := new(compare.Keys)
	if n, err := binary.Decode(s.Digest, binary.LittleEndian, keys); err != nil || n != len(s.Digest) || len(s.Sign) != seedLen {
		return errors.New("keys of a wrong length")
	}
	d.term, d.epoch, d.peerParty = s.Term, s.Epoch, s.party
	if err := d.install(keys, s.Sign, false); err != nil {
		d.fatal = err
		return err
	}
	d.link, d.peerAddr = l, l.conn.RemoteAddr().String()
	d.follow(l, d.opt.link.silence)
	l.send(message{Type: "ok"}) // before anything that the machine says
	d.up(!s.Doubt)
	d.joinedPair(s.Record, s.Pair, colo)
	return nil
}

// up: the session holds.
func (d *Daemon) up(ok bool) {
	d.linkUp, d.linkSince, d.linkErr = true, time.Now(), ""
	d.sessions++
	d.log.Info("session", "peer", d.opt.Peer, "address", d.peerAddr, "term", d.term, "epoch", d.epoch)
	d.event(journal.Session, "began", map[string]any{"address": d.peerAddr, "term": d.term})
	d.step(checkpoint.Event{Kind: checkpoint.EvLinkUp, OK: ok})
	d.paired()
}

// rotateEvery begins a rotation now and then, while l lasts (P).
func (d *Daemon) rotateEvery(l *link) {
	tick := time.NewTicker(d.opt.Rekey)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.post(func() {
				if d.link == l && d.linkUp && d.rotation == nil {
					d.rotate(l)
				}
			})
		case <-l.done:
			return
		}
	}
}

// rotate begins the next term, with new signing keys, over the living link (P).
// Nothing is frozen, and no checkpoint is asked for.
//
// P begins, and S follows when the message comes, some 100 µs later. Meanwhile P
// takes S's frames of the old term, for a second; what P itself signs already with
// the new keys S refuses. That is a loss like any on the peer link, and its
// repetition heals it. Were S first, its records of the new term would be lost
// instead, of which there are many more.
//
// The digest keys stay: held frames and unmatched records have sums of them, and
// there is no making those anew.
//
// Without an answer the link is lost, and the session after it has keys of its own.
// Nothing of them is ever on a disk.
func (d *Daemon) rotate(l *link) {
	d.term++
	sign := newSeed()
	if err := d.install(d.nics[0].keys, sign, true); err != nil {
		d.fatal = err
		return
	}
	answered := make(chan struct{})
	d.rotation = answered
	d.work.Go(func() {
		late := time.NewTimer(d.opt.link.handshake)
		defer late.Stop()
		select {
		case <-answered:
		case <-l.done:
		case <-late.C:
			d.post(func() {
				if d.rotation == answered {
					d.unlink(l, errors.New("the secondary did not answer to new keys in time"))
				}
			})
		}
	})
	l.send(message{Type: "rekey", Rekey: &rekey{Term: d.term, Sign: sign}})
}

// rotated follows P to the next term (S).
func (d *Daemon) rotated(l *link, k *rekey) {
	if k == nil || k.Term != d.term+1 || len(k.Sign) != seedLen {
		d.unlink(l, fmt.Errorf("new keys that do not follow those of term %d", d.term))
		return
	}
	d.term = k.Term
	if err := d.install(d.nics[0].keys, k.Sign, true); err != nil {
		d.fatal = err
		return
	}
	l.send(message{Type: "ok"})
	d.log.Info("keys rotated", "term", d.term)
}

// follow hands what comes on l to the controller, until l closes. The first
// message has to come within first.
func (d *Daemon) follow(l *link, first time.Duration) {
	d.work.Go(l.pump)
	d.work.Go(func() {
		within := first
		for {
			m, err := l.read(within)
			if err != nil {
				l.close(err)
				d.post(func() { d.unlink(l, l.err) })
				return
			}
			within = d.opt.link.silence
			d.post(func() {
				if d.link == l {
					d.received(l, m)
				}
			})
		}
	})
}

// unlink gives l up, if it is the link there is.
func (d *Daemon) unlink(l *link, why error) {
	if l == nil || d.link != l {
		return
	}
	l.close(why)
	if d.linkUp {
		d.event(journal.Session, "ended: "+why.Error(), nil)
	}
	d.link, d.linkUp, d.rotation, d.linkSince, d.linkErr = nil, false, nil, time.Now(), why.Error()
	d.log.Warn("control link lost", "peer", d.opt.Peer, "err", why)
	d.step(checkpoint.Event{Kind: checkpoint.EvLinkDown})
	d.linkLost(why)
}

func (d *Daemon) send(m message) {
	if d.link != nil {
		d.link.send(m)
	}
}

// received takes a message of the peer.
func (d *Daemon) received(l *link, m message) {
	kinds := map[string]checkpoint.Kind{"prepare": checkpoint.EvPrepare, "abort": checkpoint.EvAbort}
	if d.primary != nil {
		kinds = map[string]checkpoint.Kind{"ready": checkpoint.EvReady, "stopped": checkpoint.EvPeerStopped, "resumed": checkpoint.EvPeerResumed, "abort": checkpoint.EvPeerAbort}
	}
	kind, known := kinds[m.Type]
	switch {
	case d.primary != nil && m.Type == "ok" && !d.linkUp:
		d.up(d.peerWhole)
		if d.opt.Rekey > 0 {
			d.work.Go(func() { d.rotateEvery(l) })
		}
		return
	case d.linkUp && d.heardOf(m):
		return
	case d.rotation != nil && m.Type == "ok":
		close(d.rotation)
		d.rotation = nil
		d.log.Info("keys rotated", "term", d.term)
		return
	case d.secondary != nil && m.Type == "rekey" && d.linkUp:
		d.rotated(l, m.Rekey)
		return
	case !known || !d.linkUp:
		d.unlink(l, fmt.Errorf("message %q makes no sense here", m.Type))
		return
	}
	if kind == checkpoint.EvPeerResumed && len(d.attempts) > 0 {
		if a := &d.attempts[len(d.attempts)-1]; a.Epoch == m.Epoch {
			a.SVMPauseMS = milliseconds(m.PauseNS)
		}
	}
	d.step(checkpoint.Event{Kind: kind, Epoch: m.Epoch, OK: true, Cause: m.Cause})
}
