// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// receipts is what a peer has received: spans in the order of their last change, the newest first.
type receipts struct {
	ack   uint32
	spans []span
}

// add takes a segment.
func (r *receipts) add(s span) {
	rest := r.spans[:0:0]
	for _, o := range r.spans {
		if before(o.to, s.from) || after(o.from, s.to) {
			rest = append(rest, o)
		} else {
			s = span{minSeq(s.from, o.from), maxSeq(s.to, o.to)}
		}
	}
	r.spans = append([]span{s}, rest...)
	r.spans = slices.DeleteFunc(r.spans, func(o span) bool {
		if !after(o.from, r.ack) {
			r.ack = maxSeq(r.ack, o.to)
			return true
		}
		return false
	})
}

// lossyScript is a transfer over a link that loses and reorders segments; the peer acknowledges each one that arrives. The stack's
// answers are in s.out, the script is returned.
func lossyScript(s *script, r *rand.Rand, sack bool) string {
	var b strings.Builder
	line := func(format string, args ...any) {
		l := fmt.Sprintf(format, args...)
		b.WriteString(l + "\n")
		s.line(l)
	}
	got := receipts{ack: 1}
	option := ""
	if sack {
		option = " sackok"
	}
	line("dial")
	line("wait 10ms")
	line("in S. seq=0 ack=1 win=65535 mss=1460%s", option)
	s.sent = nil
	line("write %d", 5000+r.IntN(40000))
	loss := r.Float64() * 0.4
	for range 12 {
		line("wait 10ms")
		flight := s.sent
		s.sent = nil
		if len(flight) == 0 {
			break
		}
		if r.IntN(3) == 0 && len(flight) > 1 {
			i := r.IntN(len(flight) - 1)
			flight[i], flight[i+1] = flight[i+1], flight[i]
		}
		for _, f := range flight {
			var p packet
			var g segment
			if r.Float64() < loss || !s.peer.parsePacket(f, &p) || !g.parse(&p) || len(g.data) == 0 {
				continue
			}
			got.add(span{g.seq - s.conn().iss, g.end - s.conn().iss})
			blocks := ""
			for i, o := range got.spans[:min(len(got.spans), 4)] {
				blocks += []string{",", " sack="}[max(1-i, 0)] + fmt.Sprintf("%d:%d", o.from, o.to)
			}
			if !sack {
				blocks = ""
			}
			line("in . seq=1 ack=%d%s", got.ack, blocks)
		}
	}
	return b.String()
}

// TestKernelLossyScripts compares with this kernel what is sent again, and when new data is.
func TestKernelLossyScripts(t *testing.T) {
	if !*byKernel {
		return
	}
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			s := &script{t: t}
			s.start([]datadriven.CmdArg{{Key: "nots"}, {Key: "notlp"}})
			input := lossyScript(s, rand.New(rand.NewPCG(seed, 11)), seed%3 != 0)
			compareBlockIn(t, " nots notlp\n----\n\nrun\n"+input+"----\n"+s.out.String()+"\n\n", 0, 2*time.Millisecond)
			if t.Failed() {
				t.Log(s.out.String())
			}
		})
	}
}
