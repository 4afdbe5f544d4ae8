// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"lockstep/compare"
)

// maxStrangers bounds the connections that have not said who they are.
const maxStrangers = 8

// party is what this daemon tells of itself, its term left out.
func (d *Daemon) party() party {
	p := party{
		Version: linkVersion, VM: d.opt.VM, Node: d.opt.Node, Role: string(d.opt.Role),
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
	strangers := make(chan struct{}, maxStrangers)
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
		select {
		case strangers <- struct{}{}:
		default:
			conn.Close() // the secondary comes again
			continue
		}
		d.work.Go(func() {
			err := d.greet(ctx, conn)
			<-strangers
			if err == nil {
				return
			}
			conn.Close()
			d.post(func() {
				if !d.linkUp {
					d.linkErr = err.Error()
				}
			})
			d.log.Warn("control connection refused", "from", conn.RemoteAddr(), "err", err)
		})
	}
}

// greet takes a hello and, when it is the secondary's, hands the link to the
// controller (P).
func (d *Daemon) greet(ctx context.Context, raw net.Conn) error {
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, err := d.secure(ctx, raw)
	if err != nil {
		return err
	}
	l := newLink(conn, d.opt.link.silence)
	m, err := l.read(d.opt.link.handshake)
	if err != nil {
		return d.explain(err)
	}
	if m.Type != "hello" || m.Hello == nil {
		return fmt.Errorf("%q in place of hello", m.Type)
	}
	if err := checkPeer(d.party(), m.Hello.party, d.opt.Peer, string(RoleSecondary)); err != nil {
		_ = l.write(message{Type: "refuse", Cause: err.Error()})
		return err
	}
	return d.ask(ctx, func() { d.offer(l, *m.Hello) })
}

// offer begins a session with the secondary (P). Nothing leaves until it holds.
func (d *Daemon) offer(l *link, h hello) {
	d.unlink(d.link, errors.New("the secondary connected anew"))
	d.link, d.linkUp, d.peerAddr = l, false, l.conn.RemoteAddr().String()
	d.step(ckptEvent{Kind: evHandshake})

	// Connections whose offsets S has lost, or of which this P knows nothing.
	mine := 0
	if err := d.each("count connections", func(n *nic) error {
		mine += n.primary.Stats().Connections
		return nil
	}); err != nil {
		l.close(err)
		return
	}
	d.peerWhole = h.Whole && !(h.Fresh && mine > 0) && !(d.sessions == 0 && h.Connections > 0)

	d.term = max(d.term, h.Term) + 1
	s := session{party: d.party(), Epoch: d.epoch, Digest: d.digestSeed[:]}
	s.Term = d.term
	s.Doubt = d.opt.QMP != "" && (!d.peerWhole || d.primary.doubt != "")
	var sign [seedLen]byte
	rand.Read(sign[:])
	s.Sign = sign[:]
	p2s, s2p := signKeys(sign)
	if err := d.install(h.party, Session{Term: d.term, Epoch: d.epoch, TxKey: p2s, RxKey: s2p, Digest: *d.nics[0].keys}); err != nil {
		d.fatal = err
		return
	}
	d.follow(l, d.opt.link.handshake)
	l.send(message{Type: "session", Session: &s})
}

// install gives every NIC its session.
func (d *Daemon) install(peer party, s Session) error {
	for i, n := range d.nics {
		mac, err := net.ParseMAC(peer.NICs[i])
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
		if err := n.dp.Offsets(func(compare.Tuple, Offset) { offsets++ }); err != nil {
			return false, fmt.Errorf("nic %d: count connections: %w", n.index, err)
		}
	}
	h := hello{Connections: offsets}
	if err := d.ask(ctx, func() {
		h.party, h.Whole, h.Fresh = d.party(), d.secondary.whole(), d.opt.Fresh && d.sessions == 0
		h.Term = d.term
	}); err != nil {
		return false, err
	}
	l := newLink(conn, d.opt.link.silence)
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
	if err := checkPeer(h.party, m.Session.party, d.opt.Peer, string(RolePrimary)); err != nil {
		return false, err
	}
	var installed error
	if err := d.ask(ctx, func() { installed = d.joined(l, m.Session) }); err != nil {
		return false, err
	}
	if installed != nil {
		return false, installed
	}
	<-l.done
	return true, l.err
}

// joined begins a session (S).
func (d *Daemon) joined(l *link, s *session) error {
	if s.Term <= d.term {
		return fmt.Errorf("the primary offers term %d, but term %d is known here: it is out of date", s.Term, d.term)
	}
	if len(s.Digest) != seedLen || len(s.Sign) != seedLen {
		return errors.New("key seeds of a wrong length")
	}
	keys, err := digestKeys([seedLen]byte(s.Digest))
	if err != nil {
		return err
	}
	p2s, s2p := signKeys([seedLen]byte(s.Sign))
	if err := d.install(s.party, Session{Term: s.Term, Epoch: s.Epoch, TxKey: s2p, RxKey: p2s, Digest: *keys}); err != nil {
		d.fatal = err
		return err
	}
	d.link, d.term, d.epoch, d.peerAddr = l, s.Term, s.Epoch, l.conn.RemoteAddr().String()
	d.follow(l, d.opt.link.silence)
	l.send(message{Type: "ok"}) // before anything that the machine says
	d.up(!s.Doubt)
	return nil
}

// up: the session holds.
func (d *Daemon) up(ok bool) {
	d.linkUp, d.linkSince, d.linkErr = true, time.Now(), ""
	d.sessions++
	d.log.Info("session", "peer", d.opt.Peer, "address", d.peerAddr, "term", d.term, "epoch", d.epoch)
	d.step(ckptEvent{Kind: evLinkUp, OK: ok})
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
	d.link, d.linkUp, d.linkSince, d.linkErr = nil, false, time.Now(), why.Error()
	d.log.Warn("control link lost", "peer", d.opt.Peer, "err", why)
	d.step(ckptEvent{Kind: evLinkDown})
}

func (d *Daemon) send(m message) {
	if d.link != nil {
		d.link.send(m)
	}
}

// received takes a message of the peer.
func (d *Daemon) received(l *link, m message) {
	kinds := map[string]ckptKind{"prepare": evPrepare, "abort": evAbort}
	if d.primary != nil {
		kinds = map[string]ckptKind{"ready": evReady, "stopped": evPeerStopped, "resumed": evPeerResumed, "abort": evPeerAbort}
	}
	kind, known := kinds[m.Type]
	switch {
	case d.primary != nil && m.Type == "ok" && !d.linkUp:
		d.up(d.peerWhole)
		return
	case !known || !d.linkUp:
		d.unlink(l, fmt.Errorf("message %q makes no sense here", m.Type))
		return
	}
	if kind == evPeerResumed && len(d.attempts) > 0 {
		if a := &d.attempts[len(d.attempts)-1]; a.Epoch == m.Epoch {
			a.SVMPauseMS = milliseconds(m.PauseNS)
		}
	}
	d.step(ckptEvent{Kind: kind, Epoch: m.Epoch, OK: true, Cause: m.Cause})
}
