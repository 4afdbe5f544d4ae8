// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/proxies"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
	"github.com/lockstep-ft/lockstep/control/api"
)

// perProcess bounds the connections of one process: the limit on open files cannot always be raised, and
// is 20 000 here and there.
const perProcess = 12_500

// opening is how many connections are being opened at a time.
const opening = 16

// variant is what is compared.
type variant struct {
	name string
	taps bool
	// start starts it; there is to be room for n connections.
	start func(ctx context.Context, w *lab.World, n int) (*proxies.Proxy, *pair, error)
	world *lab.World
	full  int                 // connections that it could not open, or that were dead then; 0: none so far
	why   string              // what it did then
	added [measuredCount]bool // the figures of this round
}

func (b *bench) proxies() []*variant {
	vs := []*variant{
		{name: alone, start: func(_ context.Context, w *lab.World, _ int) (*proxies.Proxy, *pair, error) {
			p, err := proxies.MirroringAlone(w)
			return p, nil, err
		}},
		{name: chain, taps: true, start: func(ctx context.Context, w *lab.World, _ int) (*proxies.Proxy, *pair, error) {
			p, err := proxies.QEMUChain(ctx, w, b.o.QEMU)
			return p, nil, err
		}},
		{name: lockstep, start: func(ctx context.Context, w *lab.World, n int) (*proxies.Proxy, *pair, error) {
			p, err := startPair(ctx, w, b.o.Lockstep, fmt.Sprintf("compare: {timeout: 10s, max_connections: %d}", room(n)))
			if err != nil {
				return nil, nil, err
			}
			return &proxies.Proxy{OnP: p.P, OnS: p.S, Stop: p.Stop}, p, nil
		}},
	}
	return slices.DeleteFunc(vs, func(v *variant) bool { return v.taps && b.o.QEMU == "" })
}

// room is for how many connections lockstep's tables are made where there are n.
func room(n int) int { return max(64, n+n/4) }

// connections measures what an exchange costs while others are open.
func (b *bench) connections(ctx context.Context) (err error) {
	vs := b.proxies()
	defer func() {
		for _, v := range vs {
			if v.world != nil {
				err = errors.Join(err, v.world.Close())
			}
		}
	}()
	for _, v := range vs {
		if v.world, err = lab.NewWorld(v.taps); err != nil {
			return fmt.Errorf("make the namespaces of %s: %w", v.name, err)
		}
	}
	for _, n := range b.counts {
		for round := range b.rounds {
			for _, v := range vs {
				b.progress(fmt.Sprintf("%s connections, round %d of %d: %s", count(n), round+1, b.rounds, v.name))
				v.added = [measuredCount]bool{}
				if v.full > 0 && n > v.full {
					b.notCarried(v, n, "not tried, because of what it did with fewer: "+v.why)
					continue
				}
				err := b.open(ctx, v, n, func(h *holding, p *pair, r *outcome) error { return b.held(ctx, v, n, h, p, r) })
				if err == nil && v.name == lockstep {
					err = b.takenOver(ctx, v, n)
				}
				if err != nil {
					return fmt.Errorf("%s, %s connections: %w", v.name, count(n), err)
				}
			}
		}
	}
	return nil
}

// Figures, which measured describes.
const (
	opened = iota
	hung
	p50
	p99
	cpu
	cpuProxies
	rate
	rateCPU
	idle
	residentP
	residentS
	mapsP
	mapsS
	frozen
	confirm
	tablesOfS
	takeover
	measuredCount
)

// measured are the groups of the figures.
var measured = [measuredCount]struct {
	group, unit string
	more        bool // is better
}{
	opened:     {"connections opened, 16 at a time", "1/s", true},
	hung:       {"connections that hung while they were opened", "", false},
	p50:        {"exchange on one of them, chosen at random: p50", "µs", false},
	p99:        {"exchange on one of them, chosen at random: p99", "µs", false},
	cpu:        {"CPU of an exchange, all parties", "µs", false},
	cpuProxies: {"CPU of an exchange, the proxies", "µs", false},
	rate:       {"exchanges, 64 under way", "1/s", true},
	rateCPU:    {"CPU of an exchange with 64 under way, the proxies", "µs", false},
	idle:       {"CPU of the proxies while nothing is sent", "ms/s", false},
	residentP:  {"memory of the proxy on P", "MB", false},
	residentS:  {"memory of the proxy on S", "MB", false},
	mapsP:      {"kernel memory of the maps on P", "MB", false},
	mapsS:      {"kernel memory of the maps on S", "MB", false},
	frozen:     {"checkpoint, without QEMU's part: nothing leaves for", "ms", false},
	confirm:    {"checkpoint: of that from the guests' going on until the commit", "ms", false},
	tablesOfS:  {"checkpoint: S's tables while the SVM stands still", "ms", false},
	takeover:   {"planned takeover, without QEMU's part", "ms", false},
}

func connectionsCase(what, n int) report.Case {
	m := measured[what]
	return figure(m.group, m.unit, !m.more, n, "connections")
}

func (b *bench) add(v *variant, what, n int, value float64) {
	v.added[what] = true
	b.cases.Add(connectionsCase(what, n), v.name, value)
}

// notCarried notes why a variant has no more figures at n connections in this round.
func (b *bench) notCarried(v *variant, n int, why string) {
	for what := range measured {
		if !v.added[what] {
			b.cases.Instead(connectionsCase(what, n), v.name, why)
		}
	}
}

// open opens connections through a proxy that was started anew, and has f go on from there.
func (b *bench) open(ctx context.Context, v *variant, n int, f func(*holding, *pair, *outcome) error) (err error) {
	w := v.world
	if err := w.Start((n + perProcess - 1) / perProcess); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop()) }()
	proxy, p, err := v.start(ctx, w, n)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, proxy.Stop()) }()
	if v.taps {
		defer func() {
			if died := proxy.Died(); err != nil && died != "" && ctx.Err() == nil {
				b.notCarried(v, n, died)
				err = nil
			}
		}()
	}
	h := &holding{w: w, proxy: proxy}
	r, err := h.do(ctx, workload.Job{Do: workload.Hold, Conns: opening, N: n, Size: workload.Message, Stall: 5 * time.Second, Limit: 3 * time.Minute})
	if err != nil {
		return err
	}
	return f(h, p, r)
}

// held measures what connections that stand cost.
func (b *bench) held(ctx context.Context, v *variant, n int, h *holding, p *pair, r *outcome) (err error) {
	if r.Done+r.Lost < n {
		return b.stalled(ctx, v, h, r, n, n)
	}
	b.add(v, opened, n, float64(r.Done)/r.Wall.Seconds())
	b.add(v, hung, n, float64(r.Lost))
	if err := b.atRest(ctx, v, h, n); err != nil {
		return err
	}
	for _, x := range []struct{ under, exchanges int }{{1, b.single}, {64, b.many}} {
		r, err := h.do(ctx, workload.Job{Do: workload.Pick, Conns: x.under, N: x.exchanges, Size: workload.Message, Stall: 5 * time.Second, Limit: time.Minute})
		if err != nil {
			return err
		}
		if r.Done < x.exchanges {
			return b.stalled(ctx, v, h, r, x.exchanges, n)
		}
		each := func(d time.Duration) float64 { return float64(d) / 1e3 / float64(r.Done) }
		if x.under == 1 {
			b.add(v, p50, n, percentile(r.Took, 0.5))
			b.add(v, p99, n, percentile(r.Took, 0.99))
			b.add(v, cpu, n, each(r.all))
			b.add(v, cpuProxies, n, each(r.proxies))
		} else {
			b.add(v, rate, n, float64(r.Done)/r.Wall.Seconds())
			b.add(v, rateCPU, n, each(r.proxies))
		}
	}
	if p == nil {
		for _, what := range []int{frozen, confirm, tablesOfS, takeover} {
			b.cases.Instead(connectionsCase(what, n), v.name, "there is no guest that could be copied or take over")
		}
		_, err = h.do(ctx, workload.Job{Do: workload.Drop})
		return err
	}
	return b.checkpoint(ctx, v, p, n)
}

// atRest measures what the connections cost while nothing is sent, and what memory they take.
func (b *bench) atRest(ctx context.Context, v *variant, h *holding, n int) error {
	if h.proxy.OnP == nil {
		for _, what := range []int{idle, residentP, residentS, mapsP, mapsS} {
			b.cases.Instead(connectionsCase(what, n), v.name, "it has no processes, and keeps nothing of a connection")
		}
		return nil
	}
	_, before, err := h.usage()
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(b.idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	_, after, err := h.usage()
	if err != nil {
		return err
	}
	b.add(v, idle, n, float64(after-before)/1e6/time.Since(began).Seconds())
	for _, on := range []struct {
		process        *lab.Process
		resident, maps int
	}{{h.proxy.OnP, residentP, mapsP}, {h.proxy.OnS, residentS, mapsS}} {
		bytes, err := lab.Resident(on.process.PID())
		if err != nil {
			return err
		}
		b.add(v, on.resident, n, float64(bytes)/mb)
		if v.name != lockstep {
			b.cases.Instead(connectionsCase(on.maps, n), v.name, "it has no maps")
			continue
		}
		if bytes, err = lab.MapMemory(on.process.PID()); err != nil {
			return err
		}
		b.add(v, on.maps, n, float64(bytes)/mb)
	}
	return nil
}

// checkpoint has the pair go through a checkpoint, after which its guests, of which nothing was copied, go on with
// other connections than the client's.
func (b *bench) checkpoint(ctx context.Context, v *variant, p *pair, n int) error {
	before, err := p.phases(ctx)
	if err != nil {
		return err
	}
	if _, err := api.OrderCheckpoint(ctx, p.Socket("alpha")); err != nil {
		return fmt.Errorf("order a checkpoint: %w", err)
	}
	after, err := p.phases(ctx)
	if err != nil {
		return err
	}
	for what, phase := range map[int]string{frozen: "frozen", confirm: "confirm", tablesOfS: "tables"} {
		done := after[phase].Count - before[phase].Count
		if done == 0 {
			return fmt.Errorf("the status does not show %q of the checkpoint", phase)
		}
		b.add(v, what, n, (after[phase].Seconds-before[phase].Seconds)/float64(done)*1e3)
	}
	return nil
}

// takenOver has the secondary of a new pair take over.
func (b *bench) takenOver(ctx context.Context, v *variant, n int) error {
	return b.open(ctx, v, n, func(h *holding, p *pair, r *outcome) error {
		if r.Done < n {
			return fmt.Errorf("only %d connections stand", r.Done)
		}
		p.Abandon() // its primary ends, and its secondary has connections that lockstep would not give up
		done, err := api.OrderFailover(ctx, p.Socket("beta"), false)
		if err != nil {
			return fmt.Errorf("order a takeover: %w", err)
		}
		b.add(v, takeover, n, done.Seconds*1e3)
		return nil
	})
}

// phases are those of the checkpoints on both hosts.
func (p *pair) phases(ctx context.Context) (map[string]api.Histogram, error) {
	onP, err := p.Status(ctx, "alpha")
	if err != nil {
		return nil, err
	}
	onS, err := p.Status(ctx, "beta")
	if err != nil {
		return nil, err
	}
	all := maps.Clone(onP.CheckpointPhases)
	all["tables"] = onS.CheckpointPhases["tables"]
	return all, nil
}

// stalled notes that a variant did not carry n connections, what it did of so many exchanges or connections, and
// what became of those that it had carried.
func (b *bench) stalled(ctx context.Context, v *variant, h *holding, r *outcome, of, n int) error {
	why := fmt.Sprintf("%s of %s in %v", count(r.Done), count(of), r.Wall.Round(time.Millisecond))
	if r.Stalled != "" {
		why = fmt.Sprintf("%s after %s of %s", r.Stalled, count(r.Done), count(of))
	}
	if r.Lost > 0 {
		why += fmt.Sprintf(", %d more given up", r.Lost)
	}
	if h.proxy.Trouble != nil {
		why += "; " + h.proxy.Trouble()
	}
	after, err := h.do(ctx, workload.Job{Do: workload.Pick, Conns: 1, N: 1000, Size: workload.Message, Stall: 3 * time.Second, Limit: 20 * time.Second})
	if err != nil {
		return err
	}
	why = fmt.Sprintf("%s; then %d of 1000 exchanges on the connections that stood", why, after.Done)
	if !v.added[opened] || r.Done == 0 {
		v.full, v.why = n, why
	}
	b.notCarried(v, n, why)
	return nil
}

// holding is a world with its clients' connections.
type holding struct {
	w     *lab.World
	proxy *proxies.Proxy
}

// outcome is what came of the same job of all clients, and what it cost.
type outcome struct {
	workload.Result
	all, proxies time.Duration // CPU
}

// do has the clients share a job, one after the other.
func (h *holding) do(ctx context.Context, j workload.Job) (*outcome, error) {
	all, of, err := h.usage()
	if err != nil {
		return nil, err
	}
	out, left := new(outcome), j.N
	for i, c := range h.w.Clients {
		one := j
		one.N = left / (len(h.w.Clients) - i)
		left -= one.N
		r, err := c.Do(ctx, &one, func() {})
		if err != nil {
			return nil, err
		}
		out.Done += r.Done
		out.Lost += r.Lost
		out.Wall += r.Wall
		out.Took = append(out.Took, r.Took...)
		if out.Stalled = r.Stalled; out.Stalled != "" {
			break
		}
	}
	slices.Sort(out.Took)
	allAfter, ofAfter, err := h.usage()
	out.all, out.proxies = allAfter-all, ofAfter-of
	return out, err
}

// usage is the CPU time of all parties, and of the proxies among them.
func (h *holding) usage() (all, of time.Duration, err error) {
	add := func(p *lab.Process, to ...*time.Duration) {
		if p == nil || err != nil {
			return
		}
		var u lab.Usage
		if u, err = lab.UsageOf(p.PID()); err != nil {
			err = fmt.Errorf("%w; its log: %s", err, p.Log())
		}
		for _, sum := range to {
			*sum += u.CPU
		}
	}
	add(h.proxy.OnP, &all, &of)
	add(h.proxy.OnS, &all, &of)
	for _, c := range h.w.Clients {
		add(c.Process, &all)
	}
	for _, services := range h.w.Services {
		for _, s := range services {
			add(s, &all)
		}
	}
	return all, of, err
}
