// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"context"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// lockstepPair runs two daemons.
func lockstepPair(ctx context.Context, w *lab.World, bin string) (*Proxy, error) {
	pair, err := lab.StartPair(ctx, w.Dir, bin, w.PairConfig("", "")+lab.PairConfig, w.HostP, w.HostS)
	if err != nil {
		return nil, err
	}
	return &Proxy{OnP: pair.P, OnS: pair.S, Stop: pair.Stop, frames: func() (frames, error) {
		s, err := pair.Status(context.Background(), "alpha")
		return frames{held: s.Counters["held"], released: s.Counters["released_out"]}, err
	}}, nil
}
