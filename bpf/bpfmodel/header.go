// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import (
	"encoding/binary"
	"iter"

	"github.com/lockstep-ft/lockstep/rewriter"
)

// Flags are TCP flags as in the header.
type Flags uint8

// TCP flags.
const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

const (
	tcpLen  = 20
	maxOpts = 40

	offSeq  = 4
	offAck  = 8
	offCsum = 16

	optEnd  = 0
	optNop  = 1
	optSACK = 5
	optTS   = 8
	optMD5  = 19
	optAO   = 29
	optMP   = 30 // MPTCP
	tsLen   = 10
)

// TCP is a view of a TCP header, options included.
type TCP []byte

// Getters of the header's fields, in host order.
func (h TCP) SrcPort() uint16  { return binary.BigEndian.Uint16(h[0:]) }
func (h TCP) DstPort() uint16  { return binary.BigEndian.Uint16(h[2:]) }
func (h TCP) Seq() uint32      { return binary.BigEndian.Uint32(h[offSeq:]) }
func (h TCP) Ack() uint32      { return binary.BigEndian.Uint32(h[offAck:]) }
func (h TCP) Len() int         { return int(h[12]>>4) * 4 }
func (h TCP) Flags() Flags     { return Flags(h[13]) }
func (h TCP) Win() uint16      { return binary.BigEndian.Uint16(h[14:]) }
func (h TCP) Checksum() uint16 { return binary.BigEndian.Uint16(h[16:]) }

// Options are the option bytes.
func (h TCP) Options() Options { return Options(h[tcpLen:]) }

// Add adds n to the 32-bit field at offset at. The checksum follows (R10):
// HC' = ~(~HC + ~m + m') of RFC 1624, unless it is partial: then it covers the
// pseudo header only. A field at an odd offset, as options may be, has its bytes in the
// other halves of the checksum's words.
func (h TCP) Add(at int, n uint32, partial bool) {
	if partial {
		binary.BigEndian.PutUint32(h[at:], binary.BigEndian.Uint32(h[at:])+n)
		return
	}
	add(h, at, offCsum, n)
}

// add adds n to the 32-bit field of b at offset at, for which the checksum at offset csum
// answers.
func add(b []byte, at, csum int, n uint32) {
	old := binary.BigEndian.Uint32(b[at:])
	binary.BigEndian.PutUint32(b[at:], old+n)
	if n == 0 {
		return
	}
	diff := fold(words(^old) + words(old+n))
	if (at^csum)&1 != 0 {
		diff = diff<<8&0xff00 | diff>>8
	}
	sum := ^binary.BigEndian.Uint16(b[csum:])
	binary.BigEndian.PutUint16(b[csum:], ^uint16(fold(uint32(sum)+diff)))
}

func words(v uint32) uint32 { return v>>16 + v&0xffff }

// fold brings a one's complement sum down to 16 bits.
func fold(sum uint32) uint32 {
	sum = sum>>16 + sum&0xffff
	return sum>>16 + sum&0xffff
}

// Options is a view of TCP options.
type Options []byte

// all yields where each option but the fillers begins and ends. The list ends
// where it is broken, as it does for receivers.
func (o Options) all() iter.Seq2[int, int] {
	return func(yield func(at, end int) bool) {
		for at := 0; at < len(o) && o[at] != optEnd; {
			if o[at] == optNop {
				at++
				continue
			}
			if at+1 >= len(o) {
				return
			}
			end := at + int(o[at+1])
			if end < at+2 || end > len(o) || !yield(at, end) {
				return
			}
			at = end
		}
	}
}

// timestamps yields where each timestamp option's TSval is; TSecr is behind it.
func (o Options) timestamps() iter.Seq[int] {
	return func(yield func(val int) bool) {
		for at, end := range o.all() {
			if o[at] == optTS && end-at == tsLen && !yield(at+2) {
				return
			}
		}
	}
}

// sealed reports whether a digest of TCP-MD5 or TCP-AO covers the segment: another
// timestamp would only make it wrong.
func (o Options) sealed() bool {
	for at := range o.all() {
		if o[at] == optMD5 || o[at] == optAO {
			return true
		}
	}
	return false
}

// StripMPTCP turns MPTCP's option in a SYN into fillers.
func (s *Segment) StripMPTCP() {
	h := s.TCP()
	if h.Flags()&SYN == 0 {
		return
	}
	o := h.Options()
	for at, end := range o.all() {
		if o[at] != optMP {
			continue
		}
		for i := at; i < end; i++ {
			old := o[i]
			o[i] = optNop
			if diff := fold(uint32(^uint16(old)) + optNop); !s.Partial {
				if i&1 == 0 { // the upper half of its word
					diff = diff<<8&0xff00 | diff>>8
				}
				binary.BigEndian.PutUint16(h[offCsum:], ^uint16(fold(uint32(^h.Checksum())+diff)))
			}
		}
	}
}

// tsVal returns TSval, false without timestamps.
func (o Options) tsVal() (val uint32, ok bool) {
	for at := range o.timestamps() {
		val, ok = binary.BigEndian.Uint32(o[at:]), true
	}
	return val, ok
}

// tsEcr returns TSecr, false without timestamps.
func (o Options) tsEcr() (ecr uint32, ok bool) {
	for at := range o.timestamps() {
		ecr, ok = binary.BigEndian.Uint32(o[at+4:]), true
	}
	return ecr, ok
}

// addTSVal adds n to TSval.
func (o Options) addTSVal(n uint32) {
	for at := range o.timestamps() {
		binary.BigEndian.PutUint32(o[at:], binary.BigEndian.Uint32(o[at:])+n)
	}
}

// toSVM turns the remote's numbers about the PVM into the SVM's (R10): ack, SACK
// blocks and TSecr, which mean nothing without the ACK flag. A TSecr of 0 means
// that there is none.
func (s *Segment) toSVM(off rewriter.Offset) {
	h := s.TCP()
	if h.Flags()&ACK == 0 {
		return
	}
	o := h.Options()
	if off.Seq == 0 && o.sealed() {
		return
	}
	h.Add(offAck, off.Seq, s.Partial)
	for at, end := range o.all() {
		if o[at] != optSACK {
			continue
		}
		for block := at + 2; block+8 <= end; block += 8 {
			h.Add(tcpLen+block, off.Seq, s.Partial)
			h.Add(tcpLen+block+4, off.Seq, s.Partial)
		}
	}
	for at := range o.timestamps() {
		if binary.BigEndian.Uint32(o[at+4:]) != 0 {
			h.Add(tcpLen+at+4, off.TS, s.Partial)
		}
	}
}

// toPVM turns what the SVM transmits into the PVM's numbers (R10): seq and TSval. Its
// ack, SACK blocks and TSecr are about the remote's numbers, which both guests share.
func (s *Segment) toPVM(off rewriter.Offset) {
	h := s.TCP()
	if off.Seq == 0 && h.Options().sealed() {
		return
	}
	h.Add(offSeq, -off.Seq, s.Partial)
	for at := range h.Options().timestamps() {
		h.Add(tcpLen+at, -off.TS, s.Partial)
	}
}
