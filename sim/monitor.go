// SPDX-License-Identifier: Apache-2.0

package sim

import "errors"

// monitor is a daemon's connection to a QEMU's monitor.
type monitor struct {
	d          *daemon
	q          *qemu
	open       bool
	last       int64 // when the newest event or answer is delivered
	patience   int   // so many commands in a row that are not answered in time close it
	unanswered int   // so far
	hangs      bool  // they have
}

var errLate = errors.New("QEMU did not answer in time")

// maxUnanswered and the deadlines are control's.
const (
	qmpTimeout    = 2 * s
	qmpPoll       = 1 * s
	maxUnanswered = 2
)

// deliver hands something of QEMU's to the daemon, in order.
func (m *monitor) deliver(f func(*monitor)) {
	w := m.d.w
	m.last = max(m.last+1, w.now+w.between(rndQEMU+m.q.h.id, 30*us, 400*us))
	m.d.post(m.last-w.now, func() {
		if m.open {
			f(m)
		}
	})
}

// close is the connection's end, which the daemon notices.
func (m *monitor) close() {
	if !m.open {
		return
	}
	d := m.d
	if d.h.monitor == m {
		d.h.monitor = nil
	}
	d.post(d.w.between(rndQEMU+m.q.h.id, 30*us, 400*us), func() {
		if m.open {
			m.open = false
			if m.hangs && m.q.isFrozen() { // else its host stood still: nothing is known
				d.qmp.unanswered = maxUnanswered
				d.qmp.judge()
			}
			d.qmp.down()
		}
	})
}

// run has QEMU carry out a procedure, and calls done with what came of it. Without an answer
// within the time the connection is given up, or, as far as there is patience, the answer alone: QEMU carries it out
// all the same. within 0: the procedure has bounds of its own.
func (m *monitor) run(within int64, procedure func(q *qemu, answer func(error)), done func(error)) {
	w, answered := m.d.w, false
	end := func(err error) {
		if !answered {
			answered = true
			done(err)
		}
	}
	var try func()
	try = func() {
		switch {
		case answered && m.patience <= 1 || !m.open:
			m.d.post(0, func() { end(errQMP) })
		case !m.q.alive: // close reports it
			w.after(5*ms, try)
		case !m.q.works():
			w.after(2*ms, try) // it is in the socket
		default:
			procedure(m.q, func(err error) {
				m.deliver(func(*monitor) {
					if !answered {
						m.unanswered = 0
					}
					end(err)
				})
			})
		}
	}
	w.after(w.between(rndQEMU+m.q.h.id, 30*us, 300*us), try)
	if within > 0 {
		m.d.post(within, func() {
			if !answered && m.open {
				w.reach("qmp timeout")
				if m.unanswered++; m.unanswered >= m.patience {
					m.hangs = m.patience > 1
					m.close()
				}
				end(errLate)
			}
		})
	}
	m.watch(&answered, end)
}

// watch ends a procedure with the connection.
func (m *monitor) watch(answered *bool, end func(error)) {
	m.d.post(100*ms, func() {
		switch {
		case *answered:
		case !m.open:
			end(errQMP)
		default:
			m.watch(answered, end)
		}
	})
}
