// SPDX-License-Identifier: Apache-2.0

// Package qemu starts and controls a guest's QEMU. Over QMP it carries out COLO's
// procedures: replication of memory and disks to the secondary, failover to either side,
// and replication to a new secondary.
//
// It uses no QMP events, which the daemon reads: it polls states instead. Every step may
// be repeated, so that a daemon that was restarted just does the step again.
//
// In comments P is the primary's host and S the secondary's.
package qemu

import (
	"net"
	"net/netip"
	"path/filepath"
)

// Guest is the configuration of a guest.
type Guest struct {
	Binary  string // a path, or a name to look up in PATH
	Machine string
	Accel   string // "kvm" or "tcg"; QEMU's options may follow, after a comma
	CPU     string
	Memory  int64 // bytes, whole KiB
	SMP     int

	Kernel, Initrd, Append string // Kernel "": the guest boots from its disks

	NICModel string          // QEMU's name of the device, "virtio-net-pci"
	Offloads map[string]bool // of the NICs, by the names of QEMU's properties ([Offloads]); those left out are as QEMU has them
	Disks    []Disk

	Extra []string // further arguments of QEMU
	User  string   // the user that QEMU becomes, a name or uid:gid; "": that of the daemon
}

// Spec is the configuration of one guest on one host. What depends on this host's QEMU
// is found out when the guest is started.
type Spec struct {
	VM, Node string // names of the guest and of this host, used for the files in Dir
	Guest
	NICs []NIC
	Env  []string // QEMU's environment besides the daemon's, "NAME=value"

	QMP string // path of the monitor's socket
	Dir string // of pid file and log

	mask    bool // mutation, set by tests: a disk's vote threshold is 1 (R24)
	foreign bool // set by tests: Extra is what somebody else starts QEMU with
}

// Offloads are the properties of a virtio NIC that say which work the guest and the host leave to each other: checksums and
// segmentation by the guest's driver (guest_*: of what it receives), and merged receive buffers.
var Offloads = []string{
	"csum", "gso", "guest_csum", "guest_ecn", "guest_tso4", "guest_tso6", "guest_ufo", "guest_uso4", "guest_uso6",
	"host_ecn", "host_tso4", "host_tso6", "host_ufo", "host_uso", "mrg_rxbuf",
}

// NIC is a guest's NIC. The tap exists before QEMU is started.
type NIC struct {
	Tap    string
	MAC    net.HardwareAddr
	Queues int  // pairs of queues, of a virtio NIC; below 2: one
	VHost  bool // the kernel serves the queues
}

// Disk is replicated: what the primary's guest writes goes to the images of
// both hosts.
type Disk struct {
	ID         string // the same on both hosts
	Image      string
	Format     string // "qcow2" (also ""), or "raw". It is never detected: a guest could write another format's header
	OverlayDir string // folder of the secondary's overlays, which hold what the guests write between checkpoints; best on a RAM disk

	// How QEMU accesses the image.
	Cache   string // one of the constants below; "": CacheWriteback
	AIO     string // "threads", "native" or "io_uring"; "": QEMU's default
	Discard bool   // zeroes that the guest writes become holes
}

// Values of Disk.Cache. With Through the guest is told that its disk has no cache, and with Direct the image passes the
// host's page cache by.
const (
	CacheWriteback    = "writeback"
	CacheNone         = "none"         // direct
	CacheWritethrough = "writethrough" // through
	CacheDirectsync   = "directsync"   // both
)

func (d *Disk) direct() bool  { return d.Cache == CacheNone || d.Cache == CacheDirectsync }
func (d *Disk) through() bool { return d.Cache == CacheWritethrough || d.Cache == CacheDirectsync }

func (d *Disk) format() string {
	if d.Format == "" {
		return "qcow2"
	}
	return d.Format
}

// Incoming is where a secondary's QEMU listens for its primary's.
type Incoming struct {
	Migration string         // "tcp:HOST:PORT" or "unix:PATH"
	NBD       netip.AddrPort // of the disks, if there are any
	TLS       *TLS           // how both are protected; nil: they are in the clear
}

func (s *Spec) file(ext string) string { return filepath.Join(s.Dir, s.VM+"-"+s.Node+ext) }
