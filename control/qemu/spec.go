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
	"net"
	"net/netip"
	"path/filepath"
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

	QMP string // path of the monitor's socket
	Dir string // of pid file and log

	mask bool // mutation, set by tests: a disk's vote threshold is 1 (R24)
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

func (s *Spec) file(ext string) string { return filepath.Join(s.Dir, s.VM+"-"+s.Node+ext) }
