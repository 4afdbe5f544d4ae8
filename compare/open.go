// SPDX-License-Identifier: Apache-2.0

package compare

// Active opens whose ports differ never meet in the connection table. So those
// that only one guest has made are kept by where they go to.

type openKey struct {
	guest, remote      [16]byte
	rport, vlan, vlan2 uint16
}

func (t *Tuple) openKey() openKey { return openKey{t.Guest, t.Remote, t.RemotePort, t.VLAN, t.VLAN2} }

// openTable holds the active opens, by where they go to.
type openTable map[openKey]*openSet

// openSet lists the active opens to one place: SYNs of the PVM that are not
// matched, and SYNs of the SVM that no PVM SYN came for.
type openSet struct{ pvm, svm list[*conn] }

// newest is the newest connection in l, nil without one.
func newest(l *list[*conn]) *conn {
	if l.last == nil {
		return nil
	}
	return l.last.of
}

// link notes that the PVM, or the SVM, opened c.
func (o openTable) link(c *conn, bySVM bool) {
	key := c.tuple.openKey()
	set := o[key]
	if set == nil {
		set = new(openSet)
		o[key] = set
	}
	if bySVM {
		set.svm.push(&c.open)
	} else {
		set.pvm.push(&c.open)
	}
}

// unlink forgets that c was opened, if that was noted.
func (o openTable) unlink(c *conn) {
	if c.open.in == nil {
		return
	}
	c.open.unlink()
	key := c.tuple.openKey()
	if set := o[key]; set.pvm.n == 0 && set.svm.n == 0 {
		delete(o, key)
	}
}

// opened returns the newest connection to where t goes that the PVM, and that the SVM,
// opened alone; nil without one.
func (o openTable) opened(t *Tuple) (pvm, svm *conn) {
	if set := o[t.openKey()]; set != nil {
		return newest(&set.pvm), newest(&set.svm)
	}
	return nil, nil
}

// pvmOpened: the PVM opened c actively. both: so did the SVM. If the SVM opened
// something else to the same place, the guests went different ways.
func (p *Primary) pvmOpened(c *conn, both bool) {
	if _, svm := p.opens.opened(&c.tuple); !both && svm != nil {
		c.diverge(ReasonOpen, "")
	}
	p.opens.link(c, false)
}

// svmOpened: the SVM opened s.Tuple actively, and S knows of no such SYN of the
// PVM. The PVM's may just be on its way; else Timeout decides.
func (p *Primary) svmOpened(s *Segment) {
	c := p.conns.byTuple[s.Tuple]
	if c != nil && (c.openOnSVM || c.syn.seen && c.syn.flags&ACK == 0 && !c.established) {
		return
	}
	if pvm, _ := p.opens.opened(&s.Tuple); pvm != nil {
		pvm.diverge(ReasonOpen, "")
	}
	if c == nil {
		if c = p.conns.create(&s.Tuple); c == nil {
			p.stats.Drops[ReasonStray]++
			return
		}
	}
	c.openOnSVM = true
	if c.open.in == nil {
		p.opens.link(c, true)
	}
	p.wait(c)
}
