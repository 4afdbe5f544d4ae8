// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// pair is two daemons whose QEMUs are played: they go through a checkpoint at once, and copy nothing. So what
// a checkpoint takes is lockstep's own part. Afterwards the SVM is not the PVM's copy.
type pair struct {
	*lab.Pair
	qemu *qmptest.Pair
}

// startPlain starts a pair without QEMUs: the checkpoints that it asks for are counted, and not made. settings are
// lines of its config.
func startPlain(ctx context.Context, w *lab.World, bin, settings string) (*lab.Pair, error) {
	dir, err := os.MkdirTemp(w.Dir, "p")
	if err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	return lab.StartPair(ctx, dir, bin, w.PairConfig("", "")+settings+"\n"+lab.PairConfig, w.HostP, w.HostS)
}

// startPair starts a pair. settings are lines of its config.
func startPair(ctx context.Context, w *lab.World, bin, settings string) (_ *pair, err error) {
	p := new(pair)
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Stop())
		}
	}()
	dir, err := os.MkdirTemp(w.Dir, "p")
	if err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	if p.qemu, err = qmptest.NewPair(dir); err != nil {
		return nil, fmt.Errorf("play two QEMUs: %w", err)
	}
	config := w.PairConfig(p.qemu.Primary.Path(), p.qemu.Secondary.Path()) + `state_dir: state
arbiter: {type: file, path: ` + dir + `}
checkpoint: {period: 1h}
` + settings + "\n" + lab.PairConfig
	if p.Pair, err = lab.StartPair(ctx, dir, bin, config, w.HostP, w.HostS); err != nil {
		return nil, err
	}
	for node, d := range map[string]*lab.Process{"alpha": p.P, "beta": p.S} {
		if err := lab.Eventually(ctx, 20*time.Second, d, func() error {
			s, err := p.Status(ctx, node)
			if err == nil && !s.Covered {
				err = fmt.Errorf("no checkpoint covers it (%s: %s)", s.State, s.Detail)
			}
			return err
		}); err != nil {
			return nil, fmt.Errorf("start lockstep on %s: %w", node, err)
		}
	}
	return p, nil
}

// Stop ends the daemons first: they would wait for their QEMUs.
func (p *pair) Stop() (err error) {
	if p.Pair != nil {
		err = p.Pair.Stop()
	}
	if p.qemu != nil {
		err = errors.Join(err, p.qemu.Close())
	}
	return err
}
