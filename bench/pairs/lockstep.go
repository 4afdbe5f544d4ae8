// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
)

// vmName is the guest's.
const vmName = "web1"

// pairYAML is a config as a user has it: lockstep starts the QEMUs.
const pairYAML = `vm: ` + vmName + `
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, bridge: br0, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, bridge: br0, peer: {device: peerS}}]}
pin_dir: bpf/lockstep
run_dir: run
state_dir: state
tls: {ca: certs/ca.pem, cert: "certs/{node}.pem", key: "certs/{node}.key"%s}
arbiter: {type: file, path: %q}
%s
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
  extra: [-serial, %q]
%s`

// diskYAML is a disk that the guest does not use.
const diskYAML = `  disks: [{id: colo-disk0, image: "{node}.qcow2", overlay_dir: "overlays-{node}"}]
`

// settings are what pairs of lockstep differ in.
type settings struct {
	clear bool   // the QEMUs' connections are not under TLS
	disk  bool   // the guest has one
	more  string // of the config
}

// lockstep is a pair that lockstep starts.
func lockstep(s settings) func(context.Context, *world) (*pair, error) {
	return func(ctx context.Context, w *world) (*pair, error) {
		l := &living{world: w}
		err := l.start(ctx, s)
		if err != nil {
			return nil, errors.Join(err, l.stop())
		}
		return &pair{world: w, trouble: l.trouble, stop: l.stop, checkpoint: l.checkpoint, periodic: l.periodic, kill: map[string]func() error{
			primaryQEMU:   func() error { return l.killQEMU("alpha") },
			secondaryQEMU: func() error { return l.killQEMU("beta") },
			primaryHost: func() error {
				l.killed = true
				l.daemons.P.Kill()
				return l.killQEMU("alpha")
			},
		}}, nil
	}
}

// living is a pair of daemons with QEMUs that they started.
type living struct {
	*world
	daemons *lab.Pair
	killed  bool // something was: the daemons need not end well
}

func (l *living) start(ctx context.Context, s settings) (err error) {
	for _, dir := range []string{"arbiter", "run"} {
		if err := os.Mkdir(filepath.Join(l.Dir, dir), 0o700); err != nil {
			return fmt.Errorf("make a folder: %w", err)
		}
	}
	tls, disk := "", ""
	if s.clear {
		tls = ", qemu: false"
	}
	if s.disk {
		disk = diskYAML
		for _, node := range []string{"alpha", "beta"} {
			if err := guestimage.Disk(filepath.Join(l.Dir, node+".qcow2"), 64<<20, false); err != nil {
				return err
			}
		}
	}
	text := fmt.Sprintf(pairYAML, tls, filepath.Join(l.Dir, "arbiter"), s.more, l.guest.qemu, guestimage.Memory>>10, l.guest.kernel, l.guest.initrd, l.guest.command(),
		lab.GuestMAC, "file:"+l.serial("{node}"), disk)
	file := filepath.Join(l.Dir, "pair.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the pair's config: %w", err)
	}
	if _, err := l.HostP.Output(l.guest.lockstep, "keys", "-c", file, "-d", filepath.Join(l.Dir, "certs")); err != nil {
		return err
	}
	if l.daemons, err = lab.StartPair(ctx, l.Dir, l.guest.lockstep, text, l.HostP, l.HostS); err != nil {
		return err
	}
	for node, d := range map[string]*lab.Process{"alpha": l.daemons.P, "beta": l.daemons.S} {
		if err := lab.Eventually(ctx, startTime, d, func() error { return l.covered(ctx, node) }); err != nil {
			return fmt.Errorf("wait until %s is covered: %w", node, err)
		}
	}
	if err := l.booted(ctx, "alpha", l.daemons.P); err != nil {
		return err
	}
	// Under emulation an SVM that got its first checkpoint early in its boot now and then never transmits. It
	// is replaced.
	asked := uint64(0)
	return l.answers(ctx, l.daemons.P, func() error {
		status, err := l.daemons.Status(ctx, "alpha")
		if err != nil {
			return err
		}
		if before := asked; before != status.CheckpointsRequested {
			asked = status.CheckpointsRequested
			return fmt.Errorf("the guests do not answer alike yet: %v", status.Causes)
		}
		return errors.Join(l.covered(ctx, "alpha"), l.covered(ctx, "beta"))
	})
}

func (l *living) covered(ctx context.Context, node string) error {
	s, err := l.daemons.Status(ctx, node)
	if err == nil && (s.State != "replicating" || !s.Covered) {
		err = fmt.Errorf("its state is %q, covered: %v: %s", s.State, s.Covered, s.Detail)
	}
	return err
}

func (l *living) checkpoint(ctx context.Context) (pause, error) {
	c, err := api.OrderCheckpoint(ctx, l.daemons.Socket("alpha"))
	return pause{guest: c.PVMPauseMS, held: c.FrozenMS}, err
}

func (l *living) periodic(ctx context.Context, watch time.Duration) (paused []float64, err error) {
	const often = 200 * time.Millisecond // status has the last checkpoints only
	var last uint32
	for i := range int(watch/often) + 1 {
		s, err := l.daemons.Status(ctx, "alpha")
		if err != nil {
			return nil, err
		}
		for _, c := range s.Checkpoints {
			if c.Epoch <= last || c.Result != "committed" {
				continue
			}
			last = c.Epoch
			if i > 0 {
				paused = append(paused, c.PVMPauseMS)
			}
		}
		if err := sleep(ctx, often); err != nil {
			return nil, err
		}
	}
	return paused, nil
}

func (l *living) trouble() (text string) {
	for _, node := range []string{"alpha", "beta"} {
		s, err := l.daemons.Status(context.Background(), node)
		if err != nil {
			text += fmt.Sprintf("; %s: %v", node, err)
			continue
		}
		text += fmt.Sprintf("; %s is %s %s, %d checkpoints requested, %d done", node, s.State, s.Detail, s.CheckpointsRequested, s.CheckpointsDone)
		if n := len(s.Causes); n > 0 {
			text += ", the last because of " + s.Causes[n-1].Reason
		}
	}
	return text[2:]
}

// killQEMU ends a node's QEMU at once; nothing, when there is none.
func (l *living) killQEMU(node string) error {
	l.killed = true
	p, err := qemu.Find(&qemu.Spec{VM: vmName, Node: node, Dir: filepath.Join(l.Dir, "run")})
	if errors.Is(err, qemu.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Release()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return p.Kill(ctx)
}

// stop ends everything. A guest would go on without its daemon.
func (l *living) stop() (err error) {
	killed := l.killed
	if l.daemons != nil {
		for _, d := range []*lab.Process{l.daemons.S, l.daemons.P} {
			if killed { // what is left would take over from what ends next
				d.Kill()
			} else {
				err = errors.Join(err, d.Stop())
			}
		}
	}
	err = errors.Join(err, l.killQEMU("beta"), l.killQEMU("alpha"))
	if l.daemons == nil {
		return err
	}
	if killed {
		l.daemons.Abandon()
	}
	return errors.Join(err, l.daemons.Stop())
}
