// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

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
		head := b[0] & 15 * 4
		if head > 20 {
			tags += " ipoptions"
		}
		proto, b = b[9], b[head:binary.BigEndian.Uint16(b[2:])]
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
