// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bytes"
	"encoding/binary"
)

// TCP option kinds.
const (
	optEnd    = 0
	optNOP    = 1
	optWScale = 3
	optSACK   = 5
	optTS     = 8
	optMD5    = 19
	optAO     = 29
)

const maxOpts = 40

// options is a TCP option list as in the header.
type options struct {
	n uint8
	b [maxOpts]byte
}

func (o *options) set(b []byte)  { o.n = uint8(copy(o.b[:], b)) }
func (o *options) bytes() []byte { return o.b[:o.n] }

// findOpt gives the first option of kind, its kind and length bytes included,
// or nil. A list that ends within an option ends before it.
func findOpt(b []byte, kind byte) []byte {
	for len(b) > 0 && b[0] != optEnd {
		if b[0] == optNOP {
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return nil
		}
		if b[0] == kind {
			return b[:b[1]]
		}
		b = b[b[1]:]
	}
	return nil
}

// usualTS reports whether the options begin with timestamps, laid out as guests do.
func usualTS(b []byte) bool {
	return len(b) >= 12 && b[0] == optNOP && b[1] == optNOP && b[2] == optTS && b[3] == 10
}

// tsOpt gives the timestamp option, or nil.
func tsOpt(b []byte) []byte {
	if usualTS(b) {
		return b[2:12]
	}
	if o := findOpt(b, optTS); len(o) == 10 {
		return o
	}
	return nil
}

// wscale gives the window scale that a SYN's options offer (RFC 7323: at most 14).
func wscale(b []byte) (scale uint8, ok bool) {
	if o := findOpt(b, optWScale); len(o) == 3 {
		return min(o[2], maxScale), true
	}
	return 0, false
}

// sealed reports whether a digest of TCP-MD5 (RFC 2385) or TCP-AO (RFC 5925) covers the
// segment's header.
func sealed(b []byte) bool { return findOpt(b, optMD5) != nil || findOpt(b, optAO) != nil }

// sameOptions reports whether two SYNs offer the same. Timestamp values are each
// guest's own clock.
func sameOptions(a, b []byte) bool {
	var x, y options
	x.set(a)
	y.set(b)
	for _, o := range []*options{&x, &y} {
		if ts := tsOpt(o.bytes()); ts != nil {
			clear(ts[2:])
		}
	}
	return bytes.Equal(x.bytes(), y.bytes())
}

func be32(b []byte) uint32       { return binary.BigEndian.Uint32(b) }
func putBE32(b []byte, v uint32) { binary.BigEndian.PutUint32(b, v) }

// block is a SACK block.
type block struct{ left, right uint32 }

// sackBlocks appends the SACK blocks in b to dst.
func sackBlocks(dst []block, b []byte) []block {
	o := findOpt(b, optSACK)
	if o == nil {
		return dst
	}
	for o = o[2:]; len(o) >= 8; o = o[8:] {
		dst = append(dst, block{be32(o), be32(o[4:])})
	}
	return dst
}

// sackSet is what one guest is known to hold above its ACK: disjoint ranges. It
// is bounded; what does not fit is not known, which is the safe side.
type sackSet struct {
	n int
	b [8]block
}

// add notes a block and forgets what ack covers.
func (s *sackSet) add(b block, ack uint32) {
	if !before(b.left, b.right) || !after(b.right, ack) {
		return
	}
	s.trim(ack)
	n := 0
	for _, o := range s.b[:s.n] {
		if before(o.right, b.left) || after(o.left, b.right) {
			s.b[n] = o
			n++
			continue
		}
		b = block{minSeq(o.left, b.left), maxSeq(o.right, b.right)}
	}
	if n == len(s.b) {
		n = copy(s.b[:], s.b[1:])
	}
	s.b[n] = b
	s.n = n + 1
}

// trim forgets what ack covers.
func (s *sackSet) trim(ack uint32) {
	n := 0
	for _, o := range s.b[:s.n] {
		if after(o.right, ack) {
			s.b[n] = o
			n++
		}
	}
	s.n = n
}

// above reports whether anything is held above ack.
func (s *sackSet) above(ack uint32) bool {
	for _, o := range s.b[:s.n] {
		if after(o.right, ack) {
			return true
		}
	}
	return false
}

// has reports whether b is held: below ack or in a block.
func (s *sackSet) has(b block, ack uint32) bool {
	if !after(b.right, ack) {
		return true
	}
	b.left = maxSeq(b.left, ack)
	for _, o := range s.b[:s.n] {
		if !before(b.left, o.left) && !after(b.right, o.right) {
			return true
		}
	}
	return false
}

// common gives the part of b that is held too. Where that is not all of b, what lies
// below ack is enough.
func (s *sackSet) common(b block, ack uint32) (block, bool) {
	if !s.has(b, ack) {
		b.right = minSeq(b.right, ack)
	}
	return b, before(b.left, b.right)
}

// keepSACK leaves of the blocks in o's SACK option what other has too; the room is
// filled with NOPs, so lengths stay.
func (o *options) keepSACK(other *sackSet, ack uint32) {
	opt := findOpt(o.bytes(), optSACK)
	if opt == nil {
		return
	}
	var blocks [4]block
	kept := opt[2:2]
	for _, b := range sackBlocks(blocks[:0], opt) {
		if b, ok := other.common(b, ack); ok {
			kept = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(kept, b.left), b.right)
		}
	}
	rest := opt[2+len(kept):]
	if opt[1] = byte(2 + len(kept)); len(kept) == 0 {
		rest = opt
	}
	for i := range rest {
		rest[i] = optNOP
	}
}

// ackOptions makes the options of a pure ACK: the template's, with blocks in the place of
// its SACK blocks, as many as fit.
func (o *options) ackOptions(template []byte, blocks []block) {
	if len(blocks) == 0 && findOpt(template, optSACK) == nil {
		o.set(template)
		return
	}
	b := o.b[:0]
	for from, rest := template, template; len(rest) > 0 && rest[0] != optEnd; {
		if rest[0] == optNOP {
			rest = rest[1:]
			continue
		}
		if len(rest) < 2 || rest[1] < 2 || int(rest[1]) > len(rest) {
			break
		}
		kind := rest[0]
		rest = rest[rest[1]:]
		if kind != optSACK {
			b = append(b, from[:len(from)-len(rest)]...) // with the NOPs in front
		}
		from = rest
	}
	for len(b)%4 != 0 {
		b = append(b, optNOP)
	}
	if n := min(len(blocks), (maxOpts-len(b)-4)/8); n > 0 {
		b = append(b, optNOP, optNOP, optSACK, byte(2+8*n))
		for _, k := range blocks[:n] {
			b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, k.left), k.right)
		}
	}
	o.n = uint8(len(b))
}
