// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// scenario is one in an engine's run.
type scenario struct {
	engine
	*world
	wait    time.Duration
	showSVM bool
	sent    []byte // by the client in this step; nil: nothing
}

// do carries out a step and returns what came of it. It waits for want.
func (s *scenario) do(step string, want []string) (got []string, err error) {
	s.sent = nil
	silent, err := s.play(step, want)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	limit := 3 * time.Second
	if rewriting() {
		limit = 50 * time.Millisecond // longer than the engines' short timers; nobody knows what is to come
	}
	for deadline := time.Now().Add(limit); ; {
		if err := s.settle(); err != nil {
			return nil, fmt.Errorf("%s: %w", step, err)
		}
		got = append(got, s.texts()...)
		if silent != nil && slices.Equal(got, silent) {
			got = nil
		}
		if slices.Equal(got, want) && !rewriting() || time.Now().After(deadline) {
			return got, nil
		}
		time.Sleep(time.Millisecond)
	}
}

func rewriting() bool { return flag.Lookup("rewrite").Value.String() == "true" }

// play does what a step says. silent is what comes of it that is not worth a line.
func (s *scenario) play(step string, want []string) (silent []string, err error) {
	words := tokens.FindAllString(step, -1)
	switch words[0] {
	case "P", "S", "C":
		p, err := parsePacket(who(words[0][0]), words[1:])
		if err != nil {
			return nil, err
		}
		frame := p.frame(s.world)
		if p.from == client {
			s.sent = frame
		}
		return nil, s.send(p.from, frame)
	case "open":
		return s.open(words[1:])
	case "checkpoint":
		return nil, s.checkpoint()
	case "wait":
		if len(want) == 0 || rewriting() { // else it is waited for anyway
			time.Sleep(s.wait)
		}
		return nil, nil
	case "reuse":
		s.reuse(1, words[1] == "lower")
		return nil, nil
	case "isn":
		n := s.of(1)
		_, err := fmt.Sscanf(step, "isn pvm=%d svm=%d client=%d", &n.pvm, &n.svm, &n.client)
		return nil, err
	case "show":
		s.showSVM = true
		return nil, nil
	case "flood":
		return nil, s.flood(words[1])
	}
	return nil, fmt.Errorf("there is no step %q", words[0])
}

// open opens a connection with the same options in all SYNs.
func (s *scenario) open(opts []string) (silent []string, err error) {
	for i, x := range []struct {
		from who
		line string
	}{{client, "S ack=0"}, {pvm, "SA seq=0"}, {svm, "SA seq=0"}, {client, "A seq=1"}} {
		words := strings.Fields(x.line)
		for _, o := range opts {
			switch name, _, _ := strings.Cut(o, "="); {
			case name == "ts":
				o = "ts=" + []string{"1", "1/1", "1/1", "2/1"}[i]
			case i == 3 && slices.Contains([]string{"mss", "ws", "sackok"}, name):
				continue // a SYN's
			}
			words = append(words, o)
		}
		p, err := parsePacket(x.from, words)
		if err != nil {
			return nil, err
		}
		frame := p.frame(s.world)
		if err := errors.Join(s.send(x.from, frame), s.settle()); err != nil {
			return nil, err
		}
		if x.from == pvm {
			silent = []string{"out " + text(frame, client, s.world)}
		}
	}
	return silent, nil
}

// flood has the SVM send a datagram on each of count flows.
func (s *scenario) flood(count string) error {
	var n int
	if _, err := fmt.Sscan(count, &n); err != nil {
		return err
	}
	for i := range n {
		// UDP from port i to port 8.
		p := &packet{from: svm, kind: "ip", proto: unix.IPPROTO_UDP, ttl: defaultTTL, payload: []byte{byte(i >> 8), byte(i), 0, 8, 0, 9, 0, 0, 'f'}}
		if err := s.send(svm, p.frame(s.world)); err != nil {
			return err
		}
	}
	return nil
}

// sameBut reports whether the SVM's frame is what the client sent, but for what is translated in it.
func sameBut(frame, sent []byte) bool {
	if len(frame) != len(sent) || len(sent) < 34 {
		return false
	}
	transport := 34
	if frame[12] == 0x81 { // a VLAN tag
		transport += 4
	}
	if frame[transport-22] == 0x86 { // IPv6
		transport += 20
	} else {
		transport += int(frame[transport-20]&15*4) - 20
	}
	a, b := bytes.Clone(frame), bytes.Clone(sent)
	for _, f := range [][]byte{a, b} {
		if head := f[transport:]; len(head) >= 20 {
			clear(head[8:12])
			clear(head[16:18])
			clear(head[20:max(20, min(len(head), int(head[12]>>4*4)))])
		}
	}
	return bytes.Equal(a, b)
}

// texts are what has happened: between checkpoints what left, then what the SVM received.
func (s *scenario) texts() (all []string) {
	var toSVM []string
	for _, e := range s.take() {
		switch e.to {
		case client:
			all = append(all, "out "+text(e.frame, client, s.world))
		case svm:
			if s.showSVM && sameBut(e.frame, s.sent) {
				toSVM = append(toSVM, "svm "+text(e.frame, svm, s.world))
				s.sent = nil
			}
		default:
			all = append(append(all, toSVM...), "checkpoint")
			toSVM = nil
			s.checkpointed()
		}
	}
	all = append(all, toSVM...)
	// Two requests for the same reason may come to one checkpoint or to two.
	return slices.CompactFunc(all, func(a, b string) bool { return a == "checkpoint" && b == a })
}
