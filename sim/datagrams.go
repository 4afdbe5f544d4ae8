// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"maps"
	"net/netip"

	"github.com/lockstep-ft/lockstep/control/datapath"
)

// Exchange is a client that asks by datagrams, one question after the other's answer.
type Exchange struct {
	At    int64
	Kind  byte // 'U': UDP, and the question comes back; 'C': UDP, and the guest counts; 'I': ICMP echo
	Times int  // questions
	Pause int64
	Size  int // bytes of a question
}

const (
	datagramPort  = 53
	firstExchange = 30000 // the client's port, or its ICMP identifier
	askAgain      = 400 * ms
)

// announceTo is where a guest announces itself.
var announceTo = netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 0, 0, 7}), 7000)

// datagramCounts says how often datagrams were seen, by what is in them from the addresses on:
// the IP ID is each guest's own.
type datagramCounts map[uint64]int

var datagramSeed = maphash.MakeSeed()

// datagram identifies what is not TCP and comes from, or goes to, a guest.
func datagram(frame []byte) (id uint64, ok bool) {
	if len(frame) < 42 || frame[12] != 8 || frame[13] != 0 || frame[23] == 6 {
		return 0, false
	}
	return maphash.Bytes(datagramSeed, frame[26:]), true
}

// messages is what a guest knows of datagrams.
type messages struct {
	counts     map[uint16]int // questions that are counted, by the client's port
	heard      datagramCounts // what came
	sent       datagramCounts
	announceAt int64 // on the guest's clock
	announced  int
}

func newMessages() messages {
	return messages{counts: map[uint16]int{}, heard: datagramCounts{}, sent: datagramCounts{}}
}

func (t messages) clone() messages {
	t.counts, t.heard, t.sent = maps.Clone(t.counts), maps.Clone(t.heard), maps.Clone(t.sent)
	return t
}

// answerDatagrams answers what came, and announces the guest.
func (g *guest) answerDatagrams(now int64) {
	for {
		b, from, ok := g.stack.ReceiveUDP(datagramPort)
		if !ok {
			break
		}
		// KIND NUMBER TRY and more
		word := bytes.SplitN(b, []byte(" "), 4)
		answer := fmt.Appendf(nil, "%s %s ", word[0], word[1])
		if b[0] == 'C' {
			g.messages.counts[from.Port()]++
			answer = fmt.Appendf(answer, "%d", g.messages.counts[from.Port()])
		} else {
			answer = append(answer, word[3]...)
		}
		g.stack.SendUDP(now, datagramPort, from, answer)
	}
	for g.announces > 0 && g.messages.announceAt <= now {
		g.messages.announceAt += g.announces
		g.messages.announced++
		g.stack.SendUDP(now, announceTo.Port(), announceTo, fmt.Appendf(nil, "here I am, for the %d. time", g.messages.announced))
	}
}

// hears looks at a frame that the guest receives: no datagram twice (R16), but over a peer link
// that repeats frames or has them overtake P's MARK.
func (q *qemu) hears(frame []byte) {
	id, ok := datagram(frame)
	if !ok {
		return
	}
	heard := q.guest.messages.heard
	if heard[id]++; heard[id] > 1 && q.w.sc.PeerDup == 0 && q.w.sc.PeerReorder == 0 {
		q.w.failf("datagram twice", "%v: the guest has received %x before", q, frame[34:min(len(frame), 60)])
	}
}

// leftDatagram looks at a datagram that leaves a host.
func (w *world) leftDatagram(h *host, frame []byte) {
	id, ok := datagram(frame)
	if !ok {
		return
	}
	w.check.datagrams[id]++
	w.reach("datagram left")
	if w.logging {
		w.logf("%s: leaves a datagram, %q", h.name, frame[34:min(len(frame), 60)])
	}
	if h.id != w.check.speaker {
		w.failf("two speakers", "%s transmits a datagram, and %s may", h.name, w.hosts[w.check.speaker].name)
		return
	}
	if !w.compares(h) {
		return
	}
	svm := h.qemu.follower
	if svm == nil || svm.guest == nil {
		w.failf("release", "%s releases a datagram, and nobody follows", h.name)
		return
	}
	w.reach("datagram compared")
	if left, sent := w.check.datagrams[id], svm.guest.messages.sent[id]; left > sent {
		w.failf("release", "%s releases the datagram %q for the %d. time, and the SVM has sent it %d times", h.name, frame[42:min(len(frame), 80)], left, sent)
	}
}

// compares reports whether what leaves h has to be what its secondary has sent too.
func (w *world) compares(h *host) bool {
	return h.pinned().Mode == datapath.ModeHold && !w.check.alone && h.qemu != nil
}

// rebaseDatagrams: a guest transmits alone from now on. What it has not sent is not asked of a
// later secondary, which becomes its copy.
func rebaseDatagrams(w *world, g *guest) {
	for id, left := range w.check.datagrams {
		w.check.datagrams[id] = min(left, g.messages.sent[id])
	}
}

// questioner is an exchange under way.
type questioner struct {
	plan  *Exchange
	port  uint16
	no    int // of the question
	tries int
	at    int64 // when it is asked, or asked again
	asked int64 // when it was for the first time
	count int   // the guest's newest
	begun bool
	ended bool
}

func (c *client) question(i int) {
	q := &questioner{plan: &c.w.sc.Exchanges[i], port: uint16(firstExchange + i)}
	c.questioners = append(c.questioners, q)
	c.w.after(q.plan.At, func() {
		q.begun, q.at = true, c.w.now
		c.goOn()
	})
}

// ask goes on with an exchange.
func (c *client) ask(q *questioner) {
	w := c.w
	c.hear(q)
	if !q.begun || q.ended || w.now < q.at {
		return
	}
	if q.tries == 0 {
		q.asked = w.now
	}
	q.tries++
	q.at = w.now + askAgain
	text := fmt.Appendf(nil, "%c %d %d ", q.plan.Kind, q.no, q.tries)
	text = append(text, pattern(q.plan.Size)...)
	if q.plan.Kind == 'I' {
		c.stack.Ping(w.now, guestAddr, q.port, uint16(q.no), text)
	} else {
		c.stack.SendUDP(w.now, q.port, netip.AddrPortFrom(guestAddr, datagramPort), text)
	}
}

// hear takes answers.
func (c *client) hear(q *questioner) {
	w := c.w
	for {
		var b []byte
		var ok bool
		if q.plan.Kind == 'I' {
			_, b, ok = c.stack.ReceivePong(q.port)
		} else {
			b, _, ok = c.stack.ReceiveUDP(q.port)
		}
		if !ok {
			return
		}
		var kind byte
		var no, number int
		n, _ := fmt.Sscanf(string(b), "%c %d %d", &kind, &no, &number)
		if n < 2 || kind != q.plan.Kind || no > q.no {
			w.failf("datagram", "exchange %d: answer %q to question %d", q.port, b, q.no)
			return
		}
		if q.ended || no < q.no || q.tries == 0 {
			continue // a late one
		}
		if kind == 'C' {
			if n < 3 || number <= q.count {
				w.failf("datagram", "exchange %d: the guest has counted %d before question %d, and says %q now", q.port, q.count, q.no, b)
			}
			q.count = number
		} else if !bytes.HasSuffix(b, pattern(q.plan.Size)) {
			w.failf("datagram", "exchange %d: other bytes in the answer to question %d", q.port, q.no)
		}
		w.check.waited += w.now - q.asked
		w.check.answers++
		q.no, q.tries, q.at = q.no+1, 0, w.now+q.plan.Pause
		q.ended = q.no == q.plan.Times
	}
}

// nextQuestion is when a client asks again.
func (c *client) nextQuestion(next int64) int64 {
	for _, q := range c.questioners {
		if q.begun && !q.ended {
			next = min(next, q.at)
		}
	}
	return next
}
