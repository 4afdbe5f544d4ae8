// SPDX-License-Identifier: Apache-2.0

package control

import (
	"errors"
	"fmt"
	"slices"

	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// sendEdges sends S the connections that were taken over by this host or by one
// before it (P). There may be millions, so that takes a while, beside everything else.
// S is told that it is covered only after them.
func (re *replicator) sendEdges() {
	fo, peer := re.d.failover, re.d.peer.link
	if peer == nil {
		return // the next session gets them
	}
	re.edgesOn = peer
	re.d.work.Go(func() {
		err := re.streamEdges(peer)
		re.d.post(func() {
			switch {
			case re.d.peer.link != peer:
			case err != nil:
				re.d.peer.unlink(peer, err) // the next session tries again
			default:
				if re.edgesSent = peer; fo.p.Covered() {
					re.d.peer.send(peerlink.Covered{Term: fo.p.Term()})
				}
			}
		})
	})
}

func (re *replicator) streamEdges(peer *peerlink.Link) error {
	for _, n := range re.d.nics {
		edges, err := n.DP.Edges()
		if err != nil {
			return fmt.Errorf("nic %d: %w", n.Index, err)
		}
		if !peer.Stream(func(yield func(peerlink.Message) bool) {
			for some := range slices.Chunk(edges, peerlink.MaxEdges) {
				if !yield(peerlink.Edges{NIC: n.Index, Edges: some}) {
					return
				}
			}
		}) {
			return errors.New("the link was lost while edges were sent")
		}
	}
	return nil
}

// addEdges takes what sendEdges sends (S).
func (re *replicator) addEdges(m peerlink.Edges) error {
	if m.NIC < 0 || m.NIC >= len(re.d.nics) {
		return fmt.Errorf("edges of NIC %d, which there is not", m.NIC)
	}
	n := re.d.nics[m.NIC]
	return n.Do(func() error { return n.DP.AddEdges(m.Edges) })
}
