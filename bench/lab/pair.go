// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
)

// PairConfig is what every pair's config ends with. It has no QEMU: the guests differ in nothing, so no
// checkpoint is needed.
const PairConfig = `tls: {insecure: true}
pin_dir: bpf/lockstep
run_dir: run
`

// Pair is two daemons: alpha, which began as primary, and beta, as secondary.
type Pair struct {
	P, S *Process

	bin, file string
	config    *config.Config
	abandoned bool
	closers   []func() error
}

// StartPair starts both daemons and waits until they replicate. dir is a folder for their files, with
// a short path; text is their config, which is to end with [PairConfig].
func StartPair(ctx context.Context, dir, bin, text string, onP, onS *NS) (*Pair, error) {
	p := &Pair{bin: bin, file: filepath.Join(dir, "pair.yaml")}
	if err := p.start(ctx, dir, text, onP, onS); err != nil {
		return nil, errors.Join(err, p.Stop())
	}
	return p, nil
}

func (p *Pair) start(ctx context.Context, dir, text string, onP, onS *NS) (err error) {
	if err := os.WriteFile(p.file, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the pair's config: %w", err)
	}
	if p.config, err = config.Load(p.file); err != nil {
		return fmt.Errorf("read the pair's config: %w", err)
	}
	// Not in a mount namespace of its own: a daemon refuses a bpffs that init does not see.
	pins := filepath.Join(dir, "bpf")
	if err := os.MkdirAll(pins, 0o700); err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	if err := unix.Mount("bpf", pins, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs: %w", err)
	}
	p.closers = append(p.closers, func() error {
		if err := unix.Unmount(pins, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", pins, err)
		}
		return nil
	})
	if p.P, err = p.run(onP, "alpha", "primary"); err != nil {
		return err
	}
	if p.S, err = p.run(onS, "beta", "secondary"); err != nil {
		return err
	}
	for node, d := range map[string]*Process{"alpha": p.P, "beta": p.S} {
		if err := Eventually(ctx, 20*time.Second, d, func() error { return p.replicates(ctx, node) }); err != nil {
			return fmt.Errorf("start lockstep on %s: %w", node, err)
		}
	}
	return nil
}

// run starts a daemon. What it leaves in the kernel goes with the pair.
func (p *Pair) run(ns *NS, node, role string) (*Process, error) {
	d, err := ns.Start(exec.Command(p.bin, "run", "-c", p.file, "--node", node, "--role", role))
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, func() error {
		unload := []string{"unload", "-c", p.file, "--node", node}
		var stopped error
		if p.abandoned {
			d.Kill()
			unload = append(unload, "--force")
		} else {
			stopped = d.Stop()
		}
		_, err := ns.Output(p.bin, unload...)
		return errors.Join(stopped, err)
	})
	return d, nil
}

// Abandon has Stop kill the daemons and take away what they left by force, as after a takeover.
func (p *Pair) Abandon() { p.abandoned = true }

// Stop ends the daemons and takes what they left out of the kernel.
func (p *Pair) Stop() error {
	closers := p.closers
	p.closers = nil
	return Undo(closers)
}

// Status is that of a node's daemon.
func (p *Pair) Status(ctx context.Context, node string) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return api.FetchStatus(ctx, p.Socket(node))
}

// Socket is that of a node's daemon.
func (p *Pair) Socket(node string) string { return p.config.Socket(node) }

func (p *Pair) replicates(ctx context.Context, node string) error {
	s, err := p.Status(ctx, node)
	if err == nil && s.State != "replicating" {
		err = fmt.Errorf("its state is %q: %s", s.State, s.Detail)
	}
	return err
}

// Undo calls the functions, the last one first.
func Undo(closers []func() error) (err error) {
	for _, f := range slices.Backward(closers) {
		err = errors.Join(err, f())
	}
	return err
}

// Eventually waits until f has no error. It gives up after limit, and when p has ended.
func Eventually(ctx context.Context, limit time.Duration, p *Process, f func() error) error {
	deadline, tick := time.NewTimer(limit), time.NewTicker(20*time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.Ended():
			return fmt.Errorf("it ended: %w; its log:\n%s", err, p.Log())
		case <-deadline.C:
			return fmt.Errorf("not within %v: %w; its log:\n%s", limit, err, p.Log())
		}
	}
}

// Output is what a command of this machine prints in the namespace.
func (n *NS) Output(name string, args ...string) (text string, err error) {
	var out []byte
	err = n.Do(func() error {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
