// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// peerLink is this host's end of the control link, and the session on it.
type peerLink struct {
	d          *Daemon
	link       *peerlink.Link // nil: none
	linkUp     bool           // its session holds
	linkSince  time.Time
	linkErr    string
	sessions   int // made so far
	refusals   int // P: connections, since the last line of log about them
	refusalLog time.Time
	peerAddr   string
	peerParty  peerlink.Party
	rotation   chan struct{}   // P: closed when S has the new keys; nil: none under way
	peerWhole  bool            // P: what S reported of its tables, until its session is ok
	peers      []Peer          // P: who may be the secondary; not changed
	spare      string          // S: why P has no use for this node; "": it has, or is not heard
	spares     map[string]bool // P: nodes that were told so
}

// security is how a link with a node is protected.
func (pl *peerLink) security(with *Peer) *peerlink.Security {
	o := &pl.d.opt
	return &peerlink.Security{TLS: with.TLS, Server: pl.d.isPrimary(), Node: o.Node, Peer: with.Name, Timeout: o.link.Handshake}
}

// party is what this daemon reports of itself, its key generation left out.
func (pl *peerLink) party() peerlink.Party {
	p := peerlink.Party{
		Version: peerlink.Version, VM: pl.d.opt.VM, Node: pl.d.opt.Node, Role: string(pl.d.opt.Role),
		QMP: pl.d.opt.QMP != "", Config: pl.d.opt.ConfigDigest,
	}
	for _, n := range pl.d.nics {
		p.NICs = append(p.NICs, n.DP.MAC().String())
	}
	return p
}

// connect makes the link to the primary, again and again (S).
func (pl *peerLink) connect(ctx context.Context) {
	if pl.d.failover != nil {
		select {
		case <-pl.d.repl.prepared:
		case <-ctx.Done():
			return
		}
	}
	again := backoff{first: pl.d.opt.link.Retry, last: pl.d.opt.link.RetryMax}
	for {
		up, err := pl.join(ctx)
		if ctx.Err() != nil {
			return
		}
		if up {
			again.reset()
		}
		pl.d.post(func() {
			spare := (*spareError)(nil)
			was := pl.spare
			pl.spare = ""
			switch why := err.Error(); {
			case up || !pl.d.failover.waits(): // the end of a session is reported already
			case errors.As(err, &spare):
				if pl.spare, pl.linkErr = why, ""; was != why {
					pl.d.log.Info(why)
				}
			case pl.linkErr != why:
				pl.linkErr = why
				pl.d.log.Warn("no control link", "primary", pl.d.opt.Control, "err", err)
			}
		})
		if !again.wait(ctx) {
			return
		}
	}
}

// spareError is P's answer that it has its secondary.
type spareError struct{ cause string }

func (e *spareError) Error() string { return "this node is a spare: " + e.cause }

// join makes one link and stays until it ends (S). up: there was a session.
func (pl *peerLink) join(ctx context.Context) (up bool, err error) {
	dialer := net.Dialer{Timeout: pl.d.opt.link.Handshake}
	if pl.d.opt.OwnAddr.IsValid() { // the primary lets nobody else in
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(pl.d.opt.OwnAddr, 0))
	}
	raw, err := dialer.DialContext(ctx, "tcp", pl.d.opt.Control)
	if err != nil {
		return false, err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	security := pl.security(&Peer{Name: pl.d.opt.Peer, TLS: pl.d.opt.TLS}) // S has one peer as long as its role lasts
	conn, err := security.Secure(ctx, raw)
	if err != nil {
		return false, err
	}
	offsets := 0
	for _, n := range pl.d.nics {
		known, err := n.Offsets()
		if err != nil {
			return false, fmt.Errorf("nic %d: count connections: %w", n.Index, err)
		}
		offsets += known
	}
	h := peerlink.Hello{Connections: offsets}
	if pl.d.failover != nil {
		if h.Disks, err = pl.d.repl.diskSizes(); err != nil {
			return false, err
		}
		if h.COLO, err = pl.d.qmp.follows(ctx); err != nil {
			return false, err
		}
	}
	if err := pl.d.ask(ctx, func() {
		h.Party, h.Whole, h.Fresh = pl.party(), pl.d.checkpoints.secondary.Whole(), !pl.d.recovered && pl.sessions == 0
		h.Term, h.Epoch, h.PausedNS = pl.d.term, pl.d.epoch, pl.d.clock.sum
		if pl.d.failover != nil {
			if note := pl.d.failover.note; note != nil && len(pl.d.failover.Disks) > 0 {
				h.Notes, h.Point = true, note.Point()
			}
			h.Machine, h.QEMU = pl.d.repl.caps.Machine, pl.d.repl.caps.Version
		}
	}); err != nil {
		return false, err
	}
	l := peerlink.New(conn, pl.d.opt.link)
	if err := l.Write(h); err != nil {
		return false, security.Explain(err)
	}
	m, err := l.Read(pl.d.opt.link.Handshake)
	if err != nil {
		return false, security.Explain(err)
	}
	if m, ok := m.(peerlink.Refuse); ok && m.Spare {
		return false, &spareError{m.Cause}
	} else if ok {
		return false, fmt.Errorf("the primary refused: %s", m.Cause)
	}
	s, ok := m.(peerlink.Session)
	if !ok {
		return false, fmt.Errorf("%q in place of session", m.Type())
	}
	if err := peerlink.CheckPeer(h.Party, s.Party, pl.d.opt.Peer, string(datapath.RolePrimary)); err != nil {
		return false, err
	}
	var installed error
	if err := pl.d.ask(ctx, func() { installed = pl.joined(l, &s, h.COLO) }); err != nil {
		return false, err
	}
	if installed != nil {
		return false, installed
	}
	<-l.Done()
	return true, l.Err()
}

// joined begins a session (S).
func (pl *peerLink) joined(l *peerlink.Link, s *peerlink.Session, colo bool) error {
	if s.Term == math.MaxUint32 {
		return errors.New("the primary offers the last term that there is: none could follow it")
	}
	if s.Term <= pl.d.term {
		return fmt.Errorf("the primary offers term %d, but term %d is known here: it is out of date", s.Term, pl.d.term)
	}
	keys := new(compare.Keys)
	if n, err := binary.Decode(s.Digest, binary.LittleEndian, keys); err != nil || n != len(s.Digest) || len(s.Sign) != peerlink.SeedLen {
		return errors.New("keys of a wrong length")
	}
	pl.d.term, pl.d.epoch, pl.peerParty = s.Term, s.Epoch, s.Party
	if err := pl.install(keys, s.Sign, false); err != nil {
		pl.d.fatal = err
		return err
	}
	pl.link, pl.peerAddr = l, l.RemoteAddr().String()
	pl.follow(l, pl.d.opt.link.Silence)
	l.Send(peerlink.OK{}) // before anything that the machine sends
	pl.up(!s.Doubt)
	pl.d.failover.joined(s.Record, s.Pair, colo)
	return nil
}

// up: the session holds.
func (pl *peerLink) up(ok bool) {
	pl.linkUp, pl.linkSince, pl.linkErr = true, time.Now(), ""
	pl.sessions++
	pl.d.log.Info("session", "peer", pl.d.opt.Peer, "address", pl.peerAddr, "term", pl.d.term, "epoch", pl.d.epoch)
	pl.d.event(journal.Session, "began", map[string]any{"address": pl.peerAddr, "term": pl.d.term})
	pl.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvLinkUp, OK: ok})
	pl.d.repl.paired()
}

// follow hands what comes on l to the controller, until l closes. The first
// message has to come within first.
func (pl *peerLink) follow(l *peerlink.Link, first time.Duration) {
	pl.d.work.Go(l.Pump)
	pl.d.work.Go(func() {
		within := first
		for {
			m, err := l.Read(within)
			if err != nil {
				l.Close(err)
				pl.d.post(func() { pl.unlink(l, l.Err()) })
				return
			}
			within = pl.d.opt.link.Silence
			pl.d.post(func() {
				if pl.link == l {
					pl.received(l, m)
				}
			})
		}
	})
}

// unlink gives l up, if it is the link there is.
func (pl *peerLink) unlink(l *peerlink.Link, why error) {
	if l == nil || pl.link != l {
		return
	}
	l.Close(why)
	said := why.Error()
	if errors.Is(why, io.EOF) || errors.Is(why, syscall.ECONNRESET) {
		said = pl.d.opt.Peer + "'s daemon has ended, or closed it"
	}
	if pl.linkUp {
		pl.d.event(journal.Session, "ended: "+said, nil)
	}
	pl.link, pl.linkUp, pl.rotation, pl.linkSince, pl.linkErr = nil, false, nil, time.Now(), said
	pl.d.log.Warn("control link lost", "peer", pl.d.opt.Peer, "why", said)
	pl.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvLinkDown})
	pl.d.failover.linkLost(why)
}

func (pl *peerLink) send(m peerlink.Message) {
	if pl.link != nil {
		pl.link.Send(m)
	}
}

// received takes a message of the peer.
func (pl *peerLink) received(l *peerlink.Link, m peerlink.Message) {
	_, ok := m.(peerlink.OK)
	rekey, rekeys := m.(peerlink.Rekey)
	switch {
	case pl.d.isPrimary() && ok && !pl.linkUp:
		pl.up(pl.peerWhole)
		if pl.d.opt.Rekey > 0 {
			pl.d.work.Go(func() { pl.rotateEvery(l) })
		}
	case pl.linkUp && pl.d.failover.received(m):
	case pl.rotation != nil && ok:
		close(pl.rotation)
		pl.rotation = nil
		pl.d.log.Info("keys rotated", "term", pl.d.term)
	case !pl.d.isPrimary() && rekeys && pl.linkUp:
		pl.rotated(l, &rekey)
	case !pl.linkUp || !pl.d.checkpoints.received(m):
		pl.unlink(l, fmt.Errorf("message %q makes no sense here", m.Type()))
	}
}
