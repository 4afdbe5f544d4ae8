// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

const guestAddr = "10.77.0.2"

var guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 2}

// world is two hosts, on each of which a guest is reached over its tap.
type world struct {
	t              *testing.T
	dir            string
	kernel, initrd string
	preload        string
	disks          int
	images         map[string]string // folders of the hosts' images; "": dir
	overlays       map[string]string // folders of their overlays; "": in dir
	user           string            // the user that QEMU becomes
	mask           bool              // mutation: a write is done when one replica took it
	seed           bool              // the disks are as in QEMU's docs/COLO-FT.txt
	memory         bool              // the test writes to the guests' memory (poke)
	clear          bool              // the QEMUs' connections are not protected
	tcp            bool              // the migration goes over TCP
	ca             *peerlinktest.Authority
	certs          map[string]*qemu.TLS // of the hosts that have some
}

const diskSize = 32 << 20

func newWorld(t *testing.T, disks int) *world { return newWorldIn(t, disks, func(*world) {}) }

// newWorldIn calls choose to set fields of the world before anything is made.
func newWorldIn(t *testing.T, disks int, choose func(*world)) *world {
	lt.NeedRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: t.TempDir(), disks: disks, preload: qemutest.Preload(t)}
	choose(w)
	w.ca, w.certs = peerlinktest.NewAuthority(t, "CA one"), make(map[string]*qemu.TLS)
	w.kernel, w.initrd = qemutest.Image(t, qemutest.Guest{Service: self, Env: []string{"TEST_GUEST=1"}})
	ip := func(args string) { lt.Run(t, "ip", strings.Fields(args)...) }
	for _, host := range []string{"a", "b"} {
		lt.Run(t, "ip", "netns", "add", w.ns(host))
		t.Cleanup(func() { lt.Run(t, "ip", "netns", "del", w.ns(host)) })
		in := "-n " + w.ns(host) + " "
		ip(in + "link set lo up")
		ip(in + "tuntap add tap0 mode tap")
		// The guest knows its client by the same MAC on both hosts.
		ip(in + "link set tap0 address 02:00:00:00:77:01 up")
		ip(in + "addr add 10.77.0.1/24 dev tap0")
		// Permanent, so that no lookup fails while there is no guest.
		ip(in + "neigh replace " + guestAddr + " lladdr " + guestMAC.String() + " dev tap0 nud permanent")
	}
	for i := range disks {
		qemutest.Disk(t, w.image("a", i), diskSize, false)
		lt.Run(t, "cp", w.image("a", i), w.image("b", i))
	}
	ip("link add ctl netns " + w.ns("a") + " type veth peer name ctl netns " + w.ns("b"))
	for i, host := range []string{"a", "b"} {
		ip(fmt.Sprintf("-n %s addr add 192.0.2.%d/24 dev ctl", w.ns(host), i+1))
		ip("-n " + w.ns(host) + " link set ctl up")
	}
	return w
}

// runAs has the QEMUs become a user, who may use their images.
func (w *world) runAs(name string) {
	w.t.Helper()
	w.user, w.tcp = name, true // who may make no socket in the folder
	for _, dir := range []string{w.dir, filepath.Dir(w.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, host := range []string{"a", "b"} {
		for i := range w.disks {
			lt.Run(w.t, "chown", name, w.image(host, i))
		}
	}
}

func (w *world) ns(host string) string { return fmt.Sprintf("lsq%x%s", os.Getpid(), host) }

func (w *world) image(host string, i int) string {
	return filepath.Join(cmp.Or(w.images[host], w.dir), fmt.Sprintf("%s%d.qcow2", host, i))
}

func (w *world) spec(host string) *qemu.Spec {
	s := &qemu.Spec{
		VM: "web1", Node: host,
		Guest: qemu.Guest{
			Binary: "qemu-system-x86_64", Machine: "pc", Accel: "tcg", CPU: "qemu64",
			Memory: qemutest.Memory, SMP: 1,
			Kernel: w.kernel, Initrd: w.initrd, Append: qemutest.Append([]string{guestAddr + "/24"}),
			NICModel: "virtio-net-pci",
			Extra:    []string{"-serial", "file:" + w.serial(host)},
		},
		NICs: []qemu.NIC{{Tap: "tap0", MAC: guestMAC}},
		Env:  []string{w.preload},
		QMP:  filepath.Join(w.dir, host+", its.qmp"), Dir: w.dir,
	}
	for i := range w.disks {
		s.Disks = append(s.Disks, qemu.Disk{ID: fmt.Sprintf("colo-disk%d", i), Image: w.image(host, i), OverlayDir: cmp.Or(w.overlays[host], filepath.Join(w.dir, "overlays, "+host))})
	}
	if w.memory {
		s.Extra = append(s.Extra, "-qtest", "unix:"+w.memorySocket(host)+",server=on,wait=off", "-qtest-log", "none")
	}
	s.User = w.user
	qemu.SetMask(s, w.mask)
	return s
}

// seedDrives are arguments that define the disk as QEMU's docs/COLO-FT.txt does.
func (w *world) seedDrives(host string, secondary bool) []string {
	image, active, hidden := w.image(host, 0), filepath.Join(w.dir, "active"), filepath.Join(w.dir, "hidden")
	device := []string{"-device", "virtio-blk-pci,drive=colo-disk0"}
	const quorum = "if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,"
	if !secondary {
		return append([]string{"-drive", quorum + "children.0.file.filename=" + image + ",children.0.driver=qcow2"}, device...)
	}
	for _, path := range []string{active, hidden} {
		qemutest.Disk(w.t, path, diskSize, false)
	}
	return append([]string{
		"-drive", "if=none,id=parent0,file.filename=" + image + ",driver=qcow2",
		"-drive", "if=none,id=childs0,driver=replication,mode=secondary,file.driver=qcow2,top-id=colo-disk0," +
			"file.file.filename=" + active + ",file.backing.driver=qcow2,file.backing.file.filename=" + hidden + ",file.backing.backing=parent0",
		"-drive", quorum + "children.0=childs0"}, device...)
}

func (w *world) memorySocket(host string) string { return filepath.Join(w.dir, host+".mem") }

func (w *world) serial(host string) string { return filepath.Join(w.dir, host+".serial") }

// incoming is where a host's secondary listens.
func (w *world) incoming(host string) *qemu.Incoming {
	addr := netip.MustParseAddr(map[string]string{"a": "192.0.2.1", "b": "192.0.2.2"}[host])
	in := &qemu.Incoming{Migration: "unix:" + filepath.Join(w.dir, host+".mig"), NBD: netip.AddrPortFrom(addr, 9999), TLS: w.tls(host)}
	if w.tcp {
		in.Migration = "tcp:" + netip.AddrPortFrom(addr, 9998).String()
	}
	return in
}

// to is where a host's primary finds the other's secondary.
func (w *world) to(host string, in *qemu.Incoming) qemu.Incoming {
	to := *in
	to.TLS = w.tls(host)
	return to
}

// tls are a host's certificates; nil: the connections are not protected.
func (w *world) tls(host string) *qemu.TLS {
	if w.clear {
		return nil
	}
	if w.certs[host] == nil {
		w.certs[host] = w.certsOf(w.ca, host, nil)
	}
	return w.certs[host]
}

// certsOf makes a host's certificates; change: see [peerlinktest.Authority.Sign].
func (w *world) certsOf(ca *peerlinktest.Authority, host string, change func(*x509.Certificate)) *qemu.TLS {
	peer := map[string]string{"a": "b", "b": "a"}[host]
	c := ca.Files(host, peer, "web1", change)
	return &qemu.TLS{CA: c.CA, Cert: c.Cert, Key: c.Key, Peer: peerlink.CertName(peer, "web1"), Dir: filepath.Join(w.dir, host+".tls")}
}
