// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
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
	ipOptions     bool
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
	case "ipoptions":
		p.ipOptions = true
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
	h := []byte{0x45, p.tos, 0, 0}
	for _, v := range []uint16{p.id, p.frag} {
		h = binary.BigEndian.AppendUint16(h, v)
	}
	h = append(append(append(h, p.ttl, proto, 0, 0), src...), dst...)
	if p.ipOptions {
		h = append(h, 1, 1, 1, 0)
		h[0]++
	}
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(body)))
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
