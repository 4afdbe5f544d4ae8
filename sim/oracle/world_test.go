// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"encoding/binary"
	"fmt"
)

// numbers are the sequence numbers and clocks of a connection's three ends. Those of the
// SVM are its own until a checkpoint makes it the PVM's copy.
type numbers struct {
	client, pvm, svm                uint32 // initial sequence numbers
	clockClient, clockPVM, clockSVM uint32 // of timestamps
}

func newNumbers() *numbers {
	return &numbers{client: 0x20000000, pvm: 0x10000000, svm: 0x50000000, clockClient: 0x100000, clockPVM: 0x300000, clockSVM: 0x700000}
}

func (n *numbers) isn(of who) uint32 {
	switch of {
	case pvm:
		return n.pvm
	case svm:
		return n.svm
	}
	return n.client
}

// isnOfOther is what a sender counts its ack from: the client knows the PVM only.
func (n *numbers) isnOfOther(from who) uint32 {
	if from == client {
		return n.pvm
	}
	return n.client
}

// isnOf is what the receiver of an ack counts it from.
func (n *numbers) isnOf(to who) uint32 { return n.isn(to) }

func (n *numbers) clock(of who) uint32 {
	switch of {
	case pvm:
		return n.clockPVM
	case svm:
		return n.clockSVM
	}
	return n.clockClient
}

func (n *numbers) clockOfOther(from who) uint32 {
	if from == client {
		return n.clockPVM
	}
	return n.clockClient
}

func (n *numbers) clockOf(to who) uint32 { return n.clock(to) }

// far is how far numbers may be from where they are counted from.
const far = 1 << 20

// seqText is a sequence number counted from an initial one, or by whose it is instead.
func (n *numbers) seqText(v, from uint32) string {
	return near(v, from, map[string]uint32{"PVM": n.pvm, "SVM": n.svm, "client": n.client})
}

func (n *numbers) clockText(v, from uint32) string {
	return near(v, from, map[string]uint32{"PVM": n.clockPVM, "SVM": n.clockSVM, "client": n.clockClient})
}

func near(v, from uint32, others map[string]uint32) string {
	if d := int32(v - from); d > -far && d < far {
		return fmt.Sprint(d)
	}
	for name, o := range others {
		if d := int32(v - o); d > -far && d < far {
			return fmt.Sprintf("%s's:%d", name, d)
		}
	}
	return fmt.Sprintf("%#x", v)
}

// world is what the guests and the client of a scenario know in one engine's run: when a
// checkpoint comes is the engine's affair.
type world struct {
	base  uint16 // the client's port of connection 0
	conns map[int]*numbers
}

func newWorld(base uint16) *world { return &world{base: base, conns: make(map[int]*numbers)} }

func (w *world) port(conn int) uint16 { return w.base + uint16(conn) }

func (w *world) of(conn int) *numbers {
	if w.conns[conn] == nil {
		w.conns[conn] = newNumbers()
	}
	return w.conns[conn]
}

// connOf finds a packet's connection by the client's port. b begins with the ports.
func (w *world) connOf(b []byte, to who) int {
	port := binary.BigEndian.Uint16(b[2:])
	if to == svm {
		port = binary.BigEndian.Uint16(b)
	}
	return int(port - w.base)
}

func (w *world) connText(b []byte, to who) string {
	if c := w.connOf(b, to); c != 1 {
		return fmt.Sprintf(" conn=%d", c)
	}
	return ""
}

// checkpointed makes the SVM the PVM's copy.
func (w *world) checkpointed() {
	for _, n := range w.conns {
		n.svm, n.clockSVM = n.pvm, n.clockPVM
	}
}

// reuse has the next connection between the same addresses and ports.
func (w *world) reuse(conn int, lower bool) {
	n := w.of(conn)
	n.client += 0x1000000
	n.svm += 0x3000000
	if lower {
		n.pvm -= 0x2000000
	} else {
		n.pvm += 0x2000000
	}
}
