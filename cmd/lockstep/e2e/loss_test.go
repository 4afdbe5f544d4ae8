// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestLoss: over a peer link that loses, repeats and reorders, transfers are
// right byte for byte and no connection asks for a checkpoint (R6).
func TestLoss(t *testing.T) {
	const size = 60_000_000
	// A request that is lost three times running waits 1.4 s for the client's own
	// timer, which is more than the default: a checkpoint would be right then.
	p := newPair(t, lt.Impaired, "", "", "compare: {timeout: 3s}")
	transfers := []struct {
		name string
		run  func(p *pair)
	}{
		{"source", func(p *pair) { p.source(lt.Guest4, size) }},
		{"sink", func(p *pair) { p.sink(lt.Guest6, size) }},
		{"both-ways", func(p *pair) { p.bothWays(lt.Guest4, size) }},
		{"keepalive", func(p *pair) { p.keepAlive(lt.Guest6, 300) }},
	}
	lossless := make(map[string]time.Duration)
	for _, x := range transfers {
		t.Run("lossless/"+x.name, func(t *testing.T) {
			begun := time.Now()
			x.run(p.with(t))
			lossless[x.name] = time.Since(begun)
		})
	}
	for _, link := range []struct {
		name  string
		rates lt.Rates
	}{
		{"loss-1%", lt.Rates{Loss: 10}},
		{"loss-5%", lt.Rates{Loss: 50}},
		{"all-of-it", lt.Rates{Loss: 10, Duplicate: 20, Reorder: 20}},
	} {
		for dir, name := range []string{lt.P2S: "p2s", lt.S2P: "s2p"} {
			dir := lt.Direction(dir)
			t.Run(link.name+"/"+name, func(t *testing.T) {
				p.Impair.Set(t, dir, link.rates, 1)
				defer p.Impair.Set(t, dir, lt.Rates{}, 0)
				before := p.Impair.Counts(t, dir)
				for _, x := range transfers {
					t.Run(x.name, func(t *testing.T) {
						begun := time.Now()
						x.run(p.with(t))
						took := time.Since(begun)
						t.Logf("%.0f %% of the lossless run's goodput (%v)", 100*lossless[x.name].Seconds()/took.Seconds(), took.Round(time.Millisecond))
					})
				}
				c := p.Impair.Counts(t, dir)
				t.Logf("of %d frames %d lost, %d repeated, %d late", c.Seen-before.Seen,
					c.Lost-before.Lost, c.Duplicated-before.Duplicated, c.Reordered-before.Reordered)
				if c.Lost == before.Lost {
					t.Error("nothing was lost")
				}
			})
		}
	}
	s := p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 && s.HeldPackets == 0 })
	if s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
}
