// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"lockstep/control"
	"lockstep/control/config"
	"lockstep/control/qemu"
	"lockstep/loader"
)

// machine is what the doctor looks at: the host it runs on, or a test's.
type machine struct {
	arch         string // Go's name
	release      func() (string, error)
	capabilities func() (missing []string, err error)
	exists       func(path string) bool
	writable     func(dir string) error // or what is above it
	tcx          func() error
	programs     func() error
	vxlan        func() error
	nativeXDP    func(device string) (bool, error)
	tap          func(device string) error // fit to be a guest's
	inFront      func(tap string) (passOn, read []string, err error)
	synchronised func() (bool, error) // CLOCK_REALTIME
	addresses    func() ([]netip.Addr, error)
	route        func(v *config.VXLAN) error // to the other end, from this one
	dial         func(ctx context.Context, addr netip.AddrPort) error
	command      func(ctx context.Context, name string, args ...string) (output string, err error)
	arbiter      func(ctx context.Context, c *config.Config, node string) (record string, err error)
	guest        func(c *config.Config, self *config.Node) (running string, err error)
	memory       func() (total, available int64, err error) // bytes
	overlays     func(c *config.Config, self *config.Node) ([]overlayRoom, error)
}

// States of a check.
const (
	stateOK      = "ok"
	stateWarning = "warning" // it works without, or not always
	stateMissing = "missing" // it does not work
)

// check is one thing looked at.
type check struct {
	Name  string `json:"name"`
	State string `json:"state"`
	Found string `json:"found"`
	Fix   string `json:"fix,omitempty"` // what mends it
}

// checkup is what `doctor --json` prints.
type checkup struct {
	CanRun bool    `json:"can_run"`
	Checks []check `json:"checks"`
}

// doctor looks at one host, for one node of a config if there is one.
type doctor struct {
	m      machine
	k      kernel
	root   bool // all capabilities are there
	checks []check
}

func (d *doctor) ok(name, found string, a ...any) {
	d.checks = append(d.checks, check{Name: name, State: stateOK, Found: fmt.Sprintf(found, a...)})
}

func (d *doctor) warn(name, fix, found string, a ...any) {
	d.checks = append(d.checks, check{name, stateWarning, fmt.Sprintf(found, a...), fix})
}

func (d *doctor) missing(name, fix, found string, a ...any) {
	d.checks = append(d.checks, check{name, stateMissing, fmt.Sprintf(found, a...), fix})
}

// try reports what an attempt gave, which only root can make.
func (d *doctor) try(name, fix, found string, attempt func() error) {
	if !d.root {
		d.warn(name, asRoot, "not tried: that needs root")
		return
	}
	if err := attempt(); err != nil {
		d.missing(name, fix, "%v", err)
		return
	}
	d.ok(name, "%s", found)
}

const asRoot = "run it as root: sudo lockstep doctor"

// patience bounds everything that may not answer.
const patience = 2 * time.Second

func newDoctor(e env) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [-c pair.yaml [--node NAME]]",
		Short: "Tell what this host lacks to run lockstep, and what mends it",
		Long: "doctor looks at this host, and with -c at what the config says of it. It changes\n" +
			"nothing. It exits with 0 when lockstep can run here, with 1 when it cannot.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var c *config.Config
			if t.file == "" && t.node != "" {
				return usageError{errors.New("--node names a host of a config file; name the file with -c")}
			}
			if t.file != "" {
				var err error
				if c, err = config.Load(t.file); err != nil {
					return usageError{err}
				}
				if t.node != "" {
					if _, _, err := c.Node(t.node); err != nil {
						return usageError{err}
					}
				}
			}
			d := &doctor{m: e.machine, k: e.kernel}
			d.host(cmd.Context(), c)
			if c != nil {
				d.pair(cmd.Context(), c, t.node)
			}
			return d.report(e.stdout, asJSON)
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// report prints the checks, and is an error when lockstep cannot run.
func (d *doctor) report(out io.Writer, asJSON bool) error {
	n := 0
	for _, c := range d.checks {
		if c.State == stateMissing {
			n++
		}
	}
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := enc.Encode(checkup{CanRun: n == 0, Checks: d.checks}); err != nil {
			return err
		}
	} else {
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		for _, c := range d.checks {
			fmt.Fprintf(w, "%s\t%s\t%s\n", c.State, c.Name, c.Found)
			if c.Fix != "" {
				fmt.Fprintf(w, "\t\tto mend it: %s\n", c.Fix)
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	switch n {
	case 0:
		return nil
	case 1:
		return errors.New("cannot run here: 1 thing is missing")
	}
	return fmt.Errorf("cannot run here: %d things are missing", n)
}

const newerKernel = "install Linux 6.6 or later; Debian 12: apt install -t bookworm-backports linux-image-amd64"

// host looks at the machine itself.
func (d *doctor) host(ctx context.Context, c *config.Config) {
	if lacks, err := d.m.capabilities(); err != nil {
		d.missing("privileges", asRoot, "%v", err)
	} else if len(lacks) > 0 {
		d.missing("privileges", asRoot, "this user has no %s", strings.Join(lacks, ", "))
	} else {
		d.root = true
		d.ok("privileges", "enough to load programs and to use the devices")
	}
	if release, err := d.m.release(); err != nil {
		d.warn("kernel", "", "%v", err)
	} else if major, minor := kernelVersion(release); major < 6 || major == 6 && minor < 6 {
		d.missing("kernel", newerKernel, "Linux %s has no tcx, which came with 6.6", release)
	} else {
		d.ok("kernel", "Linux %s", release)
	}
	d.try("tcx", newerKernel, "programs attach", d.m.tcx)
	const btf = "/sys/kernel/btf/vmlinux"
	if d.m.exists(btf) {
		d.ok("btf", "%s", btf)
	} else {
		d.missing("btf", "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, as distributions' are", "there is no %s", btf)
	}
	d.try("programs", "run `lockstep run --verifier-log` for the kernel's own words, and report them with `uname -a`",
		"the kernel takes them all", d.m.programs)
	d.ok("compiler", "none is needed: the programs are inside lockstep")
	d.try("vxlan", "modprobe vxlan (CONFIG_VXLAN); or give each NIC a peer device of its own", "devices can be made", d.m.vxlan)
	pins := config.DefaultPinDir
	if c != nil {
		pins = c.PinDir
	}
	if err := d.k.checkBPFFS(pins); err != nil {
		found, fix, _ := strings.Cut(err.Error(), "; ")
		d.missing("bpffs", fix, "%s", found)
	} else {
		d.ok("bpffs", "pins under %s outlive the daemon", pins)
	}
	if sync, err := d.m.synchronised(); err != nil {
		d.warn("clock", "", "%v", err)
	} else if !sync {
		d.warn("clock", "timedatectl set-ntp true, or apt install chrony", "nothing keeps it right: the two hosts' logs will not match")
	} else {
		d.ok("clock", "synchronised")
	}
	d.qemu(ctx, c)
	d.device("kvm", "/dev/kvm", "modprobe kvm_intel or kvm_amd, and switch virtualisation on in the firmware", "guests are emulated, and slow")
	d.device("vhost-net", "/dev/vhost-net", "modprobe vhost_net", "QEMU moves the guest's frames itself, and more slowly")
}

func (d *doctor) device(name, path, fix, without string) {
	if d.m.exists(path) {
		d.ok(name, "%s", path)
	} else {
		d.warn(name, fix, "there is no %s: %s", path, without)
	}
}

// kernelVersion reads the first two numbers of "6.18.44-cloud".
func kernelVersion(release string) (major, minor int) {
	_, _ = fmt.Sscanf(release, "%d.%d", &major, &minor) // 0 where there is none
	return major, minor
}

// qemus are QEMU's names of this program's architectures, and Debian's packages.
var qemus = map[string][2]string{
	"amd64": {"x86_64", "x86"}, "arm64": {"aarch64", "arm"}, "riscv64": {"riscv64", "misc"},
}

var qemuVersion = regexp.MustCompile(`version (\d+)\.(\d+)\.(\d+)`)

func (d *doctor) qemu(ctx context.Context, c *config.Config) {
	arch := qemus[d.m.arch]
	name, install := "qemu-system-"+arch[0], "apt install qemu-system-"+arch[1]+"; or put QEMU into the PATH"
	accel := "tcg"
	if d.m.exists("/dev/kvm") {
		accel = "kvm"
	}
	if c != nil && c.QEMU != nil {
		name = c.QEMU.Binary
		accel, _, _ = strings.Cut(c.QEMU.Accel, ",")
	}
	out, err := d.m.command(ctx, name, "--version")
	v := qemuVersion.FindStringSubmatch(out)
	switch {
	case err != nil:
		d.missing("qemu", install, "%v", err)
		return
	case v == nil:
		d.missing("qemu", install, "%s names no version: %q", name, out)
		return
	}
	number := strings.Join(v[1:], ".")
	fix := "install " + qemu.GoodQEMU
	why, state := colo(number, accel)
	if state == stateOK && accel == "tcg" && c != nil && c.QEMU != nil {
		why, state = "under TCG QEMU's COLO hangs at a checkpoint, for which lockstep's tests have a remedy of their own", stateWarning
		fix = "qemu: {accel: kvm}"
	}
	if state != stateOK {
		d.checks = append(d.checks, check{"qemu", state, fmt.Sprintf("%s %s with %s: %s", name, number, accel, why), fix})
	} else {
		d.ok("qemu", "%s %s with %s: COLO works", name, number, accel)
	}
	if c != nil && c.QEMU != nil {
		d.hardware(ctx, name, c.QEMU)
	}
	// Since 8.1 QEMU has COLO only where it has the replication driver.
	out, err = d.m.command(ctx, name, "-drive", "format=help")
	if err != nil {
		d.warn("colo", "", "%s does not list its block drivers: %v", name, err)
	} else if !slices.Contains(strings.Fields(out), "replication") {
		d.missing("colo", "use a build of QEMU without --disable-replication", "%s was built without replication, and so without COLO", name)
	} else {
		d.ok("colo", "compiled in")
	}
	if _, err := d.m.command(ctx, "qemu-img", "--version"); err != nil {
		d.warn("qemu-img", "apt install qemu-utils", "%v: the secondary's disk cannot be prepared here", err)
	} else {
		d.ok("qemu-img", "there")
	}
}

// colo says how well COLO works in a release of QEMU under an accelerator.
func colo(version, accel string) (why, state string) {
	v := qemu.ParseVersion(version)
	broken := qemu.BrokenCOLO(v, accel)
	switch {
	case slices.Compare(v[:], []int{7, 2, 0}) < 0:
		return "older than 7.2, the first that lockstep is made for", stateMissing
	case broken != "":
		return broken, stateMissing
	case v[0] > 10 || v[0] == 10 && v[1] > 0:
		return "newer than 10.0, the last that lockstep was tried with", stateWarning
	}
	return "", stateOK
}

// hardware looks at what the guest is made of.
func (d *doctor) hardware(ctx context.Context, binary string, q *config.QEMU) {
	list, err := d.m.command(ctx, binary, "-machine", "help")
	switch machine, ok := qemu.Machine(q.Machine, list); {
	case err != nil:
		d.warn("machine", "", "%s does not list its machines: %v", binary, err)
	case !ok:
		d.missing("machine", "name one that `"+binary+" -machine help` lists", "%s has no machine %q", binary, q.Machine)
	default:
		d.ok("machine", "%s is %s here; the other host's QEMU has to call it the same, or have it by that name", q.Machine, machine)
	}
	found := false
	for i, arg := range q.Extra {
		if why := qemu.BreaksCOLO(q.Extra[:i], arg); why != "" {
			d.missing("devices", "leave it out of qemu.extra", "%s: %s", arg, why)
			found = true
		}
	}
	if !found {
		d.ok("devices", "none that COLO is known to fail with")
	}
}

// memory looks whether a secondary fits: it has its guest's memory, and a copy of
// the primary's as of the last checkpoint.
func (d *doctor) memory(c *config.Config, running bool) {
	total, available, err := d.m.memory()
	need := 2 * c.QEMU.Memory
	const fix = "more memory in this host, or less for the guest (qemu.memory)"
	switch {
	case err != nil:
		d.warn("memory", "", "%v", err)
	case total < need:
		d.missing("memory", fix, "a secondary needs twice its guest's memory, %d MiB, and this host has %d", need>>20, total>>20)
	case available < need && !running:
		d.warn("memory", fix, "a secondary needs twice its guest's memory, %d MiB, and %d are free here now", need>>20, available>>20)
	default:
		d.ok("memory", "enough for a secondary, which needs twice its guest's: %d MiB", need>>20)
	}
}

// pair looks at what the config says of this host.
func (d *doctor) pair(ctx context.Context, c *config.Config, node string) {
	addrs, err := d.m.addresses()
	if err != nil {
		d.missing("control", "", "addresses of this host: %v", err)
		return
	}
	has := func(a netip.Addr) bool { return slices.Contains(addrs, a) }
	if node == "" { // the one whose address this host has
		a, b := &c.Nodes[0], &c.Nodes[1]
		if has(a.Control.Addr()) == has(b.Control.Addr()) {
			d.missing("control", "name this host with --node", "which of %s and %s is this host? Of their control addresses %s and %s it has %s",
				a.Name, b.Name, a.Control.Addr(), b.Control.Addr(), map[bool]string{true: "both", false: "neither"}[has(a.Control.Addr())])
			return
		}
		node = a.Name
		if has(b.Control.Addr()) {
			node = b.Name
		}
	}
	self, other, _ := c.Node(node) // it is one of the two
	addr := self.Control.Addr()
	switch {
	case has(addr):
		d.ok("control", "this host is %s: it has %s", self.Name, addr)
	case has(other.Control.Addr()):
		d.missing("control", "--node "+other.Name, "%s's address %s is not this host's, but %s's is", self.Name, addr, other.Name)
	default:
		d.missing("control", fmt.Sprintf("ip addr add %s/24 dev DEVICE; or correct nodes.%s.control", addr, self.Name),
			"%s's address %s is not this host's", self.Name, addr)
	}
	d.peer(ctx, other)
	d.certificates(c, self, other)
	if err := d.m.writable(c.RunDir); err != nil {
		d.missing("run_dir", fmt.Sprintf("mkdir -p %s; or name another run_dir", c.RunDir), "%v", err)
	} else {
		d.ok("run_dir", "%s", c.RunDir)
	}
	for i, nic := range self.NICs {
		d.nic(i, &nic)
	}
	d.failover(ctx, c, self)
}

// failover looks at what a pair needs to begin and to end by itself.
func (d *doctor) failover(ctx context.Context, c *config.Config, self *config.Node) {
	if c.Arbiter.Type == "" {
		d.warn("arbiter", "name one in the config: arbiter: {type: etcd, endpoints: [...]}", "there is none, so nobody takes over by itself when a host dies")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	switch record, err := d.m.arbiter(ctx, c, self.Name); {
	case err != nil:
		d.missing("arbiter", "without it neither host may speak alone: docs/ARBITER.md tells what it needs", "%s does not answer: %v", c.Arbiter.Type, err)
	case c.Arbiter.Type == config.ArbiterNone:
		d.warn("arbiter", "name one that both hosts ask", "type none: both hosts may speak after a partition")
	default:
		d.ok("arbiter", "%s answers: %s", c.Arbiter.Type, record)
	}
	if err := d.m.writable(c.StateDir); err != nil {
		d.missing("state_dir", fmt.Sprintf("mkdir -p %s; or name another state_dir", c.StateDir), "%v", err)
	} else {
		d.ok("state_dir", "%s", c.StateDir)
	}
	if !self.Starts {
		return
	}
	running, err := d.m.guest(c, self)
	d.memory(c, running != "")
	switch {
	case err != nil:
		d.missing("guest", "correct qemu in the config, or this host", "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	case running != "":
		d.ok("guest", "%s", running)
	default:
		d.ok("guest", "QEMU can start it")
	}
	rooms, err := d.m.overlays(c, self)
	if err != nil {
		d.missing("overlay_dir", largerOverlays, "%s: %v", self.Name, err)
	}
	for _, o := range rooms {
		d.overlays(c, self, &o)
	}
}

// overlayRoom is a file system for the overlays of a guest's disks.
type overlayRoom struct {
	qemu.OverlaySpace
	most int64 // bytes that they can take at most; 0: not known
}

const (
	largerOverlays = "free some of it, or name a larger overlay_dir: what both guests write between two checkpoints has to be there"
	// busyGuest is a rate at which guests do write now and then, bytes a second.
	busyGuest = 100_000_000
)

// overlays tells how long the room for a secondary's overlays lasts. Either host may come
// to be the secondary's.
func (d *doctor) overlays(c *config.Config, self *config.Node, o *overlayRoom) {
	const name = "overlay_dir"
	what := fmt.Sprintf("%s: %s, of disk %s, has %d MiB", self.Name, o.Dir, strings.Join(o.Disks, ", "), (o.Free+o.Used)>>20)
	room := o.Free + o.Used
	lasts := time.Duration(room/busyGuest) * time.Second
	switch need := qemu.MinOverlayRoom * int64(len(o.Disks)); {
	case room < need:
		d.missing(name, largerOverlays, "%s, and no secondary starts with less than %d MiB", what, need>>20)
	case o.most > 0 && room >= o.most:
		d.ok(name, "%s, as much as overlays can take", what)
	case lasts < c.Checkpoint.Period:
		d.warn(name, largerOverlays, "%s: %v of writing 100 MB/s, and checkpoint.period is %v; checkpoints come earlier then", what, lasts, c.Checkpoint.Period)
	default:
		d.ok(name, "%s: %v of writing 100 MB/s", what, lasts)
	}
}

// peer tries the other host's control address, where only a primary listens.
func (d *doctor) peer(ctx context.Context, other *config.Node) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	switch err := d.m.dial(ctx, other.Control); {
	case err == nil:
		d.ok("peer", "%s's daemon listens on %s", other.Name, other.Control)
	case errors.Is(err, syscall.ECONNREFUSED):
		d.ok("peer", "%s's host answers; no daemon listens on %s, which only the primary's does", other.Name, other.Control)
	default:
		d.missing("peer", fmt.Sprintf("ip route get %s; let TCP port %d pass the firewalls of both hosts", other.Control.Addr(), other.Control.Port()),
			"%s's host does not answer: %v", other.Name, err)
	}
}

func (d *doctor) certificates(c *config.Config, self, other *config.Node) {
	if c.TLS.Insecure {
		d.warn("tls", "name certificates under tls, and make them with `lockstep keys`", "insecure: who can read the control link can forge the secondary's records")
		return
	}
	files := control.Certificates{VM: c.VM, Node: self.Name, Peer: other.Name}
	files.CA, files.Cert, files.Key = c.TLS.Files(self.Name)
	_, err := files.TLS()
	bad := (*control.CertError)(nil)
	switch {
	case errors.As(err, &bad):
		d.missing("tls", bad.Fix, "tls.%s: %s", bad.What, bad.Reason)
	case err != nil:
		d.missing("tls", "", "%v", err)
	default:
		d.ok("tls", "%s is this node's, signed and in time", files.Cert)
	}
}

func (d *doctor) nic(i int, nic *config.NIC) {
	name := func(what string) string { return fmt.Sprintf("nics[%d].%s", i, what) }
	tap, err := d.k.device(nic.Tap)
	if err != nil {
		d.missing(name("tap"), fmt.Sprintf("ip tuntap add dev %s mode tap; or start QEMU, which makes it", nic.Tap), "there is no device %s: %v", nic.Tap, err)
		return // what is right for the others depends on it
	}
	if err := d.m.tap(nic.Tap); err != nil {
		found, fix, _ := strings.Cut(err.Error(), "; ")
		d.missing(name("tap"), fix, "%s", found)
		return
	}
	d.ok(name("tap"), "%s, MTU %d", nic.Tap, tap.MTU)
	d.inFront(name("order"), nic.Tap)

	key, dev, need := name("peer"), nic.PeerDevice, tap.MTU
	v := nic.PeerVXLAN
	if v != nil {
		key, dev = name("underlay"), v.Underlay
		need = (&loader.VXLAN{Local: v.Local.AsSlice(), GuestMTU: tap.MTU}).UnderlayMTU()
	}
	l, err := d.k.device(dev)
	switch {
	case err != nil && v != nil:
		d.missing(key, "name the device that has "+v.Local.String()+": ip -br addr", "there is no device %s: %v", dev, err)
		return
	case err != nil:
		d.missing(key, "make the device first; or have lockstep make a VXLAN: peer: {vxlan: {...}}", "there is no device %s: %v", dev, err)
		return
	case l.MTU < need && v != nil:
		d.missing(key, fmt.Sprintf("ip link set %s mtu %d", dev, need), "%s has MTU %d, and VXLAN frames of the guest need %d", dev, l.MTU, need)
	case l.MTU < need:
		d.missing(key, fmt.Sprintf("ip link set %s mtu %d", dev, need), "%s has MTU %d, less than the tap's %d", dev, l.MTU, need)
	case l.Flags&net.FlagUp == 0 && v != nil: // lockstep sets up a peer device itself
		d.missing(key, fmt.Sprintf("ip link set %s up", dev), "%s is down", dev)
	default:
		d.ok(key, "%s, MTU %d", dev, l.MTU)
	}
	if v != nil {
		if err := d.m.route(v); err != nil {
			d.missing(name("route"), fmt.Sprintf("ip addr add %s/24 dev %s, or ip route add %s dev %s", v.Local, dev, v.Remote, dev),
				"no way from %s to %s by %s: %v", v.Local, v.Remote, dev, err)
		} else {
			d.ok(name("route"), "from %s to %s by %s", v.Local, v.Remote, dev)
		}
		return // a VXLAN device has no native XDP
	}
	native, err := d.m.nativeXDP(dev)
	switch {
	case nic.XDP == config.XDPOff:
		d.ok(name("xdp"), "switched off in the config")
	case native:
		d.ok(name("xdp"), "%s's driver runs it: forged frames are dropped early", dev)
	case nic.XDP == config.XDPOn && err == nil:
		d.missing(name("xdp"), "peer.xdp: auto", "%s's driver runs no XDP, and the config insists on it", dev)
	case err != nil:
		d.ok(name("xdp"), "not known, and not needed: %v", err)
	default:
		d.ok(name("xdp"), "%s's driver runs none, and none is needed", dev)
	}
}

// inFront looks for who sees the guest's frames before lockstep does.
func (d *doctor) inFront(name, tap string) {
	passOn, read, err := d.m.inFront(tap)
	if err != nil {
		d.warn(name, "", "%v", err)
	}
	for _, what := range passOn {
		found, fix, _ := strings.Cut(what, ": ")
		d.missing(name, fix, "%s", found)
	}
	for _, what := range read {
		d.warn(name, "end it where that matters", "%s", what)
	}
	if len(passOn) == 0 && len(read) == 0 && err == nil {
		d.ok(name, "nobody sees %s's frames before lockstep does", tap)
	}
}

// writable looks for what is there of a folder's path, and whether the rest can
// be made.
func writable(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		st, err := os.Stat(at)
		if errors.Is(err, os.ErrNotExist) && at != filepath.Dir(at) {
			continue
		}
		if err == nil && !st.IsDir() {
			err = fmt.Errorf("%s is not a folder", at)
		}
		if err == nil {
			const write = 2 // W_OK
			if err = syscall.Access(at, write); err != nil {
				err = fmt.Errorf("%s cannot be written: %w", at, err)
			}
		}
		return err
	}
}
