// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"slices"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/state"
)

// taken is why a node cannot be the secondary now, although nothing is wrong with it; "": it can (P). Where there are
// spares a pair is still two nodes: the one that is there stays, until the arbiter has let this host go on alone.
func (pl *peerLink) taken(node string) (why string) {
	fo, self := pl.d.failover, pl.d.opt.Node
	if pl.d.opt.Spares == nil || fo == nil {
		return ""
	}
	switch peer := pl.d.opt.Peer; {
	case node != peer && (pl.link != nil || fo.p.State() != failover.PrimaryStart && fo.p.State() != failover.PrimarySolo):
		why = fmt.Sprintf("%s's secondary is %s", self, peer)
	case fo.boundTo(node) != "":
		why = fmt.Sprintf("%s may be able to take over from %s still, so %[2]s waits for that node; if it is lost, `lockstep failover` on %[2]s goes on without it", fo.boundTo(node), self)
	default:
		return ""
	}
	if !pl.spares[node] {
		pl.d.log.Info(node+" waits as a spare", "why", why)
		pl.spares[node] = true
	}
	return why
}

// boundTo is the node other than this one that may be able to take over at this host's fencing term; "": there is none. A
// second one that is covered at the same term could win the arbiter from under the first, which lets this host
// transmit (R18). At a new term, which this host asks for when it goes on alone, a former secondary can win nothing.
func (fo *failoverPart) boundTo(node string) string {
	follower, known := fo.state.Follower(fo.p.Term())
	if follower == "" {
		follower = fo.first // of a pair that had no spares when it began
	}
	isPeer := func(p Peer) bool { return p.Name == follower }
	if fo.unbound || !known || follower == node || !slices.ContainsFunc(fo.d.peer.peers, isPeer) {
		return ""
	}
	return follower
}

// turnTo makes a node the peer (P). Nothing is mirrored meanwhile: taken sees to that.
func (pl *peerLink) turnTo(to *Peer) error {
	delete(pl.spares, to.Name)
	if to.Name == pl.d.opt.Peer {
		return nil
	}
	if to.Direct != nil {
		if err := to.Direct(); err != nil {
			return err
		}
	}
	pl.d.log.Info(to.Name+" takes the place of "+pl.d.opt.Peer, "address", to.Addr)
	pl.d.opt.Peer, pl.d.failover.Peers = to.Name, to.QEMU
	return nil
}

// passedBy ends a secondary that nothing covers, when another node than its primary transmits now: it follows that one
// (S). One that is covered asks the arbiter in its own time, and loses.
func (fo *failoverPart) passedBy(now arbiter.Entry) {
	isSpeaker := func(p Peer) bool { return p.Name == now.Speaker }
	if fo.s.Covered() || !fo.waits() || now.Speaker == fo.d.opt.Peer || !slices.ContainsFunc(fo.d.opt.Spares, isSpeaker) {
		return
	}
	fo.end(fmt.Errorf("%w: the arbiter names %s, and no longer %s", ErrAfresh, now.Speaker, fo.d.opt.Peer))
}

// withPeer notes whose pair this is, where that is not known from the config.
func (fo *failoverPart) withPeer(st *state.State) {
	st.Peer, st.PairTerm = "", 0
	if fo.d.opt.Spares != nil {
		st.Peer, st.PairTerm = fo.d.opt.Peer, fo.machine.Term()
	}
}
