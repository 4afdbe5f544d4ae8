// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// pair is a variant that runs.
type pair struct {
	*world
	// checkpoint makes one; nil: there are none.
	checkpoint func(context.Context) (pause, error)
	// periodic watches those that the variant makes by itself: ms of P's guest's pauses.
	periodic func(context.Context, time.Duration) ([]float64, error)
	// kill has something die, and does what an operator would have to do then.
	kill    map[string]func() error
	trouble func() string // what it reports when a job stalls
	stop    func() error
}

// pause is what a checkpoint cost, in milliseconds.
type pause struct {
	guest float64 // P's stood still
	held  float64 // nothing left P; 0: not known
}

// What may die.
const (
	primaryQEMU   = "primary's QEMU dies"
	secondaryQEMU = "secondary's QEMU dies"
	primaryHost   = "primary's host dies"
)

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// alone is one guest without COLO.
func alone(ctx context.Context, w *world) (*pair, error) {
	v, err := w.start(ctx, w.HostP, "P", w.guest.command())
	if err != nil {
		return nil, err
	}
	p := &pair{world: w, trouble: func() string { return lab.Short(v.Log()) }, stop: func() error { v.Kill(); return nil }}
	if err = w.booted(ctx, "P", v.Process); err == nil {
		err = w.answers(ctx, v.Process, func() error { return nil })
	}
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// colo is QEMU's own pair, diskless. The checkpoints go to where a migration's URI says.
func colo(to func(*world) string) func(context.Context, *world) (*pair, error) {
	return func(ctx context.Context, w *world) (_ *pair, err error) {
		var vms []*vm
		stop := func() error {
			for _, v := range vms {
				v.Kill() // it has nothing to tidy up
			}
			return nil
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, stop())
			}
		}()
		proxy := lab.Filters{Netdev: "hn0", Host: lab.ControlP, Dir: w.Dir, VNetHdr: true}
		start := func(ns *lab.NS, node string, more ...string) (*vm, error) {
			// filter-rewriter does not translate TCP's timestamps.
			v, err := w.start(ctx, ns, node, w.guest.command("sysctl.net.ipv4.tcp_timestamps=0"), more...)
			if err == nil {
				vms = append(vms, v)
			}
			return v, err
		}
		p, err := start(w.HostP, "P", proxy.Primary()...)
		if err != nil {
			return nil, err
		}
		s, err := start(w.HostS, "S", append(proxy.Secondary(), "-incoming", to(w))...)
		if err != nil {
			return nil, err
		}
		if err := w.booted(ctx, "P", p.Process); err != nil {
			return nil, err
		}
		capable := command{"migrate-set-capabilities", object{"capabilities": []object{{"capability": "x-colo", "state": true}}}}
		if err := errors.Join(s.all(capable), p.all(capable, command{"migrate", object{"uri": to(w)}})); err != nil {
			return nil, fmt.Errorf("begin COLO: %w", err)
		}
		for _, v := range []*vm{p, s} {
			err := lab.Eventually(ctx, 30*time.Second, v.Process, func() error {
				mode, err := v.COLO()
				if err != nil {
					return err
				}
				running, state, err := v.Status()
				if err == nil && (mode == "none" || !running) {
					err = fmt.Errorf("its state is %q, its COLO mode %q", state, mode)
				}
				return err
			})
			if err != nil {
				return nil, fmt.Errorf("begin COLO: %w", err)
			}
		}
		out := &pair{world: w, stop: stop}
		out.trouble = func() string {
			return fmt.Sprintf("%d checkpoints by then; QEMU on P says: %s; on S: %s", len(p.paused()), said(p), said(s))
		}
		out.checkpoint = func(ctx context.Context) (pause, error) { return p.checkpoint(ctx) }
		out.kill = map[string]func() error{
			secondaryQEMU: func() error {
				s.Kill()
				return p.all(remove("comp0"), remove("iothread1"), remove("m0"), remove("redire0"), remove("redire1"), lost)
			},
			primaryQEMU: func() error {
				p.Kill()
				return s.all(lost, remove("f2"), remove("f1"),
					command{"chardev-remove", object{"id": "red1"}}, command{"chardev-remove", object{"id": "red0"}})
			},
		}
		return out, w.answers(ctx, p.Process, func() error { return nil })
	}
}

// lost has the QEMU that is left go on alone. QEMU has no heartbeat: somebody has to find out, and say so.
var lost = command{"x-colo-lost-heartbeat", nil}

func remove(id string) command { return command{"object-del", object{"id": id}} }

// said is what QEMU's log begins with; "nothing" without one.
func said(v *vm) string {
	if s := lab.Short(v.Log()); s != "" {
		return s
	}
	return "nothing"
}

// checkpoint has QEMU make one, and waits for its end.
func (v *vm) checkpoint(ctx context.Context) (pause, error) {
	before := len(v.paused())
	const delay = 20_000 // ms, QEMU's default: setting it makes a checkpoint
	if err := v.all(command{"migrate-set-parameters", object{"x-checkpoint-delay": delay}}); err != nil {
		return pause{}, err
	}
	var d time.Duration
	err := lab.Eventually(ctx, 10*time.Second, v.Process, func() error {
		all := v.paused()
		if len(all) == before {
			return errors.New("the guest was not stopped and started again")
		}
		d = all[before]
		return nil
	})
	if err != nil {
		return pause{}, fmt.Errorf("checkpoint: %w", err)
	}
	return pause{guest: ms(d)}, nil
}

// Where the second QEMU listens for the first one's checkpoints.
func overTCP(*world) string { return fmt.Sprintf("tcp:%s:9998", lab.ControlS) }

func overUnix(w *world) string { return "unix:" + filepath.Join(w.Dir, "migration") }
