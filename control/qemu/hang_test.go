// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hurry shortens the timeouts.
func hurry(t *testing.T) {
	t.Helper()
	p, s := storageTimeout, startTimeout
	storageTimeout, startTimeout = 200*time.Millisecond, 500*time.Millisecond
	t.Cleanup(func() { storageTimeout, startTimeout = p, s })
}

// script makes a shell script and returns its path.
func script(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestHangs: programs and storage that do not answer are given up, at a guest's start and
// elsewhere. The error names them and what to do.
func TestHangs(t *testing.T) {
	hurry(t)
	dir := t.TempDir()
	hangs := script(t, dir, "hangs", "sleep 1000 & sleep 1000")
	script(t, dir, "qemu-img", "sleep 1000 & sleep 1000")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	spec := func(image string) *Spec {
		return &Spec{
			VM: "web1", Node: "alpha",
			Guest: Guest{
				Binary: hangs, Machine: "pc", Accel: "tcg", CPU: "qemu64", Memory: 1 << 30, SMP: 1, NICModel: "virtio-net-pci",
				Disks: []Disk{{ID: "d0", Image: image, OverlayDir: dir}},
			},
			NICs: []NIC{{Tap: "lo", MAC: net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}}}, QMP: filepath.Join(dir, "qmp"), Dir: dir,
		}
	}
	want := func(err error, words ...string) {
		t.Helper()
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("no %q in: %v", w, err)
			}
		}
	}
	began := time.Now()
	s := spec(image)
	want(s.Check(nil, nil), "`"+hangs+" -accel help` does not end", "run it by hand", "disk d0: `qemu-img info", "is the storage there")
	_, err := s.DiskSizes()
	want(err, "disk d0: `qemu-img info", "does not end")
	_, err = Start(t.Context(), s, &Incoming{Migration: "unix:" + filepath.Join(dir, "mig")})
	want(err, "disk d0: `qemu-img info", "does not end")
	// Opening a FIFO blocks until somebody opens it for writing.
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	want(onStorage(pipe, func() error { _, err := os.ReadFile(pipe); return err }), pipe+" cannot be opened", "is the storage there")
	w, err := os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	// A QEMU whose monitor never answers.
	script(t, dir, "qemu-img", "exit 0")
	s.Disks = nil
	s.Binary = script(t, dir, "mute", `case "$*" in *help*) echo "pc-i440fx-7.2 x (default)"; exit;; esac; sleep 1000`)
	_, err = Start(t.Context(), s, nil)
	want(err, "monitor does not answer: not within 500ms")
	if _, err := Find(s); !errors.Is(err, ErrNotRunning) {
		t.Errorf("it still runs: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("all of it took %v", took)
	}
}
