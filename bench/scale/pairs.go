// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/proxies"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

// pairsOnHosts measures what more than one pair on the same two hosts reach together. Each has its own guests, taps,
// bridges, peer link, daemons and client.
func (b *bench) pairsOnHosts(ctx context.Context) error {
	for _, n := range b.pairs {
		for round := range b.rounds {
			b.progress(fmt.Sprintf("%d pairs, round %d of %d", n, round+1, b.rounds))
			if err := b.onHosts(ctx, n); err != nil {
				return fmt.Errorf("%d pairs: %w", n, err)
			}
		}
	}
	return nil
}

// onHosts makes n pairs' worlds, and measures.
func (b *bench) onHosts(ctx context.Context, n int) (err error) {
	first, err := lab.NewWorld(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, first.Close()) }()
	worlds := []*lab.World{first}
	for len(worlds) < n {
		w, e := first.Beside(len(worlds))
		if e != nil {
			return fmt.Errorf("make the namespaces of pair %d: %w", len(worlds)+1, e)
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		worlds = append(worlds, w)
	}
	return b.sideBySide(ctx, worlds)
}

// sideBySide has a pair in each world, and their clients busy at the same time.
func (b *bench) sideBySide(ctx context.Context, worlds []*lab.World) (err error) {
	var all []*holding
	for _, w := range worlds {
		if err := w.Start(1); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.Stop()) }()
		p, err := startPlain(ctx, w, b.o.Lockstep, "compare: {timeout: 10s}")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		all = append(all, &holding{w: w, proxy: &proxies.Proxy{OnP: p.P, OnS: p.S}})
	}
	n, each := len(all), b.many/len(all)
	at := func(name, unit string, less bool) report.Case {
		return figure("pairs on two hosts: "+name, unit, less, n, "pairs")
	}
	const others = "measured of lockstep only"
	// At rest first: heartbeats, sweeps, and whatever else each pair does by itself.
	before, err := usageOf(all)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(b.idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := usageOf(all)
	if err != nil {
		return err
	}
	b.alone(at("CPU of all daemons while nothing is sent", "ms/s", true), float64(after-before)/1e6/time.Since(began).Seconds(), others)

	var clients sync.WaitGroup
	outcomes, errs := make([]*outcome, n), make([]error, n)
	began = time.Now()
	for i, h := range all {
		clients.Go(func() {
			outcomes[i], errs[i] = h.do(ctx, workload.Job{Do: workload.Echo, Conns: 64, N: each, Size: workload.Message, Stall: 5 * time.Second, Limit: 30 * time.Second})
		})
	}
	clients.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	took, done := time.Since(began), 0
	var cpu, daemons time.Duration
	for _, o := range outcomes {
		if o.Stalled != "" {
			return fmt.Errorf("a pair did %d of %d exchanges: %s", o.Done, each, o.Stalled)
		}
		done, cpu, daemons = done+o.Done, cpu+o.all, daemons+o.proxies
	}
	per := func(d time.Duration) float64 { return float64(d) / 1e3 / float64(done) }
	b.alone(at("exchanges of all, 64 connections each", "1/s", false), float64(done)/took.Seconds(), others)
	b.alone(at("CPU of an exchange, all parties", "µs", true), per(cpu), others)
	b.alone(at("CPU of an exchange, the daemons", "µs", true), per(daemons), others)
	var memory, maps int64
	for _, h := range all {
		for _, d := range []*lab.Process{h.proxy.OnP, h.proxy.OnS} {
			r, err := lab.Resident(d.PID())
			if err != nil {
				return err
			}
			m, err := lab.MapMemory(d.PID())
			if err != nil {
				return err
			}
			memory, maps = memory+r, maps+m
		}
	}
	b.alone(at("memory of all daemons", "MB", true), float64(memory)/mb, others)
	b.alone(at("kernel memory of all maps", "MB", true), float64(maps)/mb, others)
	return nil
}

// usageOf is the CPU time of all daemons.
func usageOf(all []*holding) (sum time.Duration, err error) {
	for _, h := range all {
		_, of, err := h.usage()
		if err != nil {
			return 0, err
		}
		sum += of
	}
	return sum, nil
}
