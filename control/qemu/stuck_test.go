// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// TestStuckMigration: a QEMU whose last migration never ended would refuse another, so no
// disk is copied for it. A real QEMU gets there by a deadlock, which no test can cause.
func TestStuckMigration(t *testing.T) {
	s, err := qmptest.Listen(filepath.Join(t.TempDir(), "qmp"), "none")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetReply("query-migrate", `"return": {"status": "failed"}`)
	s.SetReply("query-yank", `"return": [{"type": "migration"}]`)
	s.SetReply("yank", `"return": {}`)
	m, err := qmp.Dial(t.Context(), s.Path(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Disconnect()
	to := qemu.Incoming{Migration: "unix:/nowhere", NBD: netip.MustParseAddrPort("192.0.2.1:9")}
	disks := []qemu.Disk{{ID: "colo-disk0"}}
	if err := qemu.Replicate(t.Context(), m, qemu.Caps{Disks: true}, disks, to, qemu.Options{Resync: true}); !errors.Is(err, qemu.ErrStuck) {
		t.Errorf("got %v", err)
	}
	var asked []string
	for _, r := range s.Requests() {
		asked = append(asked, r.Execute)
	}
	if !slices.Contains(asked, "yank") || slices.Contains(asked, "migrate") || slices.Contains(asked, "blockdev-add") {
		t.Errorf("it was asked %q", asked)
	}
}
