// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/engines"
	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/proxies"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

const (
	heldInFlood = 64 // connections that are open meanwhile
	afterFlood  = 5000
	// A session outlives the pause of the primary's daemon.
	patient = "heartbeat: {interval: 50ms, timeout: 20s, lease: 10s, restart: 20s}"
)

// ring measures what happens to the ring while nobody reads it: the primary's daemon is stopped, SYNs come of
// more connections than it has room for, and 64 connections that are open go on. There are slots enough, or
// these would be gone first.
func (b *bench) ring(ctx context.Context) error {
	floods := []int{10_000, 60_000, 240_000}
	if b.o.Quick {
		floods = []int{1000}
	}
	for _, n := range floods {
		for round := range b.fewRounds() {
			b.progress(fmt.Sprintf("%s SYNs while nobody reads the ring, round %d of %d", count(n), round+1, b.fewRounds()))
			if err := b.flooded(ctx, n); err != nil {
				return fmt.Errorf("%s SYNs while nobody reads the ring: %w", count(n), err)
			}
		}
	}
	return nil
}

func (b *bench) flooded(ctx context.Context, n int) (err error) {
	w, err := lab.NewWorld(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Start(1); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop()) }()
	slots := 1 << 17
	if b.o.Quick {
		slots = 1 << 14
	}
	p, err := startPlain(ctx, w, b.o.Lockstep, fmt.Sprintf("compare: {timeout: 10s, slots: %d, max_connections: 262144}\n%s", slots, patient))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	h := &holding{w: w, proxy: &proxies.Proxy{OnP: p.P, OnS: p.S}}
	job := workload.Job{Do: workload.Hold, Conns: opening, N: heldInFlood, Size: workload.Message, Stall: 5 * time.Second, Limit: 30 * time.Second}
	if r, err := h.do(ctx, job); err != nil || r.Done < job.N {
		return fmt.Errorf("%d of %d connections stand: %w", r.Done, job.N, err)
	}
	before, err := p.Status(ctx, "alpha")
	if err != nil {
		return err
	}
	if err := syscall.Kill(p.P.PID(), syscall.SIGSTOP); err != nil {
		return fmt.Errorf("stop the primary's daemon: %w", err)
	}
	goOn := func() error { return syscall.Kill(p.P.PID(), syscall.SIGCONT) }
	if err := w.Client.Do(func() error { return flood(w.Client, n) }); err != nil {
		return errors.Join(err, goOn())
	}
	type end struct {
		r   *outcome
		err error
	}
	done := make(chan end, 1)
	go func() {
		job := workload.Job{Do: workload.Pick, Conns: heldInFlood, N: afterFlood, Size: workload.Message, Stall: 10 * time.Second, Limit: 30 * time.Second}
		r, err := h.do(ctx, job)
		done <- end{r, err}
	}()
	time.Sleep(100 * time.Millisecond) // until each of the connections has an answer in the ring, or not
	if err := goOn(); err != nil {
		return fmt.Errorf("have the primary's daemon go on: %w", err)
	}
	e := <-done
	if e.err != nil {
		return e.err
	}
	after, err := p.Status(ctx, "alpha")
	if err != nil {
		return err
	}
	at := func(name, unit string, less bool) report.Case {
		return figure("nobody reads the ring: "+name, unit, less, n, "SYNs")
	}
	const others = "it has no ring"
	b.alone(at("frames that half a ring refused", "", true), float64(after.Counters["crowded"]-before.Counters["crowded"]), others)
	b.alone(at("frames that a whole ring refused", "", true), float64(after.Counters["no_ring"]-before.Counters["no_ring"]), others)
	b.alone(at("frames without a slot", "", true), float64(after.Counters["no_slot"]-before.Counters["no_slot"]), others)
	b.alone(at("exchanges on open connections that arrived", "%", false), 100*float64(e.r.Done)/afterFlood, others)
	b.alone(at("slowest of these", "ms", true), percentile(e.r.Took, 1)/1e3, others)
	return nil
}

// flood sends SYNs from a namespace's eth0, of as many connections as there are ports, and again.
func flood(ns *lab.NS, n int) error {
	dev, err := ns.Device("eth0")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a packet socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("set PACKET_VNET_HDR: %w", err)
	}
	to := &unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: unix.ETH_P_IP >> 8}
	for i := range n {
		port := uint16(1024 + i%60_000)
		if err := unix.Sendto(fd, engines.SYN(port, workload.Port, uint32(i)<<8), 0, to); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("send a SYN: %w", err)
		}
	}
	return nil
}
