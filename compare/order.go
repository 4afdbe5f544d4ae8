// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"math"
	"time"
)

// Guests that take one lock in another order stand still, each with an answer that the other one does not give, on two
// connections: neither answer leaves, so no client goes on and lets the lock go. Nothing but a checkpoint ends that, and
// to wait for all of R7's timeout would be most of such clients' time.

// lead is which guest alone has transmitted what comes next on a connection.
type lead uint8

const (
	leadNone lead = iota // neither, or both something
	leadPVM
	leadSVM
	leads
)

func leadOf(c *conn) lead {
	held, ahead := c.held.len() > 0, c.svm.ahead()
	switch {
	case !c.established || c.diverged || held == ahead:
		return leadNone
	case c.cliFIN.ok || c.clientRST || c.pvm.fin.ok || c.svm.extent.fin.ok: // it ends, each guest in its own way
		return leadNone
	case held:
		return leadPVM
	}
	return leadSVM
}

// delays are how long one guest is usually behind the other at a service, in ns, estimated as TCP does round trips
// (RFC 6298).
type delays struct {
	mean, deviation int64
	timeout         int64 // R7's
}

// add takes one in. One that was unusual counts as the longest that was not: the guests' order may have been its reason.
func (d *delays) add(took int64) {
	took = max(min(took, d.unusual()), 1)
	if d.mean == 0 {
		d.mean, d.deviation = took, took/2
		return
	}
	d.deviation += (max(took-d.mean, d.mean-took) - d.deviation) / 4
	d.mean += (took - d.mean) / 8
}

// soonest is the part of R7's timeout that is never unusual.
const soonest = 5

// unusual is longer than they are. Where nothing is known yet it is the timeout. Too early costs a checkpoint, and too
// late the clients' time, so it is less than what TCP waits before it sends again.
func (d *delays) unusual() int64 {
	if d.mean == 0 {
		return d.timeout
	}
	return min(max(d.mean+2*d.deviation, d.timeout/soonest), d.timeout)
}

// delaysOf are those of a service.
func (k *core) delaysOf(port uint16) *delays {
	d := k.delays[port]
	if d == nil {
		d = &delays{timeout: int64(k.cfg.Timeout)}
		k.delays[port] = d
	}
	return d
}

// stallClock is R7's: it runs while one guest has transmitted what the other has not.
type stallClock struct {
	running bool
	since   int64 // boottime, in ns, at which anything moved last
	looked  bool  // since then, after an unusual time

	led   lead        // which guest leads and has led for an unusual time
	all   *[leads]int // of how many connections
	usual *delays     // of the service
}

// run has the clock run, or not. Where it did not it begins now.
func (k *stallClock) run(running bool, who lead, now int64) {
	switch {
	case !running:
		k.stop()
	case !k.running:
		k.running = true
		k.begin(now)
	case who != k.led:
		k.setLed(leadNone)
	}
}

// begin has it begin anew.
func (k *stallClock) begin(now int64) {
	k.since, k.looked = now, false
	k.setLed(leadNone)
}

// moved has it begin anew, since the guest that was behind has caught up by something.
func (k *stallClock) moved(now int64) {
	if k.running {
		k.usual.add(now - k.since)
	}
	k.begin(now)
}

func (k *stallClock) stop() {
	k.running = false
	k.setLed(leadNone)
}

func (k *stallClock) setLed(who lead) {
	if k.led != who {
		k.all[k.led]--
		k.led = who
		k.all[who]++
	}
}

// deadline is when the clock runs out.
func (k *stallClock) deadline(timeout time.Duration) int64 {
	if !k.running {
		return math.MaxInt64
	}
	return k.since + int64(timeout)
}

// lookAt is when it has run for an unusual time.
func (k *stallClock) lookAt() int64 {
	if !k.running || k.looked {
		return math.MaxInt64
	}
	return k.since + k.usual.unusual()
}

// look notes that it has, and reports whether on another connection the other guest has led for an unusual time, too. Of
// two such connections the later one finds that.
func (k *stallClock) look(who lead) (opposed bool) {
	k.looked = true
	k.setLed(who)
	return who == leadPVM && k.all[leadSVM] > 0 || who == leadSVM && k.all[leadPVM] > 0
}
