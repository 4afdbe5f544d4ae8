// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// guest is one QEMU on one host.
type guest struct {
	w    *world
	host string
	spec *qemu.Spec
	in   *qemu.Incoming
	p    *qemu.Process
	m    *qmp.Monitor
	caps qemu.Caps

	resumes atomic.Int32
	stopped chan struct{} // a STOP came
	halted  atomic.Int64  // the longest time from STOP to RESUME, ns
}

// start starts a guest on host, as a primary or as a secondary.
func (w *world) start(host string, secondary bool) *guest {
	t := w.t
	t.Helper()
	g := &guest{w: w, host: host, spec: w.spec(host)}
	if secondary {
		g.in = w.incoming(host)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	disks, in := g.spec.Disks, g.in
	if w.seed {
		if secondary { // its command line says where it waits, before anything else is known
			clear := *in
			clear.TLS, in = nil, &clear
		}
		g.spec.Extra, g.spec.Disks = append(g.spec.Extra, w.seedDrives(host, secondary)...), nil
		qemu.Foreign(g.spec)
	}
	lt.In(t, w.ns(host), func() {
		sizes, err := g.spec.DiskSizes()
		if err == nil {
			err = g.spec.Check(g.in, sizes)
		}
		if err == nil {
			g.p, err = qemu.Start(ctx, g.spec, in)
		}
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
	})
	g.spec.Disks = disks
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(w.serial(host))
			t.Logf("QEMU on %s: %s\nconsole: %s", host, qemu.Log(g.spec), b)
		}
		g.kill()
		g.p.Release()
	})
	g.dial()
	return g
}

func (g *guest) dial() {
	t := g.w.t
	t.Helper()
	var err error
	if g.m, err = qmp.Dial(t.Context(), g.spec.QMP, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.m.Disconnect() })
	events, err := g.m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.stopped = make(chan struct{}, 1)
	go func() {
		var at time.Time
		for e := range events {
			switch e.Event {
			case "RESUME":
				g.resumes.Add(1)
				g.halted.Store(max(g.halted.Load(), int64(qmp.Time(e).Sub(at))))
			case "STOP":
				at = qmp.Time(e)
				select {
				case g.stopped <- struct{}{}:
				default:
				}
			}
		}
	}()
	if g.caps, err = qemu.Probe(g.m); err != nil {
		t.Fatal(err)
	}
}

// drainStops forgets the STOPs so far.
func (g *guest) drainStops() {
	select {
	case <-g.stopped:
	default:
	}
}

func freeze(g *guest) {
	g.w.t.Helper()
	if err := unix.Kill(g.p.Pid(), unix.SIGSTOP); err != nil {
		g.w.t.Fatal(err)
	}
}

// halts begins to measure how long the guest is stopped. longest returns the longest stop
// since.
func (g *guest) halts() (longest func() time.Duration) {
	g.halted.Store(0)
	return func() time.Duration { return time.Duration(g.halted.Load()) }
}

func (g *guest) kill() {
	g.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := g.p.Kill(ctx); err != nil {
		g.w.t.Error(err)
	}
}

// replicate starts a secondary on host and replicates g to it.
func (g *guest) replicate(host string, o qemu.Options) *guest {
	t := g.w.t
	t.Helper()
	s := g.w.start(host, true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for range 2 { // a repetition changes nothing
		if err := qemu.PrepareSecondary(ctx, s.m, s.caps, s.spec.Disks, *s.in); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	for range 2 {
		if err := g.replicateTo(ctx, g.w.to(g.host, s.in), o); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s replicates to %s after %v", g.host, host, time.Since(began).Round(time.Millisecond))
	return s
}

// replicateTo is [qemu.Replicate] on g's host.
func (g *guest) replicateTo(ctx context.Context, to qemu.Incoming, o qemu.Options) (err error) {
	lt.In(g.w.t, g.w.ns(g.host), func() { err = qemu.Replicate(ctx, g.m, g.caps, g.spec.Disks, to, o) })
	return err
}

// checkpoint makes one and waits for it.
func (g *guest) checkpoint() {
	t := g.w.t
	t.Helper()
	before := g.resumes.Load()
	if err := qemu.Checkpoint(g.m, g.spec.Disks); err != nil {
		t.Fatal(err)
	}
	lt.Eventually(t, time.Minute, func() (bool, string) {
		return g.resumes.Load() > before, "no RESUME after the order for a checkpoint"
	})
}

// takeOver has g go on without the other host, as a primary or as a secondary.
func (g *guest) takeOver() {
	t := g.w.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	for range 2 {
		failover := qemu.PrimaryFailover
		if g.in != nil {
			failover = qemu.SecondaryFailover
		}
		if err := failover(ctx, g.m, g.spec.Disks); err != nil {
			t.Fatal(err)
		}
	}
	g.in = nil // from here on it is the primary
	t.Logf("%s is alone after %v", g.host, time.Since(began).Round(time.Millisecond))
}

// ask sends a line to the guest over its host's tap.
func (g *guest) ask(line string) (string, error) {
	var answer string
	var err error
	lt.In(g.w.t, g.w.ns(g.host), func() {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", guestAddr+":7000", 20*time.Second); err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintln(c, line)
		answer, err = bufio.NewReader(c).ReadString('\n')
	})
	return strings.TrimSuffix(answer, "\n"), err
}

func (g *guest) mustAsk(line, want string) {
	g.w.t.Helper()
	if got, err := g.ask(line); err != nil || got != want {
		g.w.t.Fatalf("%s: %q answers %q, %v; want %q", g.host, line, got, err, want)
	}
}

func (g *guest) mustRead(disk string, block int, want string) {
	g.w.t.Helper()
	g.mustAsk(fmt.Sprintf("read %s %d", disk, block), want+" <nil>")
}

func (g *guest) mustWrite(disk string, block int, word string) {
	g.w.t.Helper()
	g.mustAsk(fmt.Sprintf("write %s %d %s", disk, block, word), "wrote <nil>")
}

// awaitMerged waits until a guest that took over has no overlays any more.
func (g *guest) awaitMerged() {
	g.w.t.Helper()
	lt.Eventually(g.w.t, time.Minute, func() (bool, string) {
		ok, err := qemu.Merged(g.m, g.spec.Disks)
		return ok, fmt.Sprint("not merged ", err)
	})
}
