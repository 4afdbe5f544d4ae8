// SPDX-License-Identifier: Apache-2.0

package sim

// event is something due.
type event struct {
	at    int64
	no    uint64 // of two at one time the one that was made first comes first
	do    func()
	alarm *alarm // nil: nobody changes it
}

func (e *event) before(o *event) bool { return e.at < o.at || e.at == o.at && e.no < o.no }

// alarm is at most one event, which can be set again: it is not due then when it was.
type alarm struct {
	do    func()
	set   bool
	place int // in the queue
}

// queue is a heap of events, the next one in front. It is written out, because container/heap
// allocates each event, and took a third of a run.
type queue []event

func (q *queue) push(e event) {
	*q = append(*q, e)
	q.up(len(*q) - 1)
}

// remove takes the event at place i out.
func (q *queue) remove(i int) event {
	old := *q
	e, last := old[i], len(old)-1
	if e.alarm != nil {
		e.alarm.set = false
	}
	moved := old[last]
	old[last] = event{}
	if *q = old[:last]; i < last {
		(*q)[i] = moved
		q.down(i)
		q.up(i)
	}
	return e
}

func (q queue) put(i int, e event) {
	q[i] = e
	if e.alarm != nil {
		e.alarm.set, e.alarm.place = true, i
	}
}

func (q queue) up(i int) {
	e := q[i]
	for i > 0 && e.before(&q[(i-1)/2]) {
		q.put(i, q[(i-1)/2])
		i = (i - 1) / 2
	}
	q.put(i, e)
}

func (q queue) down(i int) {
	e := q[i]
	for c := 2*i + 1; c < len(q); c = 2*i + 1 {
		if c+1 < len(q) && q[c+1].before(&q[c]) {
			c++
		}
		if !q[c].before(&e) {
			break
		}
		q.put(i, q[c])
		i = c
	}
	q.put(i, e)
}
