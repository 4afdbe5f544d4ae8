// SPDX-License-Identifier: Apache-2.0

package control

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// newSeed is the secret of one term.
func newSeed() []byte {
	seed := make([]byte, peerlink.SeedLen)
	rand.Read(seed) // never fails
	return seed
}

// install gives every NIC the session of the present term and epoch; sign is the
// seed of its signing keys.
func (pl *peerLink) install(digest *compare.Keys, sign []byte, rotated bool) error {
	s := datapath.Session{Term: pl.d.term, Epoch: pl.d.epoch, Digest: *digest, Rotated: rotated}
	s.TxKey, s.RxKey = peerlink.SignKeys([peerlink.SeedLen]byte(sign))
	if !pl.d.isPrimary() {
		s.TxKey, s.RxKey = s.RxKey, s.TxKey
	}
	for i, n := range pl.d.nics {
		mac, err := net.ParseMAC(pl.peerParty.NICs[i])
		if err != nil {
			return fmt.Errorf("nic %d: %w", i, err)
		}
		s.PeerMAC = mac
		if err := n.Do(func() error { return n.Install(s) }); err != nil {
			return fmt.Errorf("nic %d: install session: %w", i, err)
		}
	}
	return nil
}

// rotateEvery begins a rotation now and then, while l lasts (P).
func (pl *peerLink) rotateEvery(l *peerlink.Link) {
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
		case <-l.Done():
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
func (pl *peerLink) rotate(l *peerlink.Link) {
	pl.d.term++
	sign := newSeed()
	if err := pl.install(pl.d.nics[0].Keys, sign, true); err != nil {
		pl.d.fatal = err
		return
	}
	answered := make(chan struct{})
	pl.rotation = answered
	pl.d.work.Go(func() {
		late := time.NewTimer(pl.d.opt.link.Handshake)
		defer late.Stop()
		select {
		case <-answered:
		case <-l.Done():
		case <-late.C:
			pl.d.post(func() {
				if pl.rotation == answered {
					pl.unlink(l, errors.New("the secondary did not answer to new keys in time"))
				}
			})
		}
	})
	l.Send(peerlink.Rekey{Term: pl.d.term, Sign: sign})
}

// rotated follows P to the next term (S).
func (pl *peerLink) rotated(l *peerlink.Link, k *peerlink.Rekey) {
	if k == nil || k.Term != pl.d.term+1 || len(k.Sign) != peerlink.SeedLen {
		pl.unlink(l, fmt.Errorf("new keys that do not follow those of term %d", pl.d.term))
		return
	}
	pl.d.term = k.Term
	if err := pl.install(pl.d.nics[0].Keys, k.Sign, true); err != nil {
		pl.d.fatal = err
		return
	}
	l.Send(peerlink.OK{})
	pl.d.log.Info("keys rotated", "term", pl.d.term)
}
