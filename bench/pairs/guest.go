// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/workload"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// guest is what all pairs boot.
type guest struct {
	dir, kernel, initrd string
	qemu                string // a script that starts QEMU with what it needs under TCG
	lockstep            string
}

// newGuest makes the guest's image; close removes it.
func newGuest(o lab.Options) (g *guest, err error) {
	g = &guest{kernel: guestimage.Kernel(o.Guest), lockstep: o.Lockstep}
	if g.dir, err = os.MkdirTemp("", "lsg"); err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
			g = nil
		}
	}()
	self, err := os.Executable()
	if err != nil {
		return g, fmt.Errorf("look up this program: %w", err)
	}
	g.initrd, g.qemu = filepath.Join(g.dir, "initrd"), filepath.Join(g.dir, "qemu")
	if err := guestimage.Build(g.initrd, o.Guest, guestimage.Guest{Service: self, Args: []string{"bench", "act", lab.Service, strconv.Itoa(workload.Port)}}); err != nil {
		return g, err
	}
	preload, err := guestimage.Preload(g.dir)
	if err != nil {
		return g, err
	}
	if err := os.WriteFile(g.qemu, []byte(script(o.QEMU, preload, os.Getpid())), 0o700); err != nil {
		return g, fmt.Errorf("make a script: %w", err)
	}
	return g, nil
}

// script starts QEMU with an environment variable. A QEMU that lockstep started outlives its daemon, but not
// the benchmark, the process owner, however that ends.
func script(qemu, env string, owner int) string {
	return fmt.Sprintf(`#!/bin/sh
(while kill -0 $$; do kill -0 %d || kill -9 $$; sleep 1; done) </dev/null >/dev/null 2>&1 &
%s exec '%s' "$@"
`, owner, env, strings.ReplaceAll(qemu, "'", `'\''`))
}

func (g *guest) close() error { return os.RemoveAll(g.dir) }

// command line of the guest's kernel. Without IPv6 the guest sends nothing unasked; colo-compare
// would not compare it.
func (g *guest) command(more ...string) string {
	return guestimage.Append([]string{lab.GuestIP.String() + "/24"}, append(more, "ipv6.disable_ipv6=1")...)
}

// world is two hosts, whose bridges are joined, so that the client reaches the guest on
// either.
type world struct {
	*lab.World
	guest *guest
}

func (g *guest) world() (w *world, err error) {
	w = &world{guest: g}
	if w.World, err = lab.NewHosts(); err != nil {
		return nil, err
	}
	for _, step := range []func() error{
		func() error { return w.HostP.Veth("portS", w.HostS, "uplink") },
		func() error { return w.HostP.Enslave("portS", "br0") },
		func() error { return w.HostS.Enslave("uplink", "br0") },
		func() error { return w.StartClient(workload.Port) },
	} {
		if err := step(); err != nil {
			return nil, errors.Join(err, w.close())
		}
	}
	return w, nil
}

func (w *world) close() error { return errors.Join(w.Stop(), w.Close()) }

// do has the client do a job. stalled says why it did not come to its end.
func (w *world) do(ctx context.Context, j workload.Job) (r workload.Result, stalled string, err error) {
	if j.Size == 0 {
		j.Size = workload.Message
	}
	r, err = w.Clients[0].Do(ctx, &j, func() {})
	if err == nil && r.Stalled != "" {
		stalled = fmt.Sprintf("%s after %d of %d in %v", r.Stalled, r.Done, j.N, r.Wall.Round(time.Millisecond))
	}
	return r, stalled, err
}

// How long a guest may take under emulation, on a machine that has other work.
const (
	bootTime  = time.Minute
	startTime = time.Minute
)

// booted waits until a guest's service is there, by its serial console.
func (w *world) booted(ctx context.Context, node string, p *lab.Process) error {
	err := lab.Eventually(ctx, bootTime, p, func() error {
		b, err := os.ReadFile(w.serial(node))
		if err == nil && !bytes.Contains(b, []byte("ready\r\n")) {
			err = fmt.Errorf("its console says: %.1000s", b)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("boot the guest on %s: %w", node, err)
	}
	return nil
}

// answers waits until the guest answers requests.
func (w *world) answers(ctx context.Context, p *lab.Process, ok func() error) error {
	err := lab.Eventually(ctx, startTime, p, func() error {
		_, stalled, err := w.do(ctx, workload.Job{Do: workload.Echo, Conns: 1, N: 20, Stall: 4 * time.Second, Limit: 4 * time.Second})
		if err == nil && stalled != "" {
			err = errors.New(stalled)
		}
		if err != nil {
			return err
		}
		return ok()
	})
	if err != nil {
		return fmt.Errorf("wait until the guest answers: %w", err)
	}
	return nil
}

func (w *world) serial(node string) string { return filepath.Join(w.Dir, node+".serial") }

// vm is a QEMU that the benchmark starts itself.
type vm struct {
	*lab.Process
	*monitor
}

// start starts a QEMU with a tap in the host's bridge.
func (w *world) start(ctx context.Context, ns *lab.NS, node string, append string, more ...string) (*vm, error) {
	socket, tap := filepath.Join(w.Dir, node+".qmp"), "tap"+node
	args := []string{
		"-name", node, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-accel", "tcg", "-cpu", "qemu64",
		"-m", fmt.Sprintf("%dK", guestimage.Memory>>10), "-smp", "1", "-kernel", w.guest.kernel, "-initrd", w.guest.initrd, "-append", append,
		"-serial", "file:" + w.serial(node), "-qmp", "unix:" + socket + ",server=on,wait=off",
		"-netdev", "tap,id=hn0,vhost=off,script=no,downscript=no,ifname=" + tap,
		"-device", "virtio-net-pci,id=e0,netdev=hn0,mac=" + lab.GuestMAC.String(),
	}
	p, err := ns.Start(exec.Command(w.guest.qemu, slices.Concat(args, more)...))
	if err != nil {
		return nil, err
	}
	v := &vm{Process: p}
	err = lab.Eventually(ctx, 20*time.Second, p, func() (err error) {
		v.monitor, err = dial(ctx, socket)
		return err
	})
	if err == nil {
		err = errors.Join(ns.Up(tap), ns.Enslave(tap, "br0"))
	}
	if err != nil {
		p.Kill()
		return nil, fmt.Errorf("start QEMU on %s: %w", node, err)
	}
	return v, nil
}

// monitor is QEMU's, and how long the guest stood still at each checkpoint.
type monitor struct {
	*qmp.Monitor
	mu     sync.Mutex
	pauses []time.Duration
}

func dial(ctx context.Context, socket string) (*monitor, error) {
	q, err := qmp.Dial(ctx, socket, 10*time.Second)
	if err != nil {
		return nil, err
	}
	m := &monitor{Monitor: q}
	events, err := q.Events(ctx)
	if err != nil {
		return nil, err
	}
	go func() {
		var stopped time.Time
		for e := range events {
			switch e.Event {
			case "STOP":
				stopped = qmp.Time(e)
			case "RESUME":
				m.mu.Lock()
				m.pauses = append(m.pauses, qmp.Time(e).Sub(stopped))
				m.mu.Unlock()
			}
		}
	}()
	return m, nil
}

// paused are the pauses so far.
func (m *monitor) paused() []time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pauses
}

// all executes commands in turn; each is a name and its arguments.
func (m *monitor) all(commands ...command) error {
	for _, c := range commands {
		if err := m.Execute(c.name, c.args, nil); err != nil {
			return err
		}
	}
	return nil
}

type command struct {
	name string
	args any
}

type object map[string]any
