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

// peerLink is this host's end of the control link, and the session on it.
type peerLink struct {
	d          *Daemon
	link       *link // nil: none
	linkUp     bool  // its session holds
	linkSince  time.Time
	linkErr    string
	sessions   int // made so far
	refusals   int // P: connections, since the last line of log about them
	refusalLog time.Time
	peerAddr   string
	peerParty  party
	rotation   chan struct{} // P: closed when S has the new keys; nil: none under way
	peerWhole  bool          // P: what S said of its tables, until its session is ok
}

// party is what this daemon tells of itself, its term left out.
func (pl *peerLink) party() party {
	p := party{
		Version: Version, VM: pl.d.opt.VM, Node: pl.d.opt.Node, Role: string(pl.d.opt.Role),
		QMP: pl.d.opt.QMP != "", Config: pl.d.opt.ConfigDigest,
	}
	for _, n := range pl.d.nics {
		p.NICs = append(p.NICs, n.dp.MAC().String())
	}
	return p
}

// accept lets the secondary in (P).
func (pl *peerLink) accept(ctx context.Context, ln net.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	strangers := &strangers{peer: pl.d.opt.PeerAddr}
	again := backoff{first: pl.d.opt.link.retry, last: pl.d.opt.link.retryMax}
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil {
				pl.d.log.Warn("control link", "err", err)
			}
			if !again.wait(ctx) {
				return nil
			}
			continue
		}
		again.reset()
		if !strangers.take(conn) {
			pl.refused(conn, fmt.Errorf("it comes from %s, and %s is %s: that node has to connect from its control address", conn.RemoteAddr(), pl.d.opt.Peer, pl.d.opt.PeerAddr))
			continue
		}
		pl.d.work.Go(func() {
			err := pl.greet(ctx, conn, func() bool { return strangers.known(conn) })
			strangers.known(conn)
			if err != nil {
				pl.refused(conn, err)
			}
		})
	}
}

// refused closes a connection that does not become the link (P). Those who knock
// without end do not fill the log.
func (pl *peerLink) refused(conn net.Conn, err error) {
	conn.Close()
	pl.d.post(func() {
		if !pl.linkUp {
			pl.linkErr = err.Error()
		}
		if pl.refusals++; time.Since(pl.refusalLog) >= quietRequest {
			pl.d.log.Warn("control connection refused", "from", conn.RemoteAddr(), "err", err, "connections", pl.refusals)
			pl.refusalLog, pl.refusals = time.Now(), 0
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
func (pl *peerLink) greet(ctx context.Context, raw net.Conn, known func() bool) error {
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, err := pl.secure(ctx, raw)
	if err != nil {
		return err
	}
	l := newLink(conn, pl.d.opt.link)
	m, err := l.read(pl.d.opt.link.handshake)
	if err != nil {
		return pl.explain(err)
	}
	if m.Type != "hello" || m.Hello == nil {
		return fmt.Errorf("%q in place of hello", m.Type)
	}
	if err := checkPeer(pl.party(), m.Hello.party, pl.d.opt.Peer, string(datapath.RoleSecondary)); err != nil {
		_ = l.write(message{Type: "refuse", Cause: err.Error()})
		return err
	}
	if pl.d.life != nil {
		own, err := pl.d.repl.diskSizes()
		if err == nil {
			err = checkSizes(pl.d.life.Disks, own, m.Hello.Disks)
		}
		if err == nil {
			err = pl.d.repl.fitsQEMU(ctx, m.Hello)
		}
		if err != nil {
			_ = l.write(message{Type: "refuse", Cause: err.Error()})
			return err
		}
	}
	if !known() {
		return errors.New("newer connections took its place")
	}
	return pl.d.ask(ctx, func() { pl.offer(l, *m.Hello) })
}

// offer begins a session with the secondary (P). Nothing leaves until it holds.
func (pl *peerLink) offer(l *link, h hello) {
	pl.unlink(pl.link, errors.New("the secondary connected anew"))
	pl.link, pl.linkUp, pl.peerAddr, pl.peerParty = l, false, l.conn.RemoteAddr().String(), h.party
	pl.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvHandshake})

	// Connections whose offsets S has lost, or of which this P knows nothing; or a
	// checkpoint that one of them has begun an epoch with and the other has not.
	mine := 0
	if err := pl.d.each("count connections", func(n *nic) error {
		mine += n.primary.Stats().Connections
		return nil
	}); err != nil {
		l.close(err)
		return
	}
	known := pl.d.recovered || pl.sessions > 0
	none := mine == 0 && h.Connections == 0
	pl.peerWhole = h.Whole && (none || known && !h.Fresh && h.Epoch == pl.d.epoch)

	pl.d.term = max(pl.d.term, h.Term) + 1
	s := session{party: pl.party(), Epoch: pl.d.epoch, Digest: keyBytes(pl.d.nics[0].keys)}
	s.Term = pl.d.term
	if pl.d.life != nil {
		pl.d.repl.hello = h
		// COLO may run already where somebody else has started it.
		s.Record = pl.d.life.p.Term()
		s.Pair = pl.d.life.p.State() == failover.PrimaryPair || pl.d.life.p.State() == failover.PrimaryStart && pl.d.qmp.conn != nil && pl.d.qmp.info.colo == "primary"
	}
	s.Doubt = pl.d.opt.QMP != "" && (!pl.peerWhole || pl.d.ckpts.primary.InDoubt())
	s.Sign = newSeed()
	if err := pl.install(pl.d.nics[0].keys, s.Sign, false); err != nil {
		pl.d.fatal = err
		return
	}
	pl.follow(l, pl.d.opt.link.handshake)
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
func (pl *peerLink) install(digest *compare.Keys, sign []byte, rotated bool) error {
	s := datapath.Session{Term: pl.d.term, Epoch: pl.d.epoch, Digest: *digest, Rotated: rotated}
	s.TxKey, s.RxKey = signKeys([seedLen]byte(sign))
	if !pl.d.isPrimary() {
		s.TxKey, s.RxKey = s.RxKey, s.TxKey
	}
	for i, n := range pl.d.nics {
		mac, err := net.ParseMAC(pl.peerParty.NICs[i])
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
func (pl *peerLink) connect(ctx context.Context) {
	if pl.d.life != nil {
		select {
		case <-pl.d.repl.prepared:
		case <-ctx.Done():
			return
		}
	}
	again := backoff{first: pl.d.opt.link.retry, last: pl.d.opt.link.retryMax}
	for {
		up, err := pl.join(ctx)
		if ctx.Err() != nil {
			return
		}
		if up {
			again.reset()
		}
		pl.d.post(func() {
			if why := err.Error(); pl.linkErr != why {
				pl.linkErr = why
				pl.d.log.Warn("no control link", "primary", pl.d.opt.Control, "err", err)
			}
		})
		if !again.wait(ctx) {
			return
		}
	}
}

// join makes one link and stays until it ends (S). up: there was a session.
func (pl *peerLink) join(ctx context.Context) (up bool, err error) {
	dialer := net.Dialer{Timeout: pl.d.opt.link.handshake}
	if pl.d.opt.OwnAddr.IsValid() { // the primary lets nobody else in
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(pl.d.opt.OwnAddr, 0))
	}
	raw, err := dialer.DialContext(ctx, "tcp", pl.d.opt.Control)
	if err != nil {
		return false, err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, err := pl.secure(ctx, raw)
	if err != nil {
		return false, err
	}
	offsets := 0
	for _, n := range pl.d.nics {
		known, err := n.offsets()
		if err != nil {
			return false, fmt.Errorf("nic %d: count connections: %w", n.index, err)
		}
		offsets += known
	}
	h := hello{Connections: offsets}
	if pl.d.life != nil {
		if h.Disks, err = pl.d.repl.diskSizes(); err != nil {
			return false, err
		}
		if h.COLO, err = pl.d.qmp.follows(ctx); err != nil {
			return false, err
		}
	}
	if err := pl.d.ask(ctx, func() {
		h.party, h.Whole, h.Fresh = pl.party(), pl.d.ckpts.secondary.Whole(), !pl.d.recovered && pl.sessions == 0
		h.Term, h.Epoch = pl.d.term, pl.d.epoch
		if pl.d.life != nil {
			h.Machine, h.QEMU = pl.d.repl.caps.Machine, pl.d.repl.caps.Version
		}
	}); err != nil {
		return false, err
	}
	l := newLink(conn, pl.d.opt.link)
	if err := l.write(message{Type: "hello", Hello: &h}); err != nil {
		return false, pl.explain(err)
	}
	m, err := l.read(pl.d.opt.link.handshake)
	switch {
	case err != nil:
		return false, pl.explain(err)
	case m.Type == "refuse":
		return false, fmt.Errorf("the primary refused: %s", m.Cause)
	case m.Type != "session" || m.Session == nil:
		return false, fmt.Errorf("%q in place of session", m.Type)
	}
	if err := checkPeer(h.party, m.Session.party, pl.d.opt.Peer, string(datapath.RolePrimary)); err != nil {
		return false, err
	}
	var installed error
	if err := pl.d.ask(ctx, func() { installed = pl.joined(l, m.Session, h.COLO) }); err != nil {
		return false, err
	}
	if installed != nil {
		return false, installed
	}
	<-l.done
	return true, l.err
}

// joined begins a session (S).
func (pl *peerLink) joined(l *link, s *session, colo bool) error {
	if s.Term <= pl.d.term {
		return fmt.Errorf("the primary offers term %d, but term %d is known here: it is out of date", s.Term, pl.d.term)
	}
	keys := new(compare.Keys)
	if n, err := binary.Decode(s.Digest, binary.LittleEndian, keys); err != nil || n != len(s.Digest) || len(s.Sign) != seedLen {
		return errors.New("keys of a wrong length")
	}
	pl.d.term, pl.d.epoch, pl.peerParty = s.Term, s.Epoch, s.party
	if err := pl.install(keys, s.Sign, false); err != nil {
		pl.d.fatal = err
		return err
	}
	pl.link, pl.peerAddr = l, l.conn.RemoteAddr().String()
	pl.follow(l, pl.d.opt.link.silence)
	l.send(message{Type: "ok"}) // before anything that the machine says
	pl.up(!s.Doubt)
	pl.d.life.joinedPair(s.Record, s.Pair, colo)
	return nil
}

// up: the session holds.
func (pl *peerLink) up(ok bool) {
	pl.linkUp, pl.linkSince, pl.linkErr = true, time.Now(), ""
	pl.sessions++
	pl.d.log.Info("session", "peer", pl.d.opt.Peer, "address", pl.peerAddr, "term", pl.d.term, "epoch", pl.d.epoch)
	pl.d.event(journal.Session, "began", map[string]any{"address": pl.peerAddr, "term": pl.d.term})
	pl.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvLinkUp, OK: ok})
	pl.d.repl.paired()
}

// rotateEvery begins a rotation now and then, while l lasts (P).
func (pl *peerLink) rotateEvery(l *link) {
	tick := time.NewTicker(pl.d.opt.Rekey)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			pl.d.post(func() {
				if pl.link == l && pl.linkUp && pl.rotation == nil {
					pl.rotate(l)
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
func (pl *peerLink) rotate(l *link) {
	pl.d.term++
	sign := newSeed()
	if err := pl.install(pl.d.nics[0].keys, sign, true); err != nil {
		pl.d.fatal = err
		return
	}
	answered := make(chan struct{})
	pl.rotation = answered
	pl.d.work.Go(func() {
		late := time.NewTimer(pl.d.opt.link.handshake)
		defer late.Stop()
		select {
		case <-answered:
		case <-l.done:
		case <-late.C:
			pl.d.post(func() {
				if pl.rotation == answered {
					pl.unlink(l, errors.New("the secondary did not answer to new keys in time"))
				}
			})
		}
	})
	l.send(message{Type: "rekey", Rekey: &rekey{Term: pl.d.term, Sign: sign}})
}

// rotated follows P to the next term (S).
func (pl *peerLink) rotated(l *link, k *rekey) {
	if k == nil || k.Term != pl.d.term+1 || len(k.Sign) != seedLen {
		pl.unlink(l, fmt.Errorf("new keys that do not follow those of term %d", pl.d.term))
		return
	}
	pl.d.term = k.Term
	if err := pl.install(pl.d.nics[0].keys, k.Sign, true); err != nil {
		pl.d.fatal = err
		return
	}
	l.send(message{Type: "ok"})
	pl.d.log.Info("keys rotated", "term", pl.d.term)
}

// follow hands what comes on l to the controller, until l closes. The first
// message has to come within first.
func (pl *peerLink) follow(l *link, first time.Duration) {
	pl.d.work.Go(l.pump)
	pl.d.work.Go(func() {
		within := first
		for {
			m, err := l.read(within)
			if err != nil {
				l.close(err)
				pl.d.post(func() { pl.unlink(l, l.err) })
				return
			}
			within = pl.d.opt.link.silence
			pl.d.post(func() {
				if pl.link == l {
					pl.received(l, m)
				}
			})
		}
	})
}

// unlink gives l up, if it is the link there is.
func (pl *peerLink) unlink(l *link, why error) {
	if l == nil || pl.link != l {
		return
	}
	l.close(why)
	if pl.linkUp {
		pl.d.event(journal.Session, "ended: "+why.Error(), nil)
	}
	pl.link, pl.linkUp, pl.rotation, pl.linkSince, pl.linkErr = nil, false, nil, time.Now(), why.Error()
	pl.d.log.Warn("control link lost", "peer", pl.d.opt.Peer, "err", why)
	pl.d.ckpts.step(checkpoint.Event{Kind: checkpoint.EvLinkDown})
	pl.d.life.linkLost(why)
}

func (pl *peerLink) send(m message) {
	if pl.link != nil {
		pl.link.send(m)
	}
}

// received takes a message of the peer.
func (pl *peerLink) received(l *link, m message) {
	kinds := map[string]checkpoint.Kind{"prepare": checkpoint.EvPrepare, "abort": checkpoint.EvAbort}
	if pl.d.isPrimary() {
		kinds = map[string]checkpoint.Kind{"ready": checkpoint.EvReady, "stopped": checkpoint.EvPeerStopped, "resumed": checkpoint.EvPeerResumed, "abort": checkpoint.EvPeerAbort}
	}
	kind, known := kinds[m.Type]
	switch {
	case pl.d.isPrimary() && m.Type == "ok" && !pl.linkUp:
		pl.up(pl.peerWhole)
		if pl.d.opt.Rekey > 0 {
			pl.d.work.Go(func() { pl.rotateEvery(l) })
		}
		return
	case pl.linkUp && pl.d.life.heardOf(m):
		return
	case pl.rotation != nil && m.Type == "ok":
		close(pl.rotation)
		pl.rotation = nil
		pl.d.log.Info("keys rotated", "term", pl.d.term)
		return
	case !pl.d.isPrimary() && m.Type == "rekey" && pl.linkUp:
		pl.rotated(l, m.Rekey)
		return
	case !known || !pl.linkUp:
		pl.unlink(l, fmt.Errorf("message %q makes no sense here", m.Type))
		return
	}
	if kind == checkpoint.EvPeerResumed && len(pl.d.ckpts.attempts) > 0 {
		if a := &pl.d.ckpts.attempts[len(pl.d.ckpts.attempts)-1]; a.Epoch == m.Epoch {
			a.SVMPauseMS = milliseconds(m.PauseNS)
		}
	}
	pl.d.ckpts.step(checkpoint.Event{Kind: kind, Epoch: m.Epoch, OK: true, Cause: m.Cause})
}
