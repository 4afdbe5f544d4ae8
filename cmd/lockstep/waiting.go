// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/api"
)

// waiting is what a daemon shows that has no role yet.
type waiting struct{ status api.Status }

func (w waiting) Status(context.Context) (api.Status, error) { return w.status, nil }
func (w waiting) Flows(context.Context) ([]api.Flow, error)  { return []api.Flow{}, nil }

func (w waiting) Checkpoint(context.Context) (api.Checkpoint, error) {
	return api.Checkpoint{}, errors.New(w.status.Detail)
}

func (w waiting) Failover(context.Context, bool) (api.FailoverDone, error) {
	return api.FailoverDone{}, errors.New(w.status.Detail)
}

// showWaiting logs what a daemon without a role waits for, and shows it to `lockstep status`, until end is called. To
// systemd it is ready: else it would be ended after the unit's TimeoutStartSec.
func showWaiting(ctx context.Context, o runOptions, why string) (end func()) {
	o.log.Warn("waiting: " + why)
	control.Notify(o.log, sd.SdNotifyReady)
	ctx, cancel := context.WithCancel(ctx)
	l, err := api.Listen(ctx, o.config.Socket(o.self.Name))
	if err != nil {
		o.log.Warn("lockstep status does not show what is waited for", "err", err)
		return cancel
	}
	w := waiting{api.Status{VM: o.config.VM, Node: o.self.Name, Role: "no role yet", State: "waiting", Detail: why,
		Peer: api.PeerStatus{Node: o.other.Name, Insecure: o.config.TLS.Insecure}, QMP: api.QMPStatus{Configured: o.self.QMP != ""}}}
	served := make(chan error, 1)
	go func() { served <- api.Serve(ctx, l, w, o.log) }()
	return func() {
		cancel()
		if err := <-served; err != nil {
			o.log.Warn("lockstep status did not show what was waited for", "err", err)
		}
	}
}
