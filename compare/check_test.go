// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"strings"
	"testing"
)

// A rule that is turned off is seen by the assertion that guards it, with no test that
// looks at frames: R2's, since the PVM alone acknowledges then.
func TestAssertionSeesMutation(t *testing.T) {
	defer func() {
		if why := fmt.Sprint(recover()); !strings.Contains(why, "acknowledged") {
			t.Errorf("the assertion reports: %v", why)
		}
	}()
	x := newTranscript(t, 0)
	for _, l := range []string{"pvm SA 1000 ack=501", "svm SA 1000 ack=501", "pvm A 1001 ack=601"} {
		x.step(l, x.parse(l))
		x.p.mut = mutR2 // and assertions stay on
	}
}

// Each assertion sees what it is there for.
func TestAssertions(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(p *Primary, c *conn)
		report string
	}{
		"nothing":                   {func(*Primary, *conn) {}, ""},
		"released beyond compared":  {func(_ *Primary, c *conn) { c.released += 5000 }, "released up to"},
		"compared is no point":      {func(_ *Primary, c *conn) { c.svm.compared += 7 }, "no sum is known"},
		"ACK above the SVM's":       {func(_ *Primary, c *conn) { c.acks.sent.ack = c.acks.svm.ack + 1 }, "acknowledged"},
		"ACK above the PVM's":       {func(_ *Primary, c *conn) { c.acks.sent.ack = c.acks.pvm.ack + 1 }, "acknowledged"},
		"window above the SVM's":    {func(_ *Primary, c *conn) { c.acks.sent.edge = c.acks.svm.edge + 1 }, "offered"},
		"held pieces overlap":       {func(_ *Primary, c *conn) { c.held.view()[1].start-- }, "held from"},
		"held pieces out of order":  {func(_ *Primary, c *conn) { v := c.held.view(); v[0], v[1] = v[1], v[0] }, "before that"},
		"held piece of nothing":     {func(_ *Primary, c *conn) { c.held.first().end = c.held.first().start }, "of a frame"},
		"held piece beyond a frame": {func(_ *Primary, c *conn) { c.held.view()[1].end++ }, "of a frame"},
		"slot not counted":          {func(_ *Primary, c *conn) { c.held.holds[smallSlot]-- }, "slots"},
		"slot of nobody":            {func(p *Primary, _ *conn) { p.slots[largeSlot].held++ }, "slots of"},
		"points out of order":       {func(_ *Primary, c *conn) { v := c.svm.points.view(); v[0], v[1] = v[1], v[0] }, "behind point"},
		"points not counted":        {func(p *Primary, _ *conn) { p.points.used++ }, "points counted"},
		"loose points not counted":  {func(_ *Primary, c *conn) { c.svm.nloose++ }, "loose"},
		"half-open and established": {func(p *Primary, c *conn) { p.conns.half.push(&c.half) }, "established"},
		"half-open not listed":      {func(p *Primary, _ *conn) { p.conns.half.n++ }, "half-open connections"},
		"active open not listed":    {func(p *Primary, c *conn) { p.opens.link(c, false); c.open.in = nil }, "active opens"},
		"timer out of place":        {func(p *Primary, _ *conn) { p.timers[0].due = 1 << 62 }, "out of place"},
		"timer of nobody":           {func(p *Primary, _ *conn) { p.timers.add(new(timer)) }, "timers of"},
		"datagram not counted":      {func(p *Primary, _ *conn) { p.datagrams.held++ }, "datagrams"},
		"flow of nothing":           {func(p *Primary, _ *conn) { p.datagrams.create(&Tuple{Proto: 17}) }, "of nothing"},
		"datagram of both": {func(p *Primary, _ *conn) {
			f := p.datagrams.create(&Tuple{Proto: 17})
			f.held.insert(0, dgram{})
			f.svm.insert(0, svmDgram{})
		}, "both guests"},
	} {
		t.Run(name, func(t *testing.T) {
			x := newTranscript(t, 0)
			for _, l := range []string{
				"pvm SA 1000 ack=501", "svm SA 1000 ack=501", "pvm A 1001..1101 ack=501", "svm A 1001..1101 ack=501",
				"pvm A 1201..1301 ack=501", "pvm A 1301..1401 ack=501", "svm A 1101..1151 ack=501", "pvm udp 0..9",
			} {
				x.step(l, x.parse(l))
			}
			if err := x.p.check(); err != nil {
				t.Fatal(err)
			}
			for _, conn := range x.p.conns.byTuple {
				c.damage(x.p, conn)
			}
			switch err := x.p.check(); {
			case c.report == "" && err != nil, c.report != "" && (err == nil || !strings.Contains(err.Error(), c.report)):
				t.Errorf("the assertion reports %v, want %q", err, c.report)
			}
		})
	}
}
