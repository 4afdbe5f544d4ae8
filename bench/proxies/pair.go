// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
)

// pairYAML has no QEMU: the guests differ in nothing, so no checkpoint is needed.
const pairYAML = `vm: bench
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
tls: {insecure: true}
pin_dir: bpf/lockstep
run_dir: run
`

// lockstepPair runs two daemons.
func lockstepPair(ctx context.Context, w *world, bin string) (*proxy, error) {
	pair, err := newPair(w, bin)
	if err != nil {
		return nil, err
	}
	p := &proxy{stop: pair.stop, frames: pair.frames}
	for _, d := range []struct {
		ns         *lab.NS
		node, role string
		process    **lab.Process
	}{{w.hostP, "alpha", "primary", &p.onP}, {w.hostS, "beta", "secondary", &p.onS}} {
		if *d.process, err = pair.run(d.ns, d.node, d.role); err != nil {
			return nil, errors.Join(err, pair.stop())
		}
	}
	for node, process := range map[string]*lab.Process{"alpha": p.onP, "beta": p.onS} {
		if err := eventually(ctx, 20*time.Second, process, func() error { return pair.replicates(ctx, node) }); err != nil {
			return nil, errors.Join(fmt.Errorf("start lockstep on %s: %w", node, err), pair.stop())
		}
	}
	return p, nil
}

// pair is two daemons.
type pair struct {
	bin, file string
	config    *config.Config
	closers   []func() error
}

func newPair(w *world, bin string) (*pair, error) {
	p := &pair{bin: bin, file: filepath.Join(w.dir, "pair.yaml")}
	if err := os.WriteFile(p.file, []byte(pairYAML), 0o600); err != nil {
		return nil, fmt.Errorf("write the pair's config: %w", err)
	}
	c, err := config.Load(p.file)
	if err != nil {
		return nil, fmt.Errorf("read the pair's config: %w", err)
	}
	p.config = c
	pins := filepath.Join(w.dir, "bpf")
	if err := os.MkdirAll(pins, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	if err := unix.Mount("bpf", pins, "bpf", 0, ""); err != nil {
		return nil, fmt.Errorf("mount a bpffs: %w", err)
	}
	p.closers = append(p.closers, func() error {
		if err := unix.Unmount(pins, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", pins, err)
		}
		return nil
	})
	return p, nil
}

// run starts a daemon. What it leaves in the kernel goes with the pair.
func (p *pair) run(ns *lab.NS, node, role string) (*lab.Process, error) {
	d, err := ns.Start(exec.Command(p.bin, "run", "-c", p.file, "--node", node, "--role", role))
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, func() error {
		err := d.Stop()
		_, unload := output(ns, p.bin, "unload", "-c", p.file, "--node", node)
		return errors.Join(err, unload)
	})
	return d, nil
}

func (p *pair) stop() error { return undo(p.closers) }

func (p *pair) status(ctx context.Context, node string) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return api.FetchStatus(ctx, p.config.Socket(node))
}

func (p *pair) replicates(ctx context.Context, node string) error {
	s, err := p.status(ctx, node)
	if err == nil && s.State != "replicating" {
		err = fmt.Errorf("its state is %q: %s", s.State, s.Detail)
	}
	return err
}

// frames are P's counters.
func (p *pair) frames() (frames, error) {
	s, err := p.status(context.Background(), "alpha")
	return frames{held: s.Counters["held"], released: s.ReleasedPackets}, err
}

// output is what a command of this machine prints, in a namespace.
func output(ns *lab.NS, name string, args ...string) (text string, err error) {
	var out []byte
	err = ns.Do(func() error {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
