// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// who sends a packet.
type who byte

const (
	pvm    who = 'P'
	svm    who = 'S'
	client who = 'C' // towards the guests
)

// packet is one line of a script. Its numbers are those of its sender: seq counts from the
// sender's initial sequence number, ack from the other end's as the sender knows it.
type packet struct {
	from     who
	kind     string // "tcp", "udp", "icmp", "unreachable", "ip", "arp", "frame"
	conn     int    // which of the scenario's connections
	flags    byte
	seq, ack uint32
	win, urg uint16
	opts     []option
	payload  []byte

	v6            bool
	vlan, typ     uint16
	proto         byte
	id, frag      uint16 // frag: as in the header, with the bits beside the offset
	ttl, tos      byte
	padding       int
	wrongChecksum bool
}

// option is a TCP option by its name in scripts, with its numbers.
type option struct {
	name string
	n    []uint32
}

const defaultWin, defaultTTL = 5000, 64

// tcpFlags are the letters that scripts have for TCP flags, from the lowest bit on.
const tcpFlags = "FSRPAUEC"

const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
	flagURG
)

var tokens = regexp.MustCompile(`[a-z]*="[^"]*"|"[^"]*"|\S+`)

// parsePacket reads a line without its first word, such as `A seq=1 ack=1 "hello"` or
// `udp "hello" ttl=3`.
func parsePacket(from who, words []string) (*packet, error) {
	p := &packet{from: from, kind: "tcp", seq: 1, ack: 1, win: defaultWin, ttl: defaultTTL, conn: 1}
	if len(words) == 0 {
		return nil, fmt.Errorf("%c sends nothing: say what", from)
	}
	if strings.Trim(words[0], tcpFlags) == "" {
		for _, f := range words[0] {
			p.flags |= 1 << strings.IndexRune(tcpFlags, f)
		}
	} else {
		p.kind = words[0]
	}
	if !slices.Contains([]string{"tcp", "udp", "icmp", "unreachable", "ip", "arp", "frame"}, p.kind) {
		return nil, fmt.Errorf("%q is neither TCP flags nor a kind of packet", p.kind)
	}
	if p.flags&flagSYN != 0 {
		p.seq = 0
	}
	for _, w := range words[1:] {
		if err := p.set(w); err != nil {
			return nil, fmt.Errorf("%s: %w", w, err)
		}
	}
	return p, nil
}

func (p *packet) set(word string) error {
	if strings.HasPrefix(word, `"`) {
		p.payload = []byte(strings.Trim(word, `"`))
		return nil
	}
	key, value, _ := strings.Cut(word, "=")
	var nums []uint32
	for _, f := range strings.FieldsFunc(value, func(r rune) bool { return strings.ContainsRune("/-,", r) }) {
		n, err := strconv.ParseUint(f, 0, 32)
		if err != nil {
			return err
		}
		nums = append(nums, uint32(n))
	}
	n := uint32(0)
	if len(nums) > 0 {
		n = nums[0]
	}
	switch key {
	case "seq":
		p.seq = n
	case "ack":
		p.ack = n
	case "win":
		p.win = uint16(n)
	case "urg":
		p.urg = uint16(n)
	case "conn":
		p.conn = int(n)
	case "bytes": // of a stream whose every byte follows from its position
		p.payload = streamAt(p.seq, int(n))
	case "flip": // counted from 1
		p.payload[n-1] ^= 1
	case "id":
		p.id = uint16(n)
	case "ttl":
		p.ttl = byte(n)
	case "tos":
		p.tos = byte(n)
	case "df":
		p.frag |= 0x4000
	case "more":
		p.frag |= 0x2000
	case "offset":
		p.frag |= uint16(n / 8)
	case "vlan":
		p.vlan = uint16(n)
	case "ip6":
		p.v6 = true
	case "proto":
		p.proto = byte(n)
	case "type":
		p.typ = uint16(n)
	case "padding":
		p.padding = int(n)
	case "wrongchecksum":
		p.wrongChecksum = true
	case "mss", "ws", "sackok", "ts", "sack":
		p.opts = append(p.opts, option{key, nums})
	default:
		return fmt.Errorf("there is no field %q", key)
	}
	return nil
}

// streamAt is a part of the stream of "bytes=".
func streamAt(pos uint32, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		at := pos + uint32(i)
		b[i] = byte('a' + (at+at/26)%26)
	}
	return b
}

var (
	guestMAC, clientMAC = []byte{2, 0, 0, 0, 0x77, 2}, []byte{2, 0, 0, 0, 0x77, 1}
	guest4, client4     = []byte{10, 77, 0, 2}, []byte{10, 77, 0, 1}
	guest6              = append([]byte{0xfd, 0x77}, append(make([]byte, 13), 2)...)
	client6             = append([]byte{0xfd, 0x77}, append(make([]byte, 13), 1)...)
)

const guestPort = 80

// frame is the packet as its sender transmits it.
func (p *packet) frame(w *world) []byte {
	src, dst, from, to := guest4, client4, guestMAC, clientMAC
	sport, dport := uint16(guestPort), w.port(p.conn)
	if p.v6 {
		src, dst = guest6, client6
	}
	if p.from == client {
		src, dst, from, to, sport, dport = dst, src, to, from, dport, sport
	}
	f := append(bytes.Clone(to), from...)
	if p.vlan != 0 {
		f = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(f, unix.ETH_P_8021Q), p.vlan)
	}
	var typ, proto = uint16(unix.ETH_P_IP), byte(0)
	var body []byte
	switch p.kind {
	case "tcp":
		proto, body = unix.IPPROTO_TCP, p.tcp(w, sport, dport)
		p.checksum(body[16:], src, dst, proto, body)
	case "udp":
		proto = unix.IPPROTO_UDP
		if body = p.payload; p.frag&0x1fff == 0 {
			body = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, sport), dport)
			body = binary.BigEndian.AppendUint16(body, uint16(8+len(p.payload)))
			body = append(append(body, 0, 0), p.payload...)
			p.checksum(body[6:], src, dst, proto, body)
		}
	case "icmp", "unreachable":
		proto, body = unix.IPPROTO_ICMP, append([]byte{0, 0, 0, 0, 0, 1, 0, 1}, p.payload...) // an echo's reply
		if p.kind == "unreachable" {
			body[0], body[1] = 3, 3
			// It quotes what the client sent: addresses, ports, a sequence number.
			quoted := (&packet{from: client, kind: "udp", conn: p.conn, ttl: defaultTTL, payload: []byte("?")}).frame(w)
			body = append(body[:8], quoted[14:]...)
		}
		binary.BigEndian.PutUint16(body[2:], ^onesSum(body))
	case "ip":
		proto, body = p.proto, p.payload
	case "arp":
		typ, body = unix.ETH_P_ARP, append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, from...)
		body = append(append(append(body, src...), to...), dst...)
	case "frame":
		typ, body = p.typ, p.payload
	}
	if proto != 0 {
		if p.v6 {
			typ = unix.ETH_P_IPV6
		}
		body = p.ip(src, dst, proto, body)
	}
	f = append(binary.BigEndian.AppendUint16(f, typ), body...)
	return append(f, make([]byte, p.padding)...)
}

// ip puts an IP header in front of body.
func (p *packet) ip(src, dst []byte, proto byte, body []byte) []byte {
	if p.v6 {
		h := []byte{0x60, 0, 0, 0, byte(len(body) >> 8), byte(len(body)), proto, p.ttl}
		return append(append(append(h, src...), dst...), body...)
	}
	h := []byte{0x45, p.tos}
	for _, v := range []uint16{uint16(20 + len(body)), p.id, p.frag} {
		h = binary.BigEndian.AppendUint16(h, v)
	}
	h = append(append(append(h, p.ttl, proto, 0, 0), src...), dst...)
	binary.BigEndian.PutUint16(h[10:], ^onesSum(h))
	return append(h, body...)
}

func (p *packet) tcp(w *world, sport, dport uint16) []byte {
	n := w.of(p.conn)
	seq, ack := n.isn(p.from)+p.seq, n.isnOfOther(p.from)+p.ack
	if p.flags&flagACK == 0 {
		ack = 0
	}
	h := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, sport), dport)
	h = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(h, seq), ack)
	h = append(h, 0, p.flags)
	for _, v := range []uint16{p.win, 0, p.urg} {
		h = binary.BigEndian.AppendUint16(h, v)
	}
	for _, o := range p.opts {
		h = append(h, o.bytes(p.from, n)...)
	}
	for len(h)%4 != 0 {
		h = append(h, 1)
	}
	h[12] = byte(len(h) / 4 << 4)
	return append(h, p.payload...)
}

func (o option) bytes(from who, n *numbers) (b []byte) {
	be := binary.BigEndian
	switch o.name {
	case "mss":
		return be.AppendUint16([]byte{2, 4}, uint16(o.n[0]))
	case "ws":
		return []byte{3, 3, byte(o.n[0])}
	case "sackok":
		return []byte{4, 2}
	case "sack":
		b = []byte{5, byte(2 + 4*len(o.n))}
		for _, v := range o.n {
			b = be.AppendUint32(b, n.isnOfOther(from)+v)
		}
		return b
	case "ts":
		echo := uint32(0)
		if len(o.n) > 1 {
			echo = n.clockOfOther(from) + o.n[1]
		}
		return be.AppendUint32(be.AppendUint32([]byte{8, 10}, n.clock(from)+o.n[0]), echo)
	}
	return nil
}

// checksum fills in a transport checksum.
func (p *packet) checksum(at, src, dst []byte, proto byte, body []byte) {
	pseudo := binary.BigEndian.AppendUint16(append(append(bytes.Clone(src), dst...), 0, proto), uint16(len(body)))
	sum := ^onesSum(append(pseudo, body...))
	if p.wrongChecksum {
		sum ^= 0x5555
	}
	binary.BigEndian.PutUint16(at, sum)
}

// onesSum is the sum of RFC 1071.
func onesSum(b []byte) uint16 {
	var s uint32
	for i := range b {
		s += uint32(b[i]) << (8 * (1 - i&1))
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// text is a frame on its way to the client, or to the SVM, as a script would have it.
func text(f []byte, to who, w *world) string {
	var s strings.Builder
	typ, at := binary.BigEndian.Uint16(f[12:]), 14
	tags := ""
	if typ == unix.ETH_P_8021Q {
		tags = fmt.Sprintf(" vlan=%d", binary.BigEndian.Uint16(f[14:])&0xfff)
		typ, at = binary.BigEndian.Uint16(f[16:]), 18
	}
	b := f[at:]
	var proto byte
	switch {
	case typ == unix.ETH_P_ARP:
		return "arp" + tags
	case typ == unix.ETH_P_IPV6 && len(b) >= 40:
		tags += " ip6"
		proto, b = b[6], b[40:40+int(binary.BigEndian.Uint16(b[4:]))]
	case typ == unix.ETH_P_IP && len(b) >= 20:
		if frag := binary.BigEndian.Uint16(b[6:]); frag&0x3fff != 0 {
			tags += fmt.Sprintf(" offset=%d", frag&0x1fff*8)
			if frag&0x2000 != 0 {
				tags += " more"
			}
		}
		for _, x := range []struct {
			name        string
			is, usually uint16
		}{{"id", binary.BigEndian.Uint16(b[4:]), 0}, {"ttl", uint16(b[8]), defaultTTL}, {"tos", uint16(b[1]), 0}} {
			if x.is != x.usually {
				tags += fmt.Sprintf(" %s=%d", x.name, x.is)
			}
		}
		proto, b = b[9], b[20:binary.BigEndian.Uint16(b[2:])]
		if strings.Contains(tags, "offset") && !strings.Contains(tags, "offset=0") {
			return fmt.Sprintf("fragment%s %s", tags, payloadText(b, 0))
		}
	default:
		return fmt.Sprintf("frame type=%#x%s %s", typ, tags, payloadText(b, 0))
	}
	switch {
	case proto == unix.IPPROTO_TCP && len(b) >= 20:
		return tcpText(b, tags, to, w)
	case proto == unix.IPPROTO_UDP && len(b) >= 8:
		s.WriteString("udp" + w.connText(b, to) + tags + " " + payloadText(b[8:], 0))
	case proto == unix.IPPROTO_ICMP && len(b) >= 8 && b[0] == 3:
		s.WriteString("unreachable" + tags)
	case proto == unix.IPPROTO_ICMP && len(b) >= 8:
		s.WriteString("icmp" + tags + " " + payloadText(b[8:], 0))
	default:
		fmt.Fprintf(&s, "ip proto=%d%s %s", proto, tags, payloadText(b, 0))
	}
	return s.String()
}

func tcpText(b []byte, tags string, to who, w *world) string {
	var s strings.Builder
	for i, letter := range tcpFlags {
		if b[13]>>i&1 != 0 {
			s.WriteRune(letter)
		}
	}
	n := w.of(w.connOf(b, to))
	from := pvm
	if to == svm {
		from = client
	}
	s.WriteString(w.connText(b, to) + tags)
	seq := binary.BigEndian.Uint32(b[4:]) - n.isn(from)
	fmt.Fprintf(&s, " seq=%s", n.seqText(binary.BigEndian.Uint32(b[4:]), n.isn(from)))
	if b[13]&flagACK != 0 {
		fmt.Fprintf(&s, " ack=%s", n.seqText(binary.BigEndian.Uint32(b[8:]), n.isnOf(to)))
	}
	if win := binary.BigEndian.Uint16(b[14:]); win != defaultWin {
		fmt.Fprintf(&s, " win=%d", win)
	}
	if urg := binary.BigEndian.Uint16(b[18:]); urg != 0 {
		fmt.Fprintf(&s, " urg=%d", urg)
	}
	head := int(b[12] >> 4 * 4)
	s.WriteString(n.optionsText(b[20:head], from, to))
	if head < len(b) {
		s.WriteString(" " + payloadText(b[head:], seq))
	}
	return s.String()
}

func (n *numbers) optionsText(o []byte, from, to who) string {
	var s strings.Builder
	for len(o) > 1 {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		size := min(max(int(o[1]), 2), len(o))
		v := o[2:size]
		switch {
		case o[0] == 2 && len(v) == 2:
			fmt.Fprintf(&s, " mss=%d", binary.BigEndian.Uint16(v))
		case o[0] == 3 && len(v) == 1:
			fmt.Fprintf(&s, " ws=%d", v[0])
		case o[0] == 4:
			s.WriteString(" sackok")
		case o[0] == 5:
			for i := 0; i+8 <= len(v); i += 8 {
				fmt.Fprintf(&s, " sack=%s-%s", n.seqText(binary.BigEndian.Uint32(v[i:]), n.isnOf(to)), n.seqText(binary.BigEndian.Uint32(v[i+4:]), n.isnOf(to)))
			}
		case o[0] == 8 && len(v) == 8:
			fmt.Fprintf(&s, " ts=%s", n.clockText(binary.BigEndian.Uint32(v), n.clock(from)))
			if echo := binary.BigEndian.Uint32(v[4:]); echo != 0 {
				fmt.Fprintf(&s, "/%s", n.clockText(echo, n.clockOf(to)))
			}
		default:
			fmt.Fprintf(&s, " option%d", o[0])
		}
		o = o[size:]
	}
	return s.String()
}

// payloadText is text itself, or what of the stream at pos it is.
func payloadText(b []byte, pos uint32) string {
	want := streamAt(pos, len(b))
	wrong := 0
	at := 0
	for i := range b {
		if b[i] != want[i] {
			wrong++
			at = i
		}
	}
	switch {
	case len(b) > 1 && wrong == 0:
		return fmt.Sprintf("bytes=%d", len(b))
	case len(b) > 20 && wrong == 1:
		return fmt.Sprintf("bytes=%d flip=%d", len(b), at+1)
	}
	trimmed := bytes.TrimRight(b, "\x00")
	if len(trimmed) < len(b) {
		return fmt.Sprintf("%q padding=%d", trimmed, len(b)-len(trimmed))
	}
	return strconv.Quote(string(b[:cmp.Or(min(len(b), 60), 0)]))
}
