// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

// Groups of cases.
const (
	echo        = "request/response of 100 B, 1 connection"
	connects    = "new connections: connect, exchange, close"
	pages       = "HTTP, 1 MiB, a connection each"
	transfers   = "transfers, 1 connection"
	divergence  = "requests of 100 B, 8 connections, some answered differently by the guests"
	idle        = "checkpoint, the guest idle"
	busy        = "checkpoint each second, the guest writes 20 MB/s to its memory"
	ratios      = "checkpoint, p50 of the guest's pause over TCP ÷ over a Unix socket"
	target      = "target_pause of 20 ms, the guest writes 20 MB/s to its memory"
	failover    = "failover: the client's longest wait for an answer"
	dirtyRate   = 20_000_000 // bytes a second
	targetPause = 20 * time.Millisecond
)

// How checkpoints travel.
const (
	unixSocket = "Unix socket"
	tcp        = "TCP"
	tcpTLS     = "TCP, TLS"
	tcpTLSDisk = "TCP, TLS, a disk"
)

// Units of figures.
const (
	millis    = "ms"
	perSecond = "1/s"
	megabytes = "MB/s"
	times     = "×"
)

// key names a case.
type key struct{ group, name string }

// cases are all, in the order of the report.
func cases() (cs []report.Case) {
	add := func(group, unit string, less bool, names ...string) {
		for _, n := range names {
			cs = append(cs, report.Case{Group: group, Name: n, Unit: unit, Less: less, Series: make(map[string]report.Series)})
		}
	}
	add(echo, millis, true, "p50", "p99")
	add(connects, millis, true, "p50", "p99")
	add(pages, millis, true, "p50", "p99")
	add(transfers, megabytes, false, "guest to client", "client to guest")
	add(divergence, perSecond, false, shares()...)
	for _, group := range []string{idle, busy} {
		for _, way := range []string{unixSocket, tcp, tcpTLS, tcpTLSDisk} {
			add(group, millis, true, way+": guest's pause, p50", way+": guest's pause, p99", way+": output held, p50")
		}
	}
	add(ratios, times, true, idle, busy)
	add(target, millis, true, "guest's pause, p50", "guest's pause, p99")
	add(target, perSecond, true, "checkpoints")
	add(failover, millis, true, primaryQEMU, secondaryQEMU, primaryHost)
	return cs
}

func shares() (names []string) {
	for _, percent := range percents {
		names = append(names, share(percent))
	}
	return names
}

var percents = []int{0, 1, 10}

func share(percent int) string { return fmt.Sprintf("%d %% differ", percent) }

// step is something that is done with a pair that runs.
type step struct {
	what string
	of   []key // cases that it has figures for
	// run puts figures. instead says what happened if it could not be done to its end.
	run func(ctx context.Context, p *pair, put put) (instead string, err error)
}

// put takes a figure of a case; took are the single times that it comes of, in ms, if there are any.
type put func(k key, value float64, took []float64)

// quantile of sorted values.
func quantile(sorted []float64, share float64) float64 {
	return sorted[int(share*float64(len(sorted)-1))]
}

// milliseconds of a job's exchanges.
func milliseconds(r *workload.Result) (all []float64) {
	for _, ns := range r.Took {
		all = append(all, float64(ns)/1e6)
	}
	return all
}

// jobs are those of a client.
func jobs(o lab.Options) (steps []step) {
	n := func(quick, whole int) int {
		if o.Quick {
			return quick
		}
		return whole
	}
	job := func(do workload.Do, conns, count, size int) workload.Job {
		j := workload.Job{Do: do, Conns: conns, N: count, Size: size, Stall: 5 * time.Second, Limit: 8 * time.Second}
		if o.Quick {
			j.Limit = 2 * time.Second
		}
		return j
	}
	latencies := func(group string, j workload.Job) step {
		return step{group, []key{{group, "p50"}, {group, "p99"}}, func(ctx context.Context, p *pair, put put) (string, error) {
			r, instead, err := p.carry(ctx, j)
			if err == nil && instead == "" {
				all := milliseconds(&r)
				put(key{group, "p50"}, quantile(all, 0.5), all)
				put(key{group, "p99"}, quantile(all, 0.99), nil)
			}
			return instead, err
		}}
	}
	rate := func(k key, unit float64, j workload.Job) step {
		return step{k.group + ", " + k.name, []key{k}, func(ctx context.Context, p *pair, put put) (string, error) {
			r, instead, err := p.carry(ctx, j)
			if err == nil && instead == "" {
				put(k, float64(r.Done)/r.Wall.Seconds()/unit, nil)
			}
			return instead, err
		}}
	}
	const chunk = 128 << 10
	steps = []step{
		latencies(echo, job(workload.Echo, 1, n(100, 3000), workload.Message)),
		latencies(connects, job(workload.Connect, 1, n(10, 500), workload.Message)),
		latencies(pages, job(workload.HTTP, 1, n(2, 50), chunk)),
		rate(key{transfers, "guest to client"}, 1e6, job(workload.Source, 1, n(4<<20, 256<<20), chunk)),
		rate(key{transfers, "client to guest"}, 1e6, job(workload.Sink, 1, n(4<<20, 256<<20), chunk)),
	}
	for _, percent := range percents {
		j := job(workload.Differ, 8, n(100, 4000), workload.Message)
		j.Share = percent
		steps = append(steps, rate(key{divergence, share(percent)}, 1, j))
	}
	return steps
}

// carry does a job after a warm-up.
func (p *pair) carry(ctx context.Context, j workload.Job) (r workload.Result, instead string, err error) {
	warm := j
	warm.N = max(j.Conns, j.N/20)
	r, instead, err = p.do(ctx, warm)
	if err == nil && instead == "" {
		r, instead, err = p.do(ctx, j)
	}
	if err == nil && instead != "" {
		instead += "; " + p.trouble()
	}
	return r, instead, err
}

// dirty has the guest write to its memory from now on.
func (p *pair) dirty(ctx context.Context, rate int) (stalled string, err error) {
	_, stalled, err = p.do(ctx, workload.Job{Do: workload.Dirty, N: rate, Stall: 10 * time.Second, Limit: 10 * time.Second})
	return stalled, err
}

// pauses makes checkpoints, of an idle guest and of one that writes to its memory.
func pauses(o lab.Options, way string) []step {
	measure := func(group string, rate, n int, every time.Duration) step {
		held := key{group, way + ": output held, p50"}
		p50, p99 := key{group, way + ": guest's pause, p50"}, key{group, way + ": guest's pause, p99"}
		return step{group + ", " + way, []key{p50, p99, held}, func(ctx context.Context, p *pair, put put) (instead string, err error) {
			if instead, err = p.dirty(ctx, rate); err != nil || instead != "" {
				return instead, err
			}
			var paused, kept []float64
			for range n {
				if err := sleep(ctx, every); err != nil {
					return "", err
				}
				c, err := p.checkpoint(ctx)
				if err != nil {
					return "", err
				}
				paused, kept = append(paused, c.guest), append(kept, c.held)
			}
			slices.Sort(paused)
			slices.Sort(kept)
			put(p50, quantile(paused, 0.5), nil)
			put(p99, quantile(paused, 0.99), nil)
			if quantile(kept, 1) > 0 {
				put(held, quantile(kept, 0.5), nil)
			}
			return p.dirty(ctx, 0)
		}}
	}
	if o.Quick {
		return []step{measure(idle, 0, 3, 50*time.Millisecond), measure(busy, dirtyRate, 2, 250*time.Millisecond)}
	}
	return []step{measure(idle, 0, 40, 50*time.Millisecond), measure(busy, dirtyRate, 8, time.Second)}
}

// targeted watches the checkpoints that lockstep makes of itself, by its setting target_pause.
func targeted(o lab.Options) step {
	p50, p99, rate := key{target, "guest's pause, p50"}, key{target, "guest's pause, p99"}, key{target, "checkpoints"}
	settle, watch := 4*time.Second, 10*time.Second
	if o.Quick {
		settle, watch = time.Second, 2*time.Second
	}
	return step{target, []key{p50, p99, rate}, func(ctx context.Context, p *pair, put put) (instead string, err error) {
		if instead, err = p.dirty(ctx, dirtyRate); err != nil || instead != "" {
			return instead, err
		}
		if err := sleep(ctx, settle); err != nil {
			return "", err
		}
		began := time.Now()
		paused, err := p.periodic(ctx, watch)
		if err != nil {
			return "", err
		}
		if len(paused) == 0 {
			return fmt.Sprintf("no checkpoint in %v", watch), nil
		}
		slices.Sort(paused)
		put(p50, quantile(paused, 0.5), nil)
		put(p99, quantile(paused, 0.99), nil)
		put(rate, float64(len(paused))/time.Since(began).Seconds(), nil)
		return p.dirty(ctx, 0)
	}}
}

// gap has something die while a client has one request under way after the other.
func gap(o lab.Options, what string) step {
	k := key{failover, what}
	j := workload.Job{Do: workload.Echo, Conns: 1, N: 200_000, Stall: 20 * time.Second, Limit: 5 * time.Second}
	before := 1500 * time.Millisecond
	if o.Quick {
		j.Limit, before = 2*time.Second, 500*time.Millisecond
	}
	return step{failover + ", " + what, []key{k}, func(ctx context.Context, p *pair, put put) (string, error) {
		killed := make(chan error, 1)
		go func() {
			err := sleep(ctx, before)
			if err == nil {
				err = p.kill[what]()
			}
			killed <- err
		}()
		r, instead, err := p.do(ctx, j)
		if e := <-killed; e != nil {
			instead = strings.TrimPrefix(instead+"; the failover failed: "+e.Error(), "; ")
		}
		if err == nil && instead == "" {
			put(k, milliseconds(&r)[len(r.Took)-1], nil)
		}
		return instead, err
	}}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
