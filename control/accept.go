// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lockstep-ft/lockstep/control/checkpoint"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/nicloop"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// maxStrangers bounds the connections that have not identified themselves.
const maxStrangers = 8

// accept lets the secondary in (P).
func (pl *peerLink) accept(ctx context.Context, ln net.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	strangers := new(strangers)
	again := backoff{first: pl.d.opt.link.Retry, last: pl.d.opt.link.RetryMax}
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
		peer := pl.from(conn)
		if peer == nil {
			var expected []string
			for _, p := range pl.peers {
				expected = append(expected, fmt.Sprintf("%s is %s", p.Name, p.Addr))
			}
			pl.refused(conn, fmt.Errorf("it comes from %s, and %s: that node has to connect from its control address", conn.RemoteAddr(), strings.Join(expected, ", ")))
			continue
		}
		strangers.take(conn)
		pl.d.work.Go(func() {
			err := pl.greet(ctx, conn, peer, func() bool { return strangers.known(conn) })
			strangers.known(conn)
			if err != nil {
				pl.refused(conn, err)
			}
		})
	}
}

// from is the node from whose address a connection comes; nil: from none's (P).
func (pl *peerLink) from(conn net.Conn) *Peer {
	from, ok := conn.RemoteAddr().(*net.TCPAddr)
	for i := range pl.peers {
		if p := &pl.peers[i]; !ok || !p.Addr.IsValid() || from.AddrPort().Addr().Unmap().WithZone("") == p.Addr.WithZone("") {
			return p
		}
	}
	return nil
}

// refused closes a connection that does not become the link (P). Those who connect
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

// strangers are the connections that have not identified themselves. Only the peers'
// addresses may have any; when they are too many, the oldest goes: a peer's daemon
// identifies itself at once, and whoever does not was there before it.
type strangers struct {
	mu   sync.Mutex
	list []net.Conn // oldest first
}

// take lets conn in.
func (s *strangers) take(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.list) == maxStrangers {
		s.list[0].Close() // its greeting fails
		s.list = slices.Delete(s.list, 0, 1)
	}
	s.list = append(s.list, conn)
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
func (pl *peerLink) greet(ctx context.Context, raw net.Conn, peer *Peer, known func() bool) error {
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	security := pl.security(peer)
	conn, err := security.Secure(ctx, raw)
	if err != nil {
		return err
	}
	l := peerlink.New(conn, pl.d.opt.link)
	m, err := l.Read(pl.d.opt.link.Handshake)
	if err != nil {
		return security.Explain(err)
	}
	h, ok := m.(peerlink.Hello)
	if !ok {
		return fmt.Errorf("%q in place of hello", m.Type())
	}
	if err := peerlink.CheckPeer(pl.party(), h.Party, peer.Name, string(datapath.RoleSecondary)); err != nil {
		_ = l.Write(peerlink.Refuse{Cause: err.Error()})
		return err
	}
	if pl.d.failover != nil {
		own, err := pl.d.repl.diskSizes()
		if err == nil {
			err = checkSizes(pl.d.failover.Disks, own, h.Disks)
		}
		if err == nil {
			err = pl.d.repl.fitsQEMU(ctx, &h)
		}
		if err != nil {
			_ = l.Write(peerlink.Refuse{Cause: err.Error()})
			return err
		}
	}
	if !known() {
		return errors.New("newer connections took its place")
	}
	taken, turned := "", error(nil)
	err = pl.d.ask(ctx, func() {
		if taken = pl.taken(peer.Name); taken != "" {
			return
		}
		if turned = pl.turnTo(peer); turned == nil {
			pl.offer(l, h)
		}
	})
	switch {
	case err != nil: // the controller may still be at it
		return err
	case taken != "":
		_ = l.Write(peerlink.Refuse{Cause: taken, Spare: true})
		return raw.Close()
	case turned != nil:
		_ = l.Write(peerlink.Refuse{Cause: turned.Error()})
	}
	return turned
}

// offer begins a session with the secondary (P). Nothing leaves until it holds.
func (pl *peerLink) offer(l *peerlink.Link, h peerlink.Hello) {
	pl.unlink(pl.link, errors.New("the secondary connected anew"))
	pl.link, pl.linkUp, pl.peerAddr, pl.peerParty = l, false, l.RemoteAddr().String(), h.Party
	pl.d.checkpoints.step(checkpoint.Event{Kind: checkpoint.EvHandshake})

	// Connections whose offsets S has lost, or of which this P knows nothing; or a
	// checkpoint that one of them has begun an epoch with and the other has not.
	mine := 0
	if err := pl.d.each("count connections", func(n *nicloop.Loop) error {
		mine += n.Primary.Stats().Connections
		return nil
	}); err != nil {
		l.Close(err)
		return
	}
	known := pl.d.recovered || pl.sessions > 0
	none := mine == 0 && h.Connections == 0
	pl.peerWhole = h.Whole && (none || known && !h.Fresh && h.Epoch == pl.d.epoch)

	pl.d.clock.sum = max(pl.d.clock.sum, h.PausedNS) // of a daemon before this one
	pl.d.term = max(pl.d.term, h.Term) + 1
	s := peerlink.Session{Party: pl.party(), Epoch: pl.d.epoch, Digest: peerlink.KeyBytes(pl.d.nics[0].Keys)}
	s.Term = pl.d.term
	if pl.d.failover != nil {
		pl.d.repl.hello = h
		pl.d.repl.points.lost()
		// COLO may run already where somebody else has started it.
		s.Record = pl.d.failover.p.Term()
		s.Pair = pl.d.failover.p.State() == failover.PrimaryPair || pl.d.failover.p.State() == failover.PrimaryStart && pl.d.qmp.conn != nil && pl.d.qmp.info.colo == "primary"
	}
	s.Doubt = pl.d.opt.QMP != "" && (!pl.peerWhole || pl.d.checkpoints.primary.InDoubt())
	s.Sign = newSeed()
	if err := pl.install(pl.d.nics[0].Keys, s.Sign, false); err != nil {
		pl.d.fatal = err
		return
	}
	pl.follow(l, pl.d.opt.link.Handshake)
	l.Send(s)
}
