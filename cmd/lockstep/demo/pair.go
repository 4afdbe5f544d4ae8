// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
)

const (
	vm      = "web1"
	nodes   = "alpha beta"
	startUp = 2 * time.Minute // limits, on a machine that has other work
	goOn    = 30 * time.Second
)

// pairYAML is a config as a user has it: lockstep starts the QEMUs.
const pairYAML = `vm: ` + vm + `
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, bridge: br0, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, bridge: br0, peer: {device: peerS}}]}
pin_dir: bpf/lockstep
run_dir: run
state_dir: state
tls: {ca: certs/ca.pem, cert: "certs/{node}.pem", key: "certs/{node}.key"}
arbiter: {type: file, path: %q}
migration: {unix: migration.sock}
qemu:
  binary: %q
  accel: tcg
  cpu: qemu64
  memory: %dK
  smp: 1
  kernel: %q
  initrd: %q
  append: %q
  macs: [%q]
  disks: [{id: colo-disk0, image: "{node}.qcow2", overlay_dir: "overlays-{node}"}]
  extra: [-serial, %q]
`

// pair is two hosts, their daemons and a client.
type pair struct {
	*lab.World
	o       Options
	file    string // the config
	config  *config.Config
	daemons map[string]*lab.Process // by node
	closers []func() error
}

// newPair makes hosts, images and config, and starts nothing.
func newPair(o Options) (p *pair, err error) {
	p = &pair{o: o, daemons: make(map[string]*lab.Process)}
	if p.World, err = lab.NewHosts(); err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.World.Close)
	p.file = filepath.Join(p.Dir, "pair.yaml")
	for _, step := range []func() error{
		func() error { return p.HostP.Veth("portS", p.HostS, "uplink") },
		func() error { return p.HostP.Enslave("portS", "br0") },
		func() error { return p.HostS.Enslave("uplink", "br0") },
		p.describe,
		p.pins,
	} {
		if err := step(); err != nil {
			return nil, errors.Join(err, p.close())
		}
	}
	return p, nil
}

func (p *pair) in(name string) string { return filepath.Join(p.Dir, name) }

// describe writes the config and what it names.
func (p *pair) describe() error {
	for _, dir := range []string{"arbiter", "run", "bpf"} {
		if err := os.Mkdir(p.in(dir), 0o700); err != nil {
			return fmt.Errorf("make a folder: %w", err)
		}
	}
	for node := range strings.FieldsSeq(nodes) {
		if err := guestimage.Disk(p.in(node+".qcow2"), 64<<20, false); err != nil {
			return err
		}
	}
	if err := guestimage.Build(p.in("initrd"), p.o.Guest, guestimage.Guest{Service: p.o.Lockstep, Args: []string{"demo", ServeCommand}, Env: []string{"GODEBUG=asyncpreemptoff=1"}}); err != nil {
		return err
	}
	preload, err := guestimage.Preload(p.Dir)
	if err != nil {
		return err
	}
	// A QEMU that lockstep started outlives its daemon, but not the demo, however that ends.
	script := fmt.Sprintf("#!/bin/sh\n(while kill -0 $$; do kill -0 %d || kill -9 $$; sleep 1; done) </dev/null >/dev/null 2>&1 &\n%s exec '%s' \"$@\"\n",
		os.Getpid(), preload, strings.ReplaceAll(p.o.QEMU, "'", `'\''`))
	if err := os.WriteFile(p.in("qemu"), []byte(script), 0o700); err != nil {
		return fmt.Errorf("make a script: %w", err)
	}
	line := guestimage.Append([]string{lab.GuestIP.String() + "/24"}, "ipv6.disable_ipv6=1")
	text := fmt.Sprintf(pairYAML, p.in("arbiter"), p.in("qemu"), guestimage.Memory>>10, guestimage.Kernel(p.o.Guest), p.in("initrd"), line, lab.GuestMAC,
		"file:"+p.in("{node}.serial"))
	if err := os.WriteFile(p.file, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the pair's config: %w", err)
	}
	if p.config, err = config.Load(p.file); err != nil {
		return fmt.Errorf("read the pair's config: %w", err)
	}
	_, err = p.HostP.Output(p.o.Lockstep, "keys", "-c", p.file, "-d", p.in("certs"))
	return err
}

// pins mounts a bpffs, not in a mount namespace of its own: a daemon refuses one that init does not see.
func (p *pair) pins() error {
	if err := unix.Mount("bpf", p.in("bpf"), "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs: %w", err)
	}
	p.closers = append(p.closers, func() error {
		if err := unix.Unmount(p.in("bpf"), 0); err != nil {
			return fmt.Errorf("unmount %s: %w", p.in("bpf"), err)
		}
		return nil
	})
	return nil
}

// host is a node's namespace.
func (p *pair) host(node string) *lab.NS {
	if node == "alpha" {
		return p.HostP
	}
	return p.HostS
}

func other(node string) string {
	if node == "alpha" {
		return "beta"
	}
	return "alpha"
}

// run starts a node's daemon. It ends, and leaves nothing in the kernel, with the pair.
func (p *pair) run(node, role string) (err error) {
	_, again := p.daemons[node]
	if p.daemons[node], err = p.host(node).Start(exec.Command(p.o.Lockstep, "run", "-c", p.file, "--node", node, "--role", role)); err != nil || again {
		return err
	}
	p.closers = append(p.closers, func() error {
		_, err := p.host(node).Output(p.o.Lockstep, "unload", "--force", "-c", p.file, "--node", node)
		return err
	})
	return nil
}

// close ends everything, at whatever state it is.
func (p *pair) close() error {
	// Both daemons first: what is left would take over from what ends next.
	for _, d := range p.daemons {
		d.Kill()
	}
	var err error
	for node := range p.daemons {
		err = errors.Join(err, p.killQEMU(node))
	}
	return errors.Join(err, lab.Undo(p.closers))
}

// await waits until a node's status is as wanted.
func (p *pair) await(ctx context.Context, node string, limit time.Duration, want func(*api.Status) bool) error {
	err := lab.Eventually(ctx, limit, p.daemons[node], func() error {
		s, err := p.status(ctx, node)
		if err == nil && !want(&s) {
			err = fmt.Errorf("its state is %q, covered: %v; %s", s.State, s.Covered, s.Detail)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for lockstep on %s: %w", node, err)
	}
	return nil
}

func (p *pair) status(ctx context.Context, node string) (api.Status, error) {
	return api.FetchStatus(ctx, p.config.Socket(node))
}

// covered waits until the pair replicates and either host may die.
func (p *pair) covered(ctx context.Context) error {
	for node := range strings.FieldsSeq(nodes) {
		if err := p.await(ctx, node, startUp, func(s *api.Status) bool { return s.State == "replicating" && s.Covered }); err != nil {
			return err
		}
	}
	return nil
}

// qemu is a node's; the error is qemu.ErrNotRunning where there is none. Who asks releases it.
func (p *pair) qemu(node string) (*qemu.Process, error) {
	return qemu.Find(&qemu.Spec{VM: vm, Node: node, Dir: p.in("run")})
}

// killQEMU ends a node's QEMU at once; nothing, when there is none.
func (p *pair) killQEMU(node string) error {
	q, err := p.qemu(node)
	if errors.Is(err, qemu.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer q.Release()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return q.Kill(ctx)
}

// dial connects from the client's namespace. The connection ends with ctx: a guest that is dead just then
// would keep who waits for its answer.
func (p *pair) dial(ctx context.Context, port string) (net.Conn, error) {
	var c net.Conn
	err := p.Client.Do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(lab.GuestIP.String(), port))
		return err
	})
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { c.Close() })
	return c, nil
}

// answers waits until both guests answer alike. Under emulation an SVM that got its first checkpoint
// early in its boot now and then never sends; it is given up and replaced.
func (p *pair) answers(ctx context.Context) error {
	err := lab.Eventually(ctx, startUp, p.daemons["alpha"], func() error {
		before, err := p.status(ctx, "alpha")
		if err != nil {
			return err
		}
		c, err := p.dial(ctx, portEcho)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		for i := range 5 {
			if err := echo(c, i); err != nil {
				return err
			}
		}
		s, err := p.status(ctx, "alpha")
		if err == nil && s.CheckpointsRequested != before.CheckpointsRequested {
			err = fmt.Errorf("the guests do not answer alike yet: %v", s.Causes)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("wait until the guest answers: %w", err)
	}
	return p.covered(ctx)
}
