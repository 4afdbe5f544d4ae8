// SPDX-License-Identifier: Apache-2.0

package rewriter

// State bits of Half and Conn, as enum ls_conn_bit has them.
type State uint32

const (
	HasPVM     State = 1 << iota // ISN of the PVM known
	HasSVM                       // ISN of the SVM known
	Active                       // the SVM's SYN had no ACK: opened by the guest
	GuestFIN                     // FIN seen from the guest
	RemoteFIN                    // FIN seen from the remote
	Reset                        // RST seen from either
	Timestamps                   // Conn: both use timestamps
	PVMActive                    // Half: the PVM's SYN had no ACK
	PVMTS                        // Half: the PVM's SYN has a timestamp
	SVMTS                        // Half: the SVM's SYN has a timestamp
	Done                         // Half: became a Conn once, does not do so again
)

// Half is a connection before its handshake is over: what was learned of both
// guests' SYNs. The PVM's part comes with announcements, the SVM's from what it
// says, in any order.
type Half struct {
	State            State
	ISNPVM, ISNSVM   uint32
	CliPVM, CliSVM   uint32 // the remote's ISN as the guests' SYN|ACKs name it
	TSPVM, TSSVM     uint32
	UsedPVM, UsedSVM uint32 // the pair made last; 0: none
	Win              uint16 // of the SVM's last SYN, with its flags and options
	Flags            Flags
	OptLen           uint8
	Opts             [maxOpts]byte
	Last             int64
}

// paired tells whether both parts belong to one connection (R9): they were
// paired before, or answer the same SYN of the remote, or are active opens of
// which neither was paired with another.
func (h *Half) paired() bool {
	switch {
	case h.State&(HasPVM|HasSVM) != HasPVM|HasSVM:
		return false
	case h.ISNPVM == h.UsedPVM && h.ISNSVM == h.UsedSVM:
		return true
	case h.State&(Active|PVMActive) == 0:
		return h.CliPVM == h.CliSVM
	case h.State&(Active|PVMActive) == Active|PVMActive:
		return h.ISNPVM != h.UsedPVM && h.ISNSVM != h.UsedSVM
	}
	return false
}

func (h *Half) offset() offset {
	off := offset{seq: h.ISNSVM - h.ISNPVM}
	if h.State&(PVMTS|SVMTS) == PVMTS|SVMTS {
		off.ts = h.TSSVM - h.TSPVM
	}
	return off
}

// pair notes that both parts belong together, if they do.
func (h *Half) pair() bool {
	if !h.paired() {
		return false
	}
	h.UsedPVM, h.UsedSVM = h.ISNPVM, h.ISNSVM
	return true
}

// halves is a bounded map that makes room by forgetting the entry least lately
// used, which costs nothing but a repeated announcement (R11).
type halves struct {
	index map[Tuple]int32
	nodes []node // nodes[0] is the list's anchor: next the newest, prev the oldest
	max   int
}

type node struct {
	prev, next int32
	key        Tuple
	Half
}

func (l *halves) reset(max int) {
	*l = halves{index: make(map[Tuple]int32), nodes: make([]node, 1), max: max}
}

func (l *halves) unlink(i int32) {
	n := &l.nodes[i]
	l.nodes[n.prev].next, l.nodes[n.next].prev = n.next, n.prev
}

func (l *halves) push(i int32) {
	n, head := &l.nodes[i], l.nodes[0].next
	n.prev, n.next = 0, head
	l.nodes[head].prev, l.nodes[0].next = i, i
}

// get returns the entry of key, nil without one.
func (l *halves) get(key Tuple) *Half {
	i, ok := l.index[key]
	if !ok {
		return nil
	}
	l.unlink(i)
	l.push(i)
	return &l.nodes[i].Half
}

// make returns the entry of key, an empty one without one.
func (l *halves) make(key Tuple) *Half {
	if h := l.get(key); h != nil {
		return h
	}
	var i int32
	if len(l.nodes) <= l.max {
		i = int32(len(l.nodes))
		l.nodes = append(l.nodes, node{})
	} else {
		i = l.nodes[0].prev
		l.unlink(i)
		delete(l.index, l.nodes[i].key)
	}
	l.nodes[i] = node{key: key}
	l.index[key] = i
	l.push(i)
	return &l.nodes[i].Half
}
