// SPDX-License-Identifier: Apache-2.0

package compare

import "fmt"

// Where guests differ, in words for people. None of it is payload.

// bytesOf names the bytes from one position to another of what the guest has sent on c, counted from 0. Which of them
// differ the digests do not tell.
func bytesOf(c *conn, from, to uint32) string {
	if !c.syn.seen {
		return fmt.Sprintf("in the next %d bytes", to-from)
	}
	first := c.syn.isn + 1
	return fmt.Sprintf("in bytes %d to %d", from-first, to-first-1)
}

// finOf tells where each guest has closed.
func finOf(c *conn) string {
	at := func(x *extent) string {
		switch {
		case !x.fin.ok:
			return "goes on"
		case !c.syn.seen:
			return "closes"
		}
		return fmt.Sprintf("closes at byte %d", x.fin.pos-c.syn.isn-1)
	}
	return fmt.Sprintf("the primary %s, the secondary %s", at(&c.pvm), at(&c.svm.extent))
}

// missingOf tells which guest a connection waits for, and for what.
func missingOf(c *conn) string {
	who, other := "secondary", "primary"
	if c.held.len() == 0 {
		who, other = other, who
	}
	switch {
	case c.held.len() == 0 && !c.svm.ahead():
		return ""
	case c.syn.waiting:
		return fmt.Sprintf("the %s has not sent its SYN", who)
	case !c.syn.seen:
		return fmt.Sprintf("the %s has not sent what the %s has", who, other)
	}
	return fmt.Sprintf("the %s has not sent byte %d, which the %s has", who, c.svm.compared-c.syn.isn-1, other)
}

// optionNames are those of the kinds that SYNs have (IANA's registry of TCP options).
var optionNames = map[byte]string{2: "maximum segment size", 3: "window scale", 4: "SACK permitted", 8: "timestamps", 19: "MD5 signature", 29: "authentication", 30: "multipath TCP", 34: "fast open", 172: "accurate ECN", 174: "accurate ECN"}

// synOf names what differs between the PVM's SYN and the SVM's: the first option, or the number acknowledged.
func synOf(h *handshake, s *Segment) string {
	a, b := h.opts.bytes(), s.Opts
	for kind := 2; kind < 256; kind++ {
		x, y := findOpt(a, byte(kind)), findOpt(b, byte(kind))
		if kind == optTS && x != nil && y != nil || string(x) == string(y) {
			continue
		}
		name := fmt.Sprintf("TCP option %d", kind)
		if known := optionNames[byte(kind)]; known != "" {
			name += " (" + known + ")"
		}
		switch {
		case x == nil:
			return "only the secondary has " + name
		case y == nil:
			return "only the primary has " + name
		}
		return name
	}
	if h.flags&ACK != 0 && s.Ack != h.ack {
		return "what it acknowledges"
	}
	return "the order of TCP options"
}
