// SPDX-License-Identifier: Apache-2.0

// Package qemu is what lockstep does to a guest's QEMU: it starts the process,
// and takes it over QMP through COLO's procedures: replication of memory and
// disks to the secondary, both failovers, replication to a new secondary.
//
// It needs no QMP events, which are the daemon's to read: it asks for states
// until they are as wanted. Every step may be repeated, so that a daemon that
// was started again just does it again.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lockstep/control/program"
)

// Guest is what a guest is made of and run with.
type Guest struct {
	Binary  string // a path, or a name to look up in PATH
	Machine string
	Accel   string // "kvm" or "tcg", and QEMU's options behind a comma
	CPU     string
	Memory  int64 // bytes, whole KiB
	SMP     int

	Kernel, Initrd, Append string // Kernel "": the guest boots from its disks

	NICModel string // QEMU's device, "virtio-net-pci"
	Disks    []Disk

	Extra []string // further arguments, as they are
	User  string   // that QEMU becomes, a name or uid:gid; "": it stays what lockstep is
}

// Spec is one guest on one host.
type Spec struct {
	VM, Node string // name the files in Dir; Node is this host's
	Guest
	NICs []NIC
	Env  []string // QEMU's environment beside the daemon's, "NAME=value"

	mask bool // a mutation: only tests set it

	QMP string // path of the monitor's socket
	Dir string // pid file and log

	monitorObject bool // QEMU makes monitors as objects
}

// NIC is a guest NIC on a tap that exists.
type NIC struct {
	Tap string
	MAC net.HardwareAddr
}

// Disk is replicated: what the primary's guest writes goes to the images of
// both hosts.
type Disk struct {
	ID         string // the same on both hosts
	Image      string
	Format     string // "qcow2", which "" means too, or "raw". It is never guessed: a guest could write another format's header
	OverlayDir string // of the secondary's overlays, which hold what the guests write between checkpoints; best on a RAM disk
}

func (d *Disk) format() string {
	if d.Format == "" {
		return "qcow2"
	}
	return d.Format
}

// Incoming is where a secondary waits for its primary.
type Incoming struct {
	Migration string         // "tcp:HOST:PORT" or "unix:PATH"
	NBD       netip.AddrPort // of the disks, if there are any
}

// Names of block nodes. Those of the quorums are the disks' IDs. A QEMU that
// lockstep did not start needs "parentN" and the IDs.
func parentNode(i int) string { return fmt.Sprintf("parent%d", i) } // S: the image; also the NBD export
func activeNode(i int) string { return fmt.Sprintf("active%d", i) } // S: what the SVM wrote since the checkpoint
func hiddenNode(i int) string { return fmt.Sprintf("hidden%d", i) } // S: what the PVM overwrote since
func childNode(i int) string  { return fmt.Sprintf("childs%d", i) } // S: replication
func nbdNode(i int) string    { return fmt.Sprintf("nbd%d", i) }    // P: the secondary's image

func (s *Spec) file(ext string) string { return filepath.Join(s.Dir, s.VM+"-"+s.Node+ext) }

func (s *Spec) overlay(d *Disk, kind string) string {
	return filepath.Join(d.OverlayDir, s.VM+"-"+s.Node+"-"+d.ID+"-"+kind+".qcow2")
}

// args is QEMU's command line.
func (s *Spec) args(in *Incoming) ([]string, error) {
	a := []string{
		"-name", "guest=" + esc(s.VM), "-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on", "-only-migratable",
		"-no-shutdown", // a guest that powers off is told of to the other host first
		"-machine", s.Machine, "-accel", s.Accel, "-cpu", s.CPU, "-m", fmt.Sprintf("%dK", s.Memory>>10), "-smp", strconv.Itoa(s.SMP),
		"-pidfile", s.file(".pid"),
		"-chardev", "socket,id=lockstep,server=on,wait=off,path=" + esc(s.QMP),
	}
	if s.monitorObject {
		a = append(a, "-object", "monitor-qmp,id=lockstep-mon,chardev=lockstep")
	} else {
		a = append(a, "-mon", "chardev=lockstep,mode=control")
	}
	confined, err := s.confine()
	if err != nil {
		return nil, err
	}
	a = append(a, confined...)
	for _, o := range []struct{ flag, value string }{{"-kernel", s.Kernel}, {"-initrd", s.Initrd}, {"-append", s.Append}} {
		if o.value != "" {
			a = append(a, o.flag, o.value)
		}
	}
	for i, n := range s.NICs {
		a = append(a,
			"-netdev", fmt.Sprintf("tap,id=hn%d,ifname=%s,script=no,downscript=no", i, esc(n.Tap)),
			"-device", fmt.Sprintf("%s,id=e%d,netdev=hn%d,mac=%s", s.NICModel, i, i, n.MAC))
	}
	for i := range s.Disks {
		nodes, err := s.blockdevs(i, in != nil)
		if err != nil {
			return nil, err
		}
		for _, n := range nodes {
			b, err := json.Marshal(n)
			if err != nil {
				return nil, err
			}
			a = append(a, "-blockdev", string(b))
		}
		a = append(a, "-device", fmt.Sprintf("virtio-blk-pci,id=d%d,drive=%s,werror=stop,rerror=stop", i, s.Disks[i].ID))
	}
	if in != nil {
		a = append(a, "-incoming", in.Migration)
	} else {
		a = append(a, "-S")
	}
	return append(a, s.Extra...), nil
}

type node map[string]any

// blockdevs are a disk's nodes: a quorum (graph.go) over the image; on a secondary
// over replication over its overlays.
func (s *Spec) blockdevs(i int, secondary bool) ([]node, error) {
	d := &s.Disks[i]
	driver := "file"
	if info, err := stat(d.Image); err != nil {
		return nil, err
	} else if info.Mode()&fs.ModeDevice != 0 {
		driver = "host_device"
	}
	image := node{"driver": d.format(), "node-name": parentNode(i), "file": node{"driver": driver, "filename": d.Image}}
	size, err := d.size(true)
	if err != nil {
		return nil, err
	}
	if !secondary {
		return []node{image, absent(i, size), s.quorum(i, parentNode(i))}, nil
	}
	overlay := func(name, kind string, backing any) node {
		return node{"driver": "qcow2", "node-name": name, "backing": backing,
			"file": node{"driver": "file", "filename": s.overlay(d, kind)}}
	}
	return []node{
		image,
		absent(i, size),
		{"driver": "replication", "node-name": childNode(i), "mode": "secondary", "top-id": d.ID,
			"file": overlay(activeNode(i), "active", overlay(hiddenNode(i), "hidden", parentNode(i)))},
		s.quorum(i, childNode(i)),
	}, nil
}

// esc writes a value into a list that commas divide.
func esc(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// wellFormed is what QEMU takes as an ID.
var wellFormed = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,30}$`)

// Check tells, before anything starts, everything that would keep the guest from
// starting: as a primary, or with in as a secondary. peer are the sizes of the
// other host's disks ([Spec.DiskSizes]); nil: not known.
func (s *Spec) Check(in *Incoming, peer []int64) error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }

	if binary, err := exec.LookPath(s.Binary); err != nil {
		bad("QEMU: %w; install it (Debian: qemu-system-x86) or give another binary", err)
	} else if err := checkAccel(binary, s.Accel); err != nil {
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
			bad("NIC on %s: %q is no station's MAC address", n.Tap, n.MAC)
		}
		if _, err := net.InterfaceByName(n.Tap); err != nil {
			bad("NIC: there is no tap %s: %w", n.Tap, err)
		}
	}
	if _, err := CheckExtra(s.Extra); err != nil {
		bad("extra: %w", err)
	}
	if _, err := os.Stat(filepath.Dir(s.QMP)); err != nil {
		bad("QMP socket: %w", err)
	} else if c, err := net.DialTimeout("unix", s.QMP, patience); err == nil {
		c.Close()
		bad("a QEMU answers at %s already: stop it, or name the socket as the node's qmp to attach to it", s.QMP)
	} else if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.EAGAIN) {
		bad("a process listens at %s already and takes no connection: stop it, or name another run_dir", s.QMP)
	}
	if p, err := Find(s); err == nil {
		bad("guest %s runs on this host already, as process %d", s.VM, p.Pid())
		p.Release()
	}
	errs = append(errs, s.checkDisks(in != nil, peer)...)
	if err := s.checkUser(in != nil); err != nil {
		errs = append(errs, err)
	}
	if in != nil {
		if err := checkIncoming(in, len(s.Disks) > 0); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func checkAccel(binary, accel string) error {
	name, _, _ := strings.Cut(accel, ",")
	ctx, done := context.WithTimeout(context.Background(), patience)
	defer done()
	out, _, err := program.Output(ctx, binary, "-accel", "help")
	if errors.Is(err, program.ErrGivenUp) {
		return fmt.Errorf("QEMU: `%s -accel help` does not end: %w; run it by hand: is the storage there that the program and its libraries are on?", binary, err)
	}
	if err != nil {
		return fmt.Errorf("QEMU: %s -accel help: %w", binary, err)
	}
	known := strings.Fields(out)
	found := false
	for _, k := range known {
		found = found || k == name
	}
	if !found {
		return fmt.Errorf("accel: %s has no accelerator %q", binary, name)
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

// onStorage runs f, which looks at path, and does not wait for storage that is gone.
func onStorage(path string, f func() error) error {
	ctx, done := context.WithTimeout(context.Background(), patience)
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
		info = found // after an error it may still be written
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

// checkIncoming finds out whether the secondary can listen.
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

// DiskSizes are what the guest sees of its disks, in bytes, in their order. It
// works while they are in use.
func (s *Spec) DiskSizes() ([]int64, error) {
	sizes := make([]int64, len(s.Disks))
	var errs []error
	for i := range s.Disks {
		var err error
		sizes[i], err = s.Disks[i].size(true)
		errs = append(errs, err)
	}
	return sizes, errors.Join(errs...)
}

// size asks qemu-img. Unless shared, an image that another process uses is
// refused.
func (d *Disk) size(shared bool) (int64, error) {
	args := []string{"info", "--output=json", "-f", d.format()}
	if shared {
		args = append(args, "-U")
	}
	out, err := qemuImg(append(args, d.Image)...)
	if err != nil {
		return 0, fmt.Errorf("disk %s: %w", d.ID, err)
	}
	var info imageInfo
	if err := json.Unmarshal(out, &info); err != nil {
		return 0, fmt.Errorf("disk %s: qemu-img info: %w", d.ID, err)
	}
	return info.Size, nil
}

// imageInfo is some of what `qemu-img info` tells.
type imageInfo struct {
	Size  int64 `json:"virtual-size"`
	Dirty bool  `json:"dirty-flag"` // qcow2: it was written to and not closed
}

// makeOverlays makes the secondary's overlays anew: what they held was against
// another state of the image. With lazy refcounts one is marked as dirty from its first
// write on until QEMU closes it. What the folder does not let it do is an
// [*OverlayError].
func (s *Spec) makeOverlays() error {
	if err := s.roomForOverlays(); err != nil {
		return err
	}
	for i := range s.Disks {
		d := &s.Disks[i]
		size, err := d.size(false)
		if err != nil {
			return err
		}
		for _, kind := range overlayKinds {
			if _, err := qemuImg("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", s.overlay(d, kind), strconv.FormatInt(size, 10)); err != nil {
				return &OverlayError{d.OverlayDir, []string{d.ID}, err.Error()}
			}
			if err := s.give(s.overlay(d, kind)); err != nil {
				return fmt.Errorf("disk %s: overlay: %w", d.ID, err)
			}
		}
	}
	return nil
}

// patience bounds what may wait for storage that does not answer, or for a process that
// stands still. A test shortens it.
var patience = 10 * time.Second

// qemuImg returns what qemu-img prints; an error is its own words.
func qemuImg(args ...string) ([]byte, error) {
	ctx, done := context.WithTimeout(context.Background(), patience)
	defer done()
	return qemuImgUntil(ctx, args...)
}

// qemuImgUntil is qemuImg for what may take its time.
func qemuImgUntil(ctx context.Context, args ...string) ([]byte, error) {
	out, said, err := program.Output(ctx, "qemu-img", args...)
	switch {
	case errors.Is(err, program.ErrGivenUp):
		return nil, fmt.Errorf("`qemu-img %s` does not end: %w; is the storage there that the image is on?", strings.Join(args, " "), err)
	case errors.As(err, new(*exec.ExitError)) && said != "":
		return nil, errors.New(strings.Join(strings.Fields(said), " "))
	case err != nil:
		return nil, fmt.Errorf("qemu-img: %w", err)
	}
	return []byte(out), nil
}
