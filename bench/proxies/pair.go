// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"context"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

const pairYAML = `vm: bench
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
` + lab.PairConfig

// lockstepPair runs two daemons.
func lockstepPair(ctx context.Context, w *world, bin string) (*proxy, error) {
	pair, err := lab.StartPair(ctx, w.dir, bin, pairYAML, w.hostP, w.hostS)
	if err != nil {
		return nil, err
	}
	return &proxy{onP: pair.P, onS: pair.S, stop: pair.Stop, frames: func() (frames, error) {
		s, err := pair.Status(context.Background(), "alpha")
		return frames{held: s.Counters["held"], released: s.ReleasedPackets}, err
	}}, nil
}
