// SPDX-License-Identifier: Apache-2.0

package compare

// Active opens whose ports differ never meet in the connection table. So those
// that only one guest has made are kept by where they go to.

type openKey struct {
	guest, remote      [16]byte
	rport, vlan, vlan2 uint16
}

func (t *Tuple) openKey() openKey { return openKey{t.Guest, t.Remote, t.RemotePort, t.VLAN, t.VLAN2} }

// openSet lists the active opens to one place: SYNs of the PVM that are not
// matched, and SYNs of the SVM that no PVM SYN came for.
type openSet struct{ pvm, svm *conn }

// openLink makes conn an element of such a list.
type openLink struct {
	head       **conn
	prev, next *conn
}

func (p *Primary) linkOpen(c *conn, bySVM bool) {
	key := c.tuple.openKey()
	set := p.opens[key]
	if set == nil {
		set = new(openSet)
		p.opens[key] = set
	}
	head := &set.pvm
	if bySVM {
		head = &set.svm
	}
	c.openLink = openLink{head: head, next: *head}
	if *head != nil {
		(*head).openLink.prev = c
	}
	*head = c
}

func (p *Primary) unlinkOpen(c *conn) {
	l := c.openLink
	if l.head == nil {
		return
	}
	if l.next != nil {
		l.next.openLink.prev = l.prev
	}
	if l.prev != nil {
		l.prev.openLink.next = l.next
	} else {
		*l.head = l.next
	}
	c.openLink = openLink{}
	key := c.tuple.openKey()
	if set := p.opens[key]; set != nil && set.pvm == nil && set.svm == nil {
		delete(p.opens, key)
	}
}

// pvmOpened: the PVM opened c actively. opened: so did the SVM. If the SVM opened
// something else to the same place, the guests went different ways.
func (p *Primary) pvmOpened(c *conn, opened bool) {
	if set := p.opens[c.tuple.openKey()]; !opened && set != nil && set.svm != nil {
		p.diverge(c, ReasonOpen)
	}
	p.linkOpen(c, false)
}

// svmOpened: the SVM opened s.Tuple actively, and S knows of no such SYN of the
// PVM. The PVM's may just be on its way; else Timeout decides.
func (p *Primary) svmOpened(s *Segment) {
	c := p.conns[s.Tuple]
	if c != nil && (c.openOnSVM || c.synSeen && c.synFlags&ACK == 0 && !c.established) {
		return
	}
	if set := p.opens[s.Tuple.openKey()]; set != nil && set.pvm != nil {
		p.diverge(set.pvm, ReasonOpen)
	}
	if c == nil {
		if c = p.create(&s.Tuple); c == nil {
			p.stats.Drops[ReasonStray]++
			return
		}
	}
	c.openOnSVM = true
	if c.openLink.head == nil {
		p.linkOpen(c, true)
	}
	p.wait(c)
}
