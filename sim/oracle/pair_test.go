// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// A heartbeat or an echo that comes late on a busy machine is no failure here.
const pairConfig = `vm: oracle
nodes:
  alpha: {control: "127.0.0.1:7700", nics: [{tap: tapP, peer: {device: peerP}}], qmp: primary.qmp}
  beta:  {control: "127.0.0.2:7700", nics: [{tap: tapS, peer: {device: peerS}}], qmp: secondary.qmp}
tls: {insecure: true}
heartbeat: {interval: 50ms, timeout: 1m, lease: 1m}
checkpoint: {period: 24h, min_interval: 1ms, periodic_above: 0}
pin_dir: bpf/lockstep
run_dir: run
compare: {%s}
`

// pair is two lockstep daemons in a network namespace, with QEMUs whose monitors are
// played. The guests' taps and the client, a third one in the PVM's bridge, are held by
// the test as a QEMU would hold them.
type pair struct {
	ns      *lab.NS
	qemus   *qmptest.Pair
	daemons []*lab.Process
	socket  string // of the primary's daemon
	pins    string // a bpffs; "": not mounted
	undo    []func() error

	markers     int
	asked, done uint64 // checkpoints

	mu     sync.Mutex
	taps   map[who]*os.File
	events []event
	passed map[who][]byte // the newest marker that reached each
}

// newPair starts it. settings are those of the config's section compare.
func newPair(ctx context.Context, binary, dir, settings string) (_ *pair, err error) {
	p := &pair{taps: make(map[who]*os.File), passed: make(map[who][]byte)}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if p.ns, err = lab.NewNS(); err != nil {
		return nil, err
	}
	for of, name := range map[who]string{pvm: "tapP", svm: "tapS", client: "client"} {
		if p.taps[of], err = p.ns.Tap(name); err != nil {
			return nil, err
		}
		if err = unix.SetNonblock(int(p.taps[of].Fd()), true); err != nil {
			return nil, err
		}
	}
	err = errors.Join(p.ns.Bridge("br0"), p.ns.Enslave("tapP", "br0"), p.ns.Enslave("client", "br0"), p.ns.Veth("peerP", p.ns, "peerS"))
	if err != nil {
		return nil, err
	}
	if p.qemus, err = qmptest.NewPair(dir); err != nil {
		return nil, err
	}
	pins, file := filepath.Join(dir, "bpf"), filepath.Join(dir, "pair.yaml")
	if err := errors.Join(os.Mkdir(pins, 0o700), os.WriteFile(file, fmt.Appendf(nil, pairConfig, settings), 0o600)); err != nil {
		return nil, err
	}
	if err := unix.Mount("bpf", pins, "bpf", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a bpffs: %w", err)
	}
	p.pins = pins
	c, err := config.Load(file)
	if err != nil {
		return nil, err
	}
	p.socket = c.Socket("alpha")
	for node, role := range map[string]string{"alpha": "primary", "beta": "secondary"} {
		d, err := p.ns.Start(exec.Command(binary, "run", "-c", file, "--node", node, "--role", role))
		if err != nil {
			return nil, err
		}
		p.daemons = append(p.daemons, d)
		p.undo = append(p.undo, func() error {
			err := d.Stop()
			unload := exec.Command(binary, "unload", "--force", "-c", file, "--node", node)
			return errors.Join(err, p.ns.Do(func() error { return unload.Run() }))
		})
	}
	err = p.until("the pair does not replicate", func() (bool, error) {
		s, err := api.FetchStatus(ctx, p.socket)
		p.asked, p.done = s.CheckpointsRequested, s.CheckpointsDone
		return err == nil && s.State == "replicating" && s.QMP.Connected && s.Counters["echo_in"] > 0, nil
	})
	if err != nil {
		return nil, err
	}
	// Before QEMU is stopped nothing leaves any more.
	p.qemus.SetHook(func(s qmptest.Stage) bool {
		if s == qmptest.SecondaryStop {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.drain()
			p.events = append(p.events, event{})
		}
		return true
	})
	return p, p.settle()
}

func (p *pair) close() error {
	var errs []error
	for _, f := range p.undo {
		errs = append(errs, f())
	}
	if p.qemus != nil {
		errs = append(errs, p.qemus.Close())
	}
	for _, t := range p.taps {
		errs = append(errs, t.Close())
	}
	if p.pins != "" {
		errs = append(errs, unix.Unmount(p.pins, unix.MNT_DETACH))
	}
	if p.ns != nil {
		p.ns.Close()
	}
	return errors.Join(errs...)
}

// logs is what the daemons have logged.
func (p *pair) logs() (all string) {
	for _, d := range p.daemons {
		all += d.Log()
	}
	return all
}

// running reports whether somebody may send: a guest that stands still does not.
func (p *pair) running(from who) bool {
	switch from {
	case pvm:
		return p.qemus.Primary.Running()
	case svm:
		return p.qemus.Secondary.Running()
	}
	return true
}

func (p *pair) send(from who, frame []byte) error {
	if err := p.until("the guest stands still", func() (bool, error) { return p.running(from), nil }); err != nil {
		return err
	}
	return p.write(from, frame)
}

func (p *pair) write(from who, frame []byte) error {
	for {
		_, err := unix.Write(int(p.taps[from].Fd()), frame)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// drain reads what has come; called under mu.
func (p *pair) drain() {
	buf := make([]byte, 70<<10)
	for of, tap := range p.taps {
		for {
			n, err := unix.Read(int(tap.Fd()), buf)
			if err != nil || n <= 0 {
				break
			}
			switch f := bytes.Clone(buf[:n]); {
			case isMarker(f):
				p.passed[of] = f
			case of != pvm: // what the PVM receives is the client's
				p.events = append(p.events, event{of, f})
			}
		}
	}
}

// until reads the taps until cond holds.
func (p *pair) until(what string, cond func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; {
		p.mu.Lock()
		p.drain()
		ok, err := cond()
		p.mu.Unlock()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s; the daemons say:\n%s", what, p.logs())
		}
		var fds []unix.PollFd
		for _, t := range p.taps {
			fds = append(fds, unix.PollFd{Fd: int32(t.Fd()), Events: unix.POLLIN})
		}
		_, _ = unix.Poll(fds, 5) // or it is looked again earlier
	}
}

// barrier sends frames behind all others, and returns when they have come through: both
// guests' to the client, and the client's to the SVM. A checkpoint may swallow what the SVM sends and
// receives, not what the PVM sends; a second one of that would wait for the SVM in vain.
func (p *pair) barrier() error {
	for _, way := range []struct {
		once bool
		from who
		to   who
	}{{true, svm, client}, {false, client, svm}} {
		p.markers++
		m := marker(way.from, markerPort, p.markers)
		if way.once {
			if err := p.send(pvm, m); err != nil {
				return err
			}
		}
		var again time.Time
		err := p.until("nothing passes lockstep any more", func() (bool, error) {
			passed := bytes.Equal(p.passed[way.to], m)
			if passed || time.Now().Before(again) || !p.running(way.from) {
				return passed, nil
			}
			again = time.Now().Add(50 * time.Millisecond)
			return false, p.write(way.from, m)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *pair) settle() error {
	for {
		if err := p.barrier(); err != nil {
			return err
		}
		s, err := p.status()
		if err != nil {
			return err
		}
		if s.CheckpointsRequested == p.asked && s.CheckpointsDone == p.done && s.State == "replicating" {
			return nil
		}
		// One that is asked for during a checkpoint follows it a millisecond later.
		calm := 0
		err = p.until("the checkpoint that was asked for is not made", func() (bool, error) {
			s, err := p.status()
			if err != nil {
				return false, err
			}
			calm++
			if s.CheckpointsRequested > p.asked && s.CheckpointsDone == p.done || s.State != "replicating" {
				calm = 0
			}
			if s.CheckpointsDone > p.done {
				p.asked, p.done, calm = s.CheckpointsRequested, s.CheckpointsDone, 1
			}
			return calm > 3, nil
		})
		if err != nil {
			return err
		}
	}
}

func (p *pair) status() (api.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return api.FetchStatus(ctx, p.socket)
}

func (p *pair) checkpoint() error {
	ordered := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, err := api.OrderCheckpoint(ctx, p.socket)
		ordered <- err
	}()
	err := p.until("the checkpoint that was ordered is not made", func() (bool, error) {
		select {
		case err := <-ordered:
			return true, err
		default:
			return false, nil
		}
	})
	return errors.Join(err, p.settle())
}

func (p *pair) take() []event {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drain()
	e := p.events
	p.events = nil
	return e
}
