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
func lockstepPair(ctx context.Context, w *lab.World, bin string) (*Proxy, error) {
	pair, err := lab.StartPair(ctx, w.Dir, bin, pairYAML, w.HostP, w.HostS)
	if err != nil {
		return nil, err
	}
	return &Proxy{OnP: pair.P, OnS: pair.S, Stop: pair.Stop, frames: func() (frames, error) {
		s, err := pair.Status(context.Background(), "alpha")
		return frames{held: s.Counters["held"], released: s.ReleasedPackets}, err
	}}, nil
}
