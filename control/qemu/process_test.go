// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/qemu"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// A QEMU is found again by a later daemon, and another process is not taken for it.
func TestProcess(t *testing.T) {
	w := newWorld(t, 0)
	g := w.start("a", false)
	found, err := qemu.Find(g.spec)
	if err != nil || found.Pid() != g.p.Pid() || !found.Alive() {
		t.Fatalf("found %+v, %v", found, err)
	}
	lt.In(t, w.ns("a"), func() {
		if _, err := qemu.Start(t.Context(), g.spec, nil); err == nil || !strings.Contains(err.Error(), "runs on this host already") {
			t.Errorf("started twice: %v", err)
		}
	})
	g.kill()
	<-found.Done()
	if found.Alive() || g.p.Alive() {
		t.Error("alive after its death")
	}
	found.Release()
	if _, err := qemu.Find(g.spec); !errors.Is(err, qemu.ErrNotRunning) {
		t.Errorf("the dead was found: %v", err)
	}
	// The pid file may name another process by now.
	pid := filepath.Join(g.spec.Dir, g.spec.VM+"-"+g.spec.Node+".pid")
	for _, is := range []string{fmt.Sprint(os.Getpid()), "", "x", "-1", "999999999"} {
		if err := os.WriteFile(pid, []byte(is+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := qemu.Find(g.spec); !errors.Is(err, qemu.ErrNotRunning) {
			t.Errorf("pid file %q: %v", is, err)
		}
	}
	for device, says := range map[string]string{"no-such-device": "no-such-device", "usb-mtp,rootdir=/": "not migratable"} {
		bad := *g.spec
		bad.Extra = []string{"-device", "usb-ehci", "-device", device}
		if _, err := qemu.Start(t.Context(), &bad, nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("QEMU's own words about %s are missing: %v", device, err)
		}
	}
}
