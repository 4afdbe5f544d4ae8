// SPDX-License-Identifier: Apache-2.0

// Package proxies is part A of the benchmark: what a client sees of a guest behind each
// proxy, and what that costs. Each variant has namespaces of its own with the same services
// and the same client; they take turns.
package proxies

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

// variant is what is compared.
type variant struct {
	name     string
	taps     bool // its guests' devices are taps that a QEMU reads; no kernel programs
	alone    bool // no second guest
	start    func(context.Context, *lab.World) (*Proxy, error)
	softirqs []int

	world *lab.World
	proxy *Proxy
}

func variants(o lab.Options) []*variant {
	vs := []*variant{
		{name: "mirroring alone", start: func(_ context.Context, w *lab.World) (*Proxy, error) { return MirroringAlone(w) }},
		{name: "QEMU's chain", taps: true, start: func(ctx context.Context, w *lab.World) (*Proxy, error) { return QEMUChain(ctx, w, o.QEMU) }},
		{name: "lockstep", start: func(ctx context.Context, w *lab.World) (*Proxy, error) { return lockstepPair(ctx, w, o.Lockstep) }},
		{name: "QEMU, no proxy", taps: true, alone: true, start: func(ctx context.Context, w *lab.World) (*Proxy, error) { return qemuAlone(ctx, w, o.QEMU) }},
	}
	return slices.DeleteFunc(vs, func(v *variant) bool { return v.taps && o.QEMU == "" })
}

// begin starts everything anew.
func (v *variant) begin(ctx context.Context) (err error) {
	if err = v.world.Start(1); err == nil {
		v.proxy, err = v.start(ctx, v.world)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", v.name, err), v.world.Stop())
	}
	return nil
}

func (v *variant) end() error {
	var err error
	if v.proxy != nil {
		err = v.proxy.Stop()
		v.proxy = nil
	}
	if err != nil {
		err = fmt.Errorf("stop %s: %w", v.name, err)
	}
	return errors.Join(err, v.world.Stop())
}

// do does a job and reads what it has cost.
func (v *variant) do(ctx context.Context, j workload.Job) (*run, error) {
	before, err := v.read()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", v.name, err)
	}
	var after counters
	var fail error
	r := &run{job: &j}
	r.result, err = v.world.Clients[0].Do(ctx, &j, func() { after, fail = v.read() })
	if err = errors.Join(err, fail); err != nil {
		return nil, fmt.Errorf("%s: %w", v.name, err)
	}
	r.counters = after.since(before)
	return r, nil
}

// results are the report's cases as they come to be.
type results struct {
	cases   []report.Case
	took    map[int]map[string][]float64 // by case and variant: latencies in µs, of all rounds
	stalled map[int]map[string]int       // by case and variant: rounds
}

// add adds a figure to the case with number i.
func (rs *results) add(i int, f *figure, v *variant, r *run, stalled string) {
	c := &rs.cases[i]
	s := c.Series[v.name]
	defer func() { c.Series[v.name] = s }()
	if stalled != "" {
		if rs.stalled[i] == nil {
			rs.stalled[i] = make(map[string]int)
		}
		rs.stalled[i][v.name]++
		if s.Instead == "" {
			s.Instead = stalled
		}
		return
	}
	value, instead := f.of(v, r)
	if instead != "" {
		s.Instead = instead
		return
	}
	s.Rounds = append(s.Rounds, value)
	if f.cdf {
		if rs.took[i] == nil {
			rs.took[i] = make(map[string][]float64)
		}
		for _, ns := range r.result.Took {
			rs.took[i][v.name] = append(rs.took[i][v.name], float64(ns)/1e3)
		}
	}
}

// Part measures.
func Part(ctx context.Context, o lab.Options, progress lab.Progress) (part report.Part, err error) {
	if len(measures(o, false)) == 0 {
		return part, fmt.Errorf("%q: %w", o.Only, lab.ErrNoMatch)
	}
	vs := variants(o)
	softirqs, err := softirqThreads()
	if err != nil {
		return part, err
	}
	defer func() {
		for _, v := range vs {
			if v.world != nil {
				err = errors.Join(err, v.end(), v.world.Close())
			}
		}
	}()
	part = report.Part{Name: "A", Title: "the proxies alone, at native speed", Notes: notes(o)}
	for _, v := range vs {
		part.Variants = append(part.Variants, v.name)
		v.softirqs = softirqs
		if v.world, err = lab.NewWorld(v.taps); err != nil {
			return part, fmt.Errorf("make the namespaces of %s: %w", v.name, err)
		}
	}
	rs := &results{took: make(map[int]map[string][]float64), stalled: make(map[int]map[string]int)}
	for _, m := range measures(o, false) {
		for _, f := range m.figures {
			f.Series = make(map[string]report.Series)
			rs.cases = append(rs.cases, f.Case)
		}
	}
	// In turns, so that a disturbance of the machine hits all alike. In a round of its own
	// the kernel counts its programs' run time.
	per := len(measures(o, false))
	total, done := (o.Rounds+1)*len(vs)*per, 0
	for round := range o.Rounds + 1 {
		counted := round == o.Rounds
		if counted {
			stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
			if err != nil {
				return part, fmt.Errorf("have the kernel count its programs' run time: %w", err)
			}
			defer stats.Close()
		}
		for _, v := range vs {
			tell := func(what string) {
				text := fmt.Sprintf("part A, round %d of %d, %s: %s", round+1, o.Rounds, v.name, what)
				if counted {
					text = fmt.Sprintf("part A, kernel programs of %s: %s", v.name, what)
				}
				progress(done, total, text)
				done++
			}
			if err := v.turn(ctx, o, rs, counted, tell); err != nil {
				return part, err
			}
		}
	}
	rs.finish(o.Rounds)
	part.Cases = rs.cases
	return part, nil
}

// turn does each job once, and starts anew after one that stalled: what is left of it
// would be in the way of the next.
func (v *variant) turn(ctx context.Context, o lab.Options, rs *results, counted bool, tell func(what string)) error {
	if err := v.begin(ctx); err != nil {
		return err
	}
	first := 0 // number of the job's first case
	for _, m := range measures(o, v.taps) {
		tell(m.what)
		at := first
		first += len(m.figures)
		wanted := slices.ContainsFunc(m.figures, func(f figure) bool { return f.counted == counted })
		if !wanted {
			continue
		}
		r, stalled, err := v.carry(ctx, m.job)
		if err != nil {
			return err
		}
		for i := range m.figures {
			if f := &m.figures[i]; f.counted == counted {
				rs.add(at+i, f, v, r, stalled)
			}
		}
		if stalled != "" {
			if err := errors.Join(v.end(), ctx.Err()); err != nil {
				return err
			}
			if err := v.begin(ctx); err != nil {
				return err
			}
		}
	}
	return v.end()
}

// carry does a job after a warm-up. stalled says what happened if it did not get to its end.
func (v *variant) carry(ctx context.Context, j workload.Job) (r *run, stalled string, err error) {
	warm := j
	warm.N = max(warm.Conns, warm.N/20)
	r, err = v.do(ctx, warm)
	if err == nil && r.result.Stalled == "" {
		r, err = v.do(ctx, j)
	}
	if err != nil {
		if died := v.proxy.Died(); v.taps && died != "" && ctx.Err() == nil {
			return nil, died, nil
		}
		return nil, "", err
	}
	if s := r.result.Stalled; s != "" {
		stalled = fmt.Sprintf("%s after %s in %v", s, amount(r), r.result.Wall.Round(time.Millisecond))
		if v.proxy.Trouble != nil {
			stalled += "; " + v.proxy.Trouble()
		}
	}
	return r, stalled, nil
}

// amount is what was done of a job, in words.
func amount(r *run) string {
	switch r.job.Do {
	case workload.Source, workload.Sink:
		return fmt.Sprintf("%.1f of %.1f MB", float64(r.result.Done)/1e6, float64(r.job.N)/1e6)
	case workload.Fetch:
		return fmt.Sprintf("%d of %d transfers", r.result.Done, r.job.N)
	case workload.Connect:
		return fmt.Sprintf("%d of %d connections", r.result.Done, r.job.N)
	default:
		return fmt.Sprintf("%d of %d exchanges", r.result.Done, r.job.N)
	}
}

// finish adds what concerns all rounds.
func (rs *results) finish(rounds int) {
	for i := range rs.cases {
		for name, s := range rs.cases[i].Series {
			s.CDF = report.CDF(rs.took[i][name])
			if n := rs.stalled[i][name]; n > 0 && rounds > 1 {
				s.Instead = fmt.Sprintf("in %d of %d rounds: %s", n, max(rounds, n), s.Instead)
			}
			rs.cases[i].Series[name] = s
		}
	}
}

func notes(o lab.Options) []string {
	ns := []string{
		"client, both hosts and both guests share this machine's cores; on two hosts each has its own",
		"mirroring alone does not send again what the SVM has lost; where the SVM has used no CPU it stopped, and the floor is lower than it should be",
		"a GSO frame counts as one; so does what the peer link carries of it, without the headers of its segments",
		"CPU of a party is that of its threads with all that the kernel does in them; the shares of kernel programs and softirq are within these",
	}
	if o.QEMU != "" {
		ns = append(ns,
			"QEMU's chain gets single segments with checksums, because hub ports carry no vnet headers; its sockets between the hosts send at once (nodelay)",
			"QEMU's guests have no TCP timestamps: filter-rewriter does not translate them, and some handshakes would hang",
			"QEMU, no proxy: a frame's way through a QEMU without filters, which a guest's own QEMU would also cost; lockstep's figures have no such part",
			"where QEMU's chain stalls, a pair with guests would make a checkpoint",
			"through QEMU bulk transfers are an eighth as long")
	}
	return ns
}
