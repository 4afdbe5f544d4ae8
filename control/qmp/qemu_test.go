// SPDX-License-Identifier: Apache-2.0

package qmp_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestQEMU: a real QEMU accepts the commands and answers as expected.
func TestQEMU(t *testing.T) {
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		lt.Missing(t, "no QEMU to talk to: %v", err)
	}
	path := filepath.Join(t.TempDir(), "qmp")
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	// No guest software: the firmware finds nothing to boot and waits.
	cmd := exec.CommandContext(ctx, binary, "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "16M",
		"-qmp", "unix:"+path+",server=on,wait=off")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()

	var m *qmp.Monitor
	for {
		if m, err = qmp.Dial(ctx, path, long); err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) && !isRefused(err) {
			t.Fatal(err)
		}
		retry := time.NewTimer(10 * time.Millisecond)
		select {
		case <-retry.C:
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
	defer m.Disconnect()
	t.Log("QEMU", m.Version())

	if running, state, err := m.Status(); err != nil || !running || state != "running" {
		t.Errorf("status: %t, %q, %v", running, state, err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := m.PassFile("null", null); err != nil {
		t.Error(err)
	}
	for _, there := range []bool{true, false} { // it is closed once
		if err := m.Execute("closefd", map[string]string{"fdname": "null"}, nil); (err == nil) != there {
			t.Errorf("an open file that was passed, there %v: %v", there, err)
		}
	}
	if mode, err := m.COLO(); err != nil || mode != "none" {
		t.Errorf("colo: %q, %v", mode, err)
	}
	// Outside COLO setting the period is just that.
	if err := m.Checkpoint(); err != nil {
		t.Error(err)
	}
	var params struct {
		Delay uint32 `json:"x-checkpoint-delay"`
	}
	if err := m.Execute("query-migrate-parameters", nil, &params); err != nil || params.Delay != 1<<32-1 {
		t.Errorf("x-checkpoint-delay %d, %v", params.Delay, err)
	}
	var refused *qmp.Error
	if err := m.Execute("x-colo-lost-heartbeat", nil, nil); !errors.As(err, &refused) || refused.Class != "GenericError" {
		t.Errorf("x-colo-lost-heartbeat: %v", err)
	}
	if err := m.Execute("no-such-command", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("no-such-command: %v", err)
	}
	// The longest reply there is fits.
	if err := m.Execute("query-qmp-schema", nil, nil); err != nil {
		t.Error(err)
	}

	var links []qmp.Link
	if err := m.Yank(func(l qmp.Link) bool { links = append(links, l); return false }); err != nil {
		t.Error(err)
	}
	if len(links) != 1 || links[0].Type != "chardev" { // the monitor's own socket
		t.Errorf("connections that could be cut: %+v", links)
	}

	events, _ := m.Events(ctx)
	before := time.Now()
	var times []time.Time
	for _, c := range []struct{ command, event string }{{"stop", "STOP"}, {"cont", "RESUME"}} {
		if err := m.Execute(c.command, nil, nil); err != nil {
			t.Fatal(err)
		}
		for e := range events {
			if e.Event == c.event {
				times = append(times, qmp.Time(e))
				break
			}
		}
	}
	// QEMU's clock is the host's.
	if len(times) != 2 || times[0].Before(before.Add(-time.Millisecond)) || times[1].Before(times[0]) || times[1].After(time.Now()) {
		t.Errorf("asked at %v, STOP and RESUME at %v", before, times)
	}
}

func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
