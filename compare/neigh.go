// SPDX-License-Identifier: Apache-2.0

package compare

import "time"

// The SVM's requests for its neighbours' addresses do not leave S: two guests of one
// address would confuse the network. P asks in the guest's name, now and then, and
// the answers reach both guests, so the SVM's entries live.

const (
	neighEvery = time.Second
	maxNeighs  = 1024
)

type neighKey struct {
	guest, remote [16]byte
	vlan, vlan2   uint16
}

// neighAsk says when P last asked.
type neighAsk struct {
	key neighKey
	at  int64
}

// neigh passes on a request of the SVM. It says nothing of the guest's state, so it
// leaves while frozen too.
func (p *Primary) neigh(s *Segment) {
	if p.solo {
		return
	}
	if len(s.Opts) != macLen {
		p.stats.Drops[ReasonMalformed]++
		return
	}
	for p.neighs.len() > 0 && p.neighs.view()[0].at+int64(neighEvery) <= p.now {
		delete(p.asked, p.neighs.view()[0].key)
		p.neighs.drop(1)
	}
	k := neighKey{s.Guest, s.Remote, s.VLAN, s.VLAN2}
	if _, ok := p.asked[k]; ok || len(p.asked) == maxNeighs {
		p.stats.Drops[ReasonNeigh]++
		return
	}
	p.asked[k] = struct{}{}
	p.neighs.insert(p.neighs.len(), neighAsk{k, p.now})
	e := p.emit(OpNeigh, &s.Tuple)
	e.OptLen = uint8(copy(e.Opts[:], s.Opts))
}

const macLen = 6
