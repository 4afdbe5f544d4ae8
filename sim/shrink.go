// SPDX-License-Identifier: Apache-2.0

package sim

import "slices"

// Shrink makes a scenario that fails shorter, as long as it fails in the same way. It runs at
// most so many others.
func Shrink(sc *Scenario, mutation, kind string, runs int) *Scenario {
	fails := func(sc *Scenario) bool {
		if runs--; runs < 0 {
			return false
		}
		f := Run(sc, mutation, false).Fault
		return f != nil && f.Kind == kind
	}
	best := sc
	try := func(change func(*Scenario)) bool {
		c := best.clone()
		change(c)
		if !fails(c) {
			return false
		}
		best = c
		return true
	}
	for again := true; again && runs > 0; {
		again = false
		for i := len(best.Actions) - 1; i >= 0; i-- {
			again = try(func(c *Scenario) { c.Actions = slices.Delete(c.Actions, i, i+1) }) || again
		}
		for i := len(best.Conns) - 1; i >= 0; i-- {
			again = try(func(c *Scenario) { c.Conns = slices.Delete(c.Conns, i, i+1) }) || again
		}
		for i := len(best.Floods) - 1; i >= 0; i-- {
			again = try(func(c *Scenario) { c.Floods = slices.Delete(c.Floods, i, i+1) }) || again
		}
		for i := len(best.Exchanges) - 1; i >= 0; i-- {
			again = try(func(c *Scenario) { c.Exchanges = slices.Delete(c.Exchanges, i, i+1) }) || again
		}
		for i := range best.Exchanges {
			if n := best.Exchanges[i].Times; n > 1 {
				again = try(func(c *Scenario) { c.Exchanges[i].Times = n / 2 }) || again
			}
		}
		for i := range best.Conns {
			for j := len(best.Conns[i].Requests) - 1; j >= 0; j-- {
				again = try(func(c *Scenario) { c.Conns[i].Requests = slices.Delete(c.Conns[i].Requests, j, j+1) }) || again
			}
		}
		for _, simpler := range []func(*Scenario){
			func(c *Scenario) { c.NetLoss, c.NetReorder = 0, 0 },
			func(c *Scenario) { c.PeerLoss, c.PeerDup, c.PeerReorder = 0, 0, 0 },
			func(c *Scenario) { c.RefuseCheckpoint = 0 },
			func(c *Scenario) { c.Drift = [2]int64{} },
			func(c *Scenario) { c.Skew = [2]int64{} },
			func(c *Scenario) { c.NoSACK, c.NoScale, c.Autocork = false, false, false },
			func(c *Scenario) { c.NoTimestamps = false },
			func(c *Scenario) { c.Variant = Variant{} },
			func(c *Scenario) { c.IPv6, c.HopOptions, c.DestOptions = false, false, false },
			func(c *Scenario) { c.ECN, c.Mark, c.Keepalive = 0, 0, 0 },
			func(c *Scenario) { c.SeqWrap, c.TSWrap = 0, 0 },
			func(c *Scenario) { c.SynCookies = false },
			func(c *Scenario) { c.FastOpen = false },
			func(c *Scenario) { c.Period = 0 },
			func(c *Scenario) { c.Announce = 0 },
			func(c *Scenario) { c.Slow = [2]int64{} },
			func(c *Scenario) { c.RandomISN = false },
			func(c *Scenario) { c.GSO = false },
			func(c *Scenario) { c.Slots = 512 },
			func(c *Scenario) { c.Arbiter = arbiterEtcd },
		} {
			c := best.clone()
			if simpler(c); c.String() != best.String() {
				again = try(simpler) || again
			}
		}
	}
	return best
}

func (sc *Scenario) clone() *Scenario {
	c := *sc
	c.Actions, c.Conns, c.Exchanges = slices.Clone(sc.Actions), slices.Clone(sc.Conns), slices.Clone(sc.Exchanges)
	c.Floods = slices.Clone(sc.Floods)
	for i := range c.Conns {
		c.Conns[i].Requests = slices.Clone(c.Conns[i].Requests)
	}
	return &c
}
