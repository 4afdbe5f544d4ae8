// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"errors"
	"math"
	"slices"

	"github.com/digitalocean/go-qemu/qmp/raw"
)

// noPeriod is x-checkpoint-delay's maximum, 49 days: QEMU makes no
// checkpoint of its own (R12).
const noPeriod = math.MaxUint32

// Status returns whether the guest runs, and QEMU's name for its state ("running",
// "io-error" …).
func (m *Monitor) Status() (running bool, state string, err error) {
	// raw.QueryStatus would fail on states that a newer QEMU may add.
	var s struct {
		Running bool
		Status  string
	}
	err = m.Execute("query-status", nil, &s)
	return s.Running, s.Status, err
}

// COLO returns the COLO mode: "primary", "secondary" or "none".
func (m *Monitor) COLO() (mode string, err error) {
	var s struct{ Mode string }
	err = m.Execute("query-colo-status", nil, &s)
	return s.Mode, err
}

// Checkpoint makes a primary in COLO take a checkpoint now: QEMU does so when the period
// is set. The period set is so long that QEMU takes none of its own (R12).
func (m *Monitor) Checkpoint() error {
	delay := int64(noPeriod)
	return raw.NewMonitor(m).MigrateSetParameters(&raw.MigrateSetParameters{XCheckpointDelay: &delay})
}

// Link is a connection of QEMU's that [Monitor.Yank] can close (a yank instance).
type Link struct {
	Type string `json:"type"`                // "migration", "block-node", "chardev"
	Node string `json:"node-name,omitempty"` // a block-node's
	ID   string `json:"id,omitempty"`        // a chardev's
}

// Links returns QEMU's connections that can be closed.
func (m *Monitor) Links() (links []Link, err error) {
	err = m.outOfBand("query-yank", nil, &links)
	return links, err
}

// Yank closes the connections of QEMU's for which which returns true. What waits for the
// other end fails then, so that a QEMU that hangs because the other host is gone goes on.
// It works while another command hangs.
func (m *Monitor) Yank(which func(Link) bool) error {
	var err error
	for range 3 { // yank fails if a connection has closed since query-yank
		links, lost := m.Links()
		if lost != nil {
			return lost
		}
		links = slices.DeleteFunc(links, func(l Link) bool { return !which(l) })
		if len(links) == 0 {
			return nil
		}
		err = m.outOfBand("yank", map[string][]Link{"instances": links}, nil)
		var refused *Error
		if !errors.As(err, &refused) {
			break
		}
	}
	return err
}
