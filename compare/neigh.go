// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// The SVM's requests for its neighbours' addresses (ARP, neighbour discovery) do not leave
// S: two guests with one address would confuse the network. P asks in the guest's name,
// at most once in neighEvery, and the answers reach both guests, so the SVM's neighbour
// entries stay valid.

const (
	neighEvery = time.Second
	maxNeighs  = 1024
)

type neighKey struct {
	guest, remote [16]byte
	vlan, vlan2   uint16
}

// neighAsk is a question and the time of it.
type neighAsk struct {
	key neighKey
	at  int64
}

// neighbours are those asked for within neighEvery, at most maxNeighs.
type neighbours struct {
	asked  map[neighKey]struct{}
	byTime deque[neighAsk]
}

// ask reports whether to ask for k now, and notes it.
func (n *neighbours) ask(k neighKey, now int64) bool {
	for n.byTime.len() > 0 && n.byTime.view()[0].at+int64(neighEvery) <= now {
		delete(n.asked, n.byTime.view()[0].key)
		n.byTime.drop(1)
	}
	if _, ok := n.asked[k]; ok || len(n.asked) == maxNeighs {
		return false
	}
	n.asked[k] = struct{}{}
	n.byTime.insert(n.byTime.len(), neighAsk{k, now})
	return true
}

// neigh passes on a request of the SVM. It reveals nothing of the guest's state, so it
// leaves while frozen too.
func (p *Primary) neigh(s *Segment) {
	if p.solo {
		return
	}
	if len(s.Opts) != macLen {
		p.stats.Drops[ReasonMalformed]++
		return
	}
	if !p.neighs.ask(neighKey{s.Guest, s.Remote, s.VLAN, s.VLAN2}, p.now) {
		p.stats.Drops[ReasonNeigh]++
		return
	}
	e := p.emit(OpNeigh, &s.Tuple)
	e.OptLen = uint8(copy(e.Opts[:], s.Opts))
}

const macLen = 6
