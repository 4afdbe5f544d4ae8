// SPDX-License-Identifier: Apache-2.0

package tcp

// More accurate ECN (RFC 9768): the flags AE, CWR and ECE count the marked segments modulo 8, an option counts bytes.

const (
	firstCE   = 5 // what the counter of marked segments begins with
	notMarked = 2 // in the handshake: the SYN, or SYN|ACK, could not be marked
)

// accurate is AccECN's state of a connection.
type accurate struct {
	on        bool
	first     bool   // the next segment that is sent says how the SYN|ACK arrived
	waits     bool   // the next one that comes in does
	ce        uint8  // marked segments that came in
	ect0, ceb uint32 // bytes that came in: unmarked, marked
	told      uint32 // sum of both when the option was sent
	seen      uint8  // of the peer's marked segments
}

// aceFlags are AE, CWR and ECE as the counter has them.
func aceFlags(ace uint8) (ae bool, flags uint8) {
	if ace&2 != 0 {
		flags |= cwr
	}
	if ace&1 != 0 {
		flags |= ece
	}
	return ace&4 != 0, flags
}

func (g *segment) ace() (ace uint8) {
	if g.ae {
		ace = 4
	}
	return ace | g.flags&cwr>>6 | g.flags&ece>>6
}

func (a *accurate) begin() { *a = accurate{on: true, ce: firstCE, seen: firstCE, ect0: 1} }

// header sets the flags of a segment that is no SYN.
func (a *accurate) header(h *header) {
	ace := a.ce & 7
	if a.first {
		a.first, ace = false, notMarked
	}
	ae, flags := aceFlags(ace)
	h.ae = ae
	h.flags = h.flags&^(ece|cwr) | flags
}

// in counts a segment that came in.
func (a *accurate) in(g *segment) {
	switch {
	case g.ce:
		a.ce++
		a.ceb += uint32(len(g.data))
	case g.ect:
		a.ect0 += uint32(len(g.data))
	}
}

// echo reports whether the peer has got marked segments that it had not told of.
func (a *accurate) echo(g *segment) bool {
	if g.has(syn) {
		return false
	}
	if a.waits {
		a.waits = false
		if g.ace() == notMarked {
			return false
		}
	}
	delta := (g.ace() - a.seen) & 7
	a.seen += delta
	return delta > 0
}

// option appends the counters, if they have changed and there is room.
func (a *accurate) option(b []byte, always bool) []byte {
	if sum := a.ect0 + a.ceb; (sum != a.told || always) && len(b) <= 28 {
		a.told = sum
		b = append(b, optNOP, optAccECN0, 11)
		for _, n := range [...]uint32{a.ect0, a.ceb, 1} {
			b = append(b, uint8(n>>16), uint8(n>>8), uint8(n))
		}
	}
	return b
}
