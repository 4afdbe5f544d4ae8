// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// Rule names datagrams that leave from the PVM uncompared.
type Rule struct {
	Proto                 uint8  // IPPROTO_*, not TCP
	GuestPort, RemotePort uint16 // UDP only; 0: any
}

// Compare bounds the comparison.
type Compare struct {
	Timeout        time.Duration // of unmatched output, before a checkpoint (R7)
	CutDelay       time.Duration // before a verified prefix leaves alone (R5)
	MaxConnections int
	Slots          int // held frames, per NIC
	GSOSlots       int // held GSO frames, per NIC
	PrimaryOnly    []Rule
	FastPath       bool // the kernel may decide about connections (R27)
	MPTCP          bool // the guests may use it; else its option is taken out of SYNs
}

func (r *reader) rules(v value, rules *[]Rule) {
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.wrongType(v, "a list like [{proto: udp, remote_port: 123}]")
		return
	}
	if len(seq.Values) > maxRules {
		r.refuse(v.pos, fmt.Sprintf("primary_only has %d rules, and there is room for %d", len(seq.Values), maxRules), "")
		return
	}
	for i, e := range seq.Values {
		var (
			rule          Rule
			guest, remote int
		)
		v := r.value(e, fmt.Sprintf("%s[%d]", v.path, i), v.pos)
		before := len(r.errs)
		r.mapping(v, []field{
			{"proto", "it names what leaves uncompared: udp, icmp, icmpv6 or an IP protocol's number", r.proto(&rule.Proto)},
			{"guest_port", "", r.integer(&guest, 1, math.MaxUint16)},
			{"remote_port", "", r.integer(&remote, 1, math.MaxUint16)},
		})
		if len(r.errs) > before {
			continue
		}
		if rule.Proto != protoUDP && (guest != 0 || remote != 0) {
			r.refuse(v.pos, fmt.Sprintf("IP protocol %d has no ports here", rule.Proto), "remove them, or write proto: udp")
		}
		rule.GuestPort, rule.RemotePort = uint16(guest), uint16(remote)
		*rules = append(*rules, rule)
	}
}

const (
	protoTCP, protoUDP = 6, 17
	// maxProto: 255 is what is not IP to the kernel half.
	maxProto = 254
)

func (r *reader) proto(to *uint8) func(value) {
	return func(v value) {
		n := protoTCP
		const want = "udp, icmp, icmpv6 or an IP protocol's number"
		switch s := v.node.(type) {
		case *ast.StringNode:
			var ok bool
			if n, ok = map[string]int{"icmp": 1, "tcp": protoTCP, "udp": protoUDP, "icmpv6": 58}[s.Value]; !ok {
				r.refuse(v.pos, fmt.Sprintf("proto %q is not known here", s.Value), "write "+want)
				return
			}
		case *ast.IntegerNode:
			before := len(r.errs)
			if r.integer(&n, 0, maxProto)(v); len(r.errs) > before {
				return
			}
		default:
			r.wrongType(v, want)
			return
		}
		if n == protoTCP {
			r.refuse(v.pos, "TCP cannot be primary-only: the SVM could not go on with a connection whose bytes it never sent", "remove the rule")
			return
		}
		*to = uint8(n)
	}
}
