// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/program"
)

// wellFormed matches what QEMU accepts as an ID.
var wellFormed = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,30}$`)

// Check returns, before anything is started, everything that would keep the guest from
// starting: as a primary, or with in as a secondary. peer are the sizes of the
// other host's disks in bytes ([Spec.DiskSizes]); nil: not known.
func (s *Spec) Check(in *Incoming, peer []int64) error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }

	if _, err := exec.LookPath(s.Binary); err != nil {
		bad("QEMU: %w; install it (Debian: qemu-system-x86) or give another binary", err)
	} else if err := s.checkAccel(); err != nil {
		errs = append(errs, err)
	}
	if s.Memory < 1<<20 || s.Memory%1024 != 0 {
		bad("memory: %d bytes are not whole KiB, one MiB at least", s.Memory)
	}
	if s.SMP < 1 {
		bad("smp: a guest needs a CPU")
	}
	for _, f := range []string{s.Kernel, s.Initrd} {
		if f == "" {
			continue
		}
		if _, err := stat(f); err != nil {
			bad("boot file: %w", err)
		}
	}
	for _, n := range s.NICs {
		if len(n.MAC) != 6 || n.MAC[0]&1 != 0 {
			bad("NIC on %s: %q is no unicast MAC address", n.Tap, n.MAC)
		}
		if _, err := net.InterfaceByName(n.Tap); err != nil {
			bad("NIC: there is no tap %s: %w", n.Tap, err)
		}
		if n.VHost {
			if f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0); err != nil {
				bad("NIC on %s: vhost: %w; load the kernel's module vhost_net, or leave vhost out", n.Tap, err)
			} else {
				f.Close()
			}
		}
	}
	if _, err := CheckExtra(s.Extra); err != nil && !s.foreign {
		bad("extra: %w", err)
	}
	if c, err := net.DialTimeout("unix", s.QMP, storageTimeout); err == nil {
		c.Close()
		bad("a QEMU answers at %s already: stop it, or name the socket as the node's qmp to attach to it", s.QMP)
	} else if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.EAGAIN) {
		bad("a process listens at %s already and accepts no connection: stop it, or name another run_dir", s.QMP)
	}
	if p, err := Find(s); err == nil {
		bad("guest %s runs on this host already, as process %d", s.VM, p.Pid())
		p.Release()
	}
	errs = append(errs, s.checkDisks(in != nil, peer)...)
	if err := checkUser(s.User, s.Disks, in != nil); err != nil {
		errs = append(errs, err)
	}
	if in != nil {
		if err := checkIncoming(in, len(s.Disks) > 0); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Spec) checkAccel() error {
	name, _, _ := strings.Cut(s.Accel, ",")
	known, err := s.ask(context.Background(), "-accel", "help")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(known), name) {
		return fmt.Errorf("accel: %s has no accelerator %q", s.Binary, name)
	}
	if name == "kvm" {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("accel: kvm: %w; without it only tcg, emulation, is left", err)
		}
		f.Close()
	}
	return nil
}

func (s *Spec) checkDisks(secondary bool, peer []int64) []error {
	if len(s.Disks) == 0 && len(peer) == 0 {
		return nil
	}
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if peer != nil && len(peer) != len(s.Disks) {
		bad("disks: %d here, and %d on the other host", len(s.Disks), len(peer))
		peer = nil
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		bad("disks: %w; install it (Debian: qemu-utils)", err)
		return errs
	}
	seen := make(map[string]bool)
	for i := range s.Disks {
		d := &s.Disks[i]
		if !wellFormed.MatchString(d.ID) || seen[d.ID] {
			bad("disk %q: an ID is a letter and up to 30 letters, digits, '.', '_' or '-', and no other disk's", d.ID)
		}
		seen[d.ID] = true
		if f := d.format(); f != "qcow2" && f != "raw" {
			bad("disk %s: format %q is neither qcow2 nor raw", d.ID, f)
			continue
		}
		if err := onStorage(d.Image, func() error { return opens(d.Image) }); err != nil {
			bad("disk %s: image: %w", d.ID, err)
			continue
		}
		size, err := d.size(false)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if peer != nil && size != peer[i] {
			bad("disk %s: image %s has %d bytes, and the other host's has %d: they must be of one size", d.ID, d.Image, size, peer[i])
		}
		if !secondary {
			continue
		}
		if info, err := stat(d.OverlayDir); err == nil && !info.IsDir() {
			bad("disk %s: overlay_dir %s is no folder", d.ID, d.OverlayDir)
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) { // Start makes it
			bad("disk %s: overlay_dir: %w", d.ID, err)
		}
	}
	return errs
}

// onStorage runs f, which accesses path, and returns an error when the storage does not
// answer in time.
func onStorage(path string, f func() error) error {
	ctx, done := context.WithTimeout(context.Background(), storageTimeout)
	defer done()
	err := program.Within(ctx, path, f)
	if errors.Is(err, program.ErrGivenUp) {
		return fmt.Errorf("%s cannot be opened: %w; is the storage there that it is on?", path, err)
	}
	return err
}

func stat(path string) (info fs.FileInfo, err error) {
	var found fs.FileInfo
	err = onStorage(path, func() (err error) { found, err = os.Stat(path); return err })
	if err == nil {
		info = found // f may still write to found after an error
	}
	return info, err
}

func opens(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// checkIncoming checks that the secondary can listen there.
func checkIncoming(in *Incoming, disks bool) error {
	var errs []error
	listen := func(what, addr string) {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w; free the port, or configure another one", what, err))
			return
		}
		l.Close()
	}
	switch kind, addr, _ := strings.Cut(in.Migration, ":"); kind {
	case "tcp":
		listen("migration port", addr)
	case "unix":
		if _, err := os.Stat(filepath.Dir(addr)); err != nil {
			errs = append(errs, fmt.Errorf("migration socket: %w", err))
		}
	default:
		errs = append(errs, fmt.Errorf("migration: %q is neither tcp:HOST:PORT nor unix:PATH", in.Migration))
	}
	if disks {
		if in.NBD.IsValid() {
			listen("NBD port", in.NBD.String())
		} else {
			errs = append(errs, errors.New("the disks need an NBD port"))
		}
	}
	return errors.Join(errs...)
}
