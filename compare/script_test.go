// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

func (x *transcript) effect(e *Effect) string {
	var b strings.Builder
	slot := ""
	if e.Slot != NoSlot {
		slot = fmt.Sprintf(" #%d", e.Slot)
		if !x.slots[e.Slot] {
			slot += " (NOT HELD)"
		}
		if e.Free || e.Op == OpFree {
			delete(x.slots, e.Slot)
		}
	}
	switch e.Op {
	case OpSend:
		fmt.Fprintf(&b, "send%s %s %d", slot, flagNames(e.Flags), e.Seq)
		if e.To > e.From {
			fmt.Fprintf(&b, "..%d", e.Seq+e.To-e.From)
		}
		if e.Flags&ACK != 0 {
			fmt.Fprintf(&b, " ack=%d", e.Ack)
		}
		fmt.Fprintf(&b, " win=%d", e.Win)
		opts := e.Opts[:e.OptLen]
		if ts := tsOpt(opts); ts != nil {
			fmt.Fprintf(&b, " ts=%d", be32(ts[2:]))
			if echo := be32(ts[6:]); echo != 0 {
				fmt.Fprintf(&b, "/%d", echo)
			}
		}
		for _, k := range sackBlocks(nil, opts) {
			fmt.Fprintf(&b, " sack=%d-%d", k.left, k.right)
		}
		if e.Slot != NoSlot && !e.Free {
			b.WriteString(" keep")
		}
	case OpFree:
		fmt.Fprintf(&b, "free%s: %v", slot, e.Reason)
	case OpAsk:
		fmt.Fprintf(&b, "ask %d..%d", e.Seq, e.Seq+e.To)
		if e.Inherited {
			b.WriteString(" inherited")
		}
	case OpAnnounce:
		fmt.Fprintf(&b, "announce %s %d ack=%d", flagNames(e.Flags), e.Seq, e.Ack)
	case OpCheckpoint:
		fmt.Fprintf(&b, "checkpoint: %v", e.Reason)
		if e.Where != "" {
			fmt.Fprintf(&b, " (%s)", e.Where)
		}
	case OpAnswer:
		fmt.Fprintf(&b, "answer %d..%d", e.Seq, e.Seq+e.To)
		if e.Sum != x.keys.Sum(e.Seq, x.payload(e.Seq, e.To, nil)) {
			b.WriteString(" (other bytes)")
		}
	case OpDeliver:
		fmt.Fprintf(&b, "deliver%s", slot)
	case OpNeigh:
		fmt.Fprintf(&b, "who has %v, for %v at %x", netip.AddrFrom16(e.Tuple.Remote).Unmap(), netip.AddrFrom16(e.Tuple.Guest).Unmap(), e.Opts[:e.OptLen])
	case OpRemirror, OpSACK, OpProbeSVM, OpProbePVM:
		b.WriteString(map[Op]string{OpRemirror: "remirror", OpSACK: "sack", OpProbeSVM: "probe svm", OpProbePVM: "probe pvm"}[e.Op])
		for _, k := range sackBlocks(nil, e.Opts[:e.OptLen]) {
			fmt.Fprintf(&b, " %d<%d-%d", e.Seq, k.left, k.right)
		}
	case OpAdopt:
		b.WriteString("adopt")
	case OpQuery:
		b.WriteString("query")
	case OpReplay:
		fmt.Fprintf(&b, "replay%s", slot)
	case OpForward:
		fmt.Fprintf(&b, "forward%s", slot)
	}
	return b.String()
}

func flagNames(f Flags) string {
	var b []byte
	for i := range flagLetters {
		if f&(1<<i) != 0 {
			b = append(b, flagLetters[i])
		}
	}
	return string(b)
}

// payload is what both guests transmit at these positions, but at those of x.
func (x *transcript) payload(from, n uint32, differ []uint32) []byte {
	b := make([]byte, n)
	for i := range b {
		pos := from + uint32(i)
		b[i] = byte(pos*2654435761>>13) | 1
		if slices.Contains(differ, pos) {
			b[i] = 0
		}
	}
	return b
}

func (x *transcript) parse(line string) Event {
	f := strings.Fields(line)
	kinds := map[string]EventKind{
		"pvm": EvPVM, "svm": EvSVM, "answer": EvAnswer, "client": EvClient, "freeze": EvFreeze, "thaw": EvThaw,
		"commit": EvCommit, "solo": EvSolo, "tick": EvTick, "copy": EvCopy, "ask": EvAsk, "park": EvPark,
		"adopt": EvAdopt, "unpark": EvUnpark, "unsure": EvUnsure, "reset": EvReset, "mark": EvMark, "neigh": EvNeigh, "takeover": EvTakeOver, "remote": EvRemote,
	}
	ev := Event{Kind: kinds[f[0]], Epoch: x.p.epoch, At: x.now}
	if ev.Kind == 0 {
		x.t.Fatalf("unknown event: %s", line)
	}
	s := &ev.Seg
	s.Slot, s.Win, s.At, s.Epoch, s.Inc = NoSlot, 1000, x.now, x.p.epoch, 1000
	s.Tuple = Tuple{GuestPort: 80, RemotePort: 5000, Proto: 6}
	s.Guest[15], s.Guest[10], s.Guest[11] = 1, 0xff, 0xff
	s.Remote[15], s.Remote[10], s.Remote[11] = 2, 0xff, 0xff
	var differ []uint32
	var stride, id uint32
	x.noSlot = false
	datagram := func(proto uint8, guest, remote uint16) {
		s.Datagram, s.Proto, s.GuestPort, s.RemotePort = true, proto, guest, remote
	}
	for _, a := range f[1:] {
		key, val, _ := strings.Cut(a, "=")
		switch key {
		case "ack":
			s.Ack = x.number(val)
		case "win":
			s.Win = uint16(x.number(val))
		case "gso":
			s.GSO = uint16(x.number(val))
		case "bounds":
			stride = x.number(val)
		case "inc":
			s.Inc = x.number(val)
		case "inherited":
			s.Inherited, s.Inc = true, 0
		case "epoch":
			s.Epoch = x.number(val)
			ev.Epoch = s.Epoch
		case "noslot":
			x.noSlot = true
		case "large":
			s.Large = true
		case "una":
			s.ClientAck = x.number(val)
		case "udp":
			datagram(17, 53, 5000)
		case "icmp":
			datagram(protoICMP, uint16(x.number(val)), 0)
		case "icmp6":
			datagram(protoICMPv6, uint16(x.number(val)), 0)
		case "mac":
			s.Opts = []byte{2, 0, 0, 0, 0, byte(x.number(val))}
		case "remote":
			s.Remote[15] = byte(x.number(val))
		case "vlan2":
			s.VLAN2 = uint16(x.number(val))
		case "id":
			id = x.number(val)
		case "frag":
			s.Frag = uint16(x.number(val))
		case "port":
			s.GuestPort = uint16(x.number(val))
		case "rport":
			s.RemotePort = uint16(x.number(val))
		case "ago":
			s.At -= int64(x.duration(val))
			ev.At = s.At
		case "x":
			for v := range strings.SplitSeq(val, ",") {
				differ = append(differ, x.number(v))
			}
		case "mss":
			s.Opts = binary.BigEndian.AppendUint16(append(s.Opts, 2, 4), uint16(x.number(val)))
		case "ws":
			s.Opts = append(s.Opts, 3, 3, byte(x.number(val)), optNOP)
		case "ts":
			val, echo, _ := strings.Cut(val, "/")
			s.Opts = binary.BigEndian.AppendUint32(append(s.Opts, optNOP, optNOP, optTS, 10), x.number(val))
			s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(cmp.Or(echo, "0")))
		case "sack":
			blocks := strings.Split(val, ",")
			s.Opts = append(s.Opts, optNOP, optNOP, optSACK, byte(2+8*len(blocks)))
			for _, b := range blocks {
				l, r, _ := strings.Cut(b, "-")
				s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(l))
				s.Opts = binary.BigEndian.AppendUint32(s.Opts, x.number(r))
			}
		default:
			if i := strings.IndexFunc(a, func(r rune) bool { return !strings.ContainsRune(flagLetters, r) }); i < 0 {
				for _, r := range a {
					s.Flags |= 1 << strings.IndexRune(flagLetters, r)
				}
				continue
			}
			from, to, ok := strings.Cut(a, "..")
			s.Seq = x.number(from)
			if ok {
				s.Len = x.number(to) - s.Seq
			}
		}
	}
	start := s.PayloadStart()
	b := x.payload(start+id<<16, s.Len, differ)
	s.Sum = x.keys.Sum(start, b)
	switch ev.Kind {
	case EvPVM, EvCopy:
		s.Payload, s.Header = b, []byte("ethernet and ip header")
	case EvSVM:
		for at := stride; stride > 0 && at < s.Len; at += stride {
			s.Bounds = append(s.Bounds, Bound{start + at, x.keys.Sum(start, b[:at])})
		}
	}
	return ev
}

func (x *transcript) number(s string) uint32 {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		x.t.Fatal(err)
	}
	return uint32(n)
}

func (x *transcript) duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		x.t.Fatal(err)
	}
	return d
}
