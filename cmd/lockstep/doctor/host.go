// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/qemu"
)

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
	d.try("programs", "run `lockstep run --verifier-log` for the kernel's own message, and report it with `uname -a`",
		"the kernel takes them all", d.m.programs)
	d.ok("compiler", "none is needed: the programs are inside lockstep")
	if c == nil || usesVXLAN(c) {
		d.try("vxlan", "modprobe vxlan (CONFIG_VXLAN); or give each NIC a peer device of its own", "devices can be made", d.m.vxlan)
	}
	pins := config.DefaultPinDir
	if c != nil {
		pins = c.PinDir
	}
	if err := d.m.checkBPFFS(pins); err != nil {
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

// usesVXLAN reports whether a node of a config has lockstep make a VXLAN.
func usesVXLAN(c *config.Config) bool {
	return slices.ContainsFunc(c.Nodes, func(n config.Node) bool {
		return slices.ContainsFunc(n.NICs, func(nic config.NIC) bool { return nic.PeerVXLAN != nil })
	})
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
	case err != nil && c != nil && !slices.ContainsFunc(c.Nodes, func(n config.Node) bool { return n.Starts }):
		d.warn("qemu", install, "%v: lockstep does not start it here, and does not look at the one that somebody else starts", err)
		return
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
	if state == OK && accel == "tcg" && c != nil && c.QEMU != nil {
		why, state = "under TCG QEMU's COLO hangs at a checkpoint, for which lockstep's tests have a remedy of their own", Warning
		fix = "qemu: {accel: kvm}"
	}
	if state != OK {
		d.checks = append(d.checks, Check{"qemu", state, fmt.Sprintf("%s %s with %s: %s", name, number, accel, why), fix})
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

// colo reports how well COLO works in a release of QEMU under an accelerator.
func colo(version, accel string) (why, state string) {
	v := qemu.ParseVersion(version)
	broken := qemu.BrokenCOLO(v, accel)
	switch {
	case slices.Compare(v[:], []int{7, 2, 0}) < 0:
		return "older than 7.2, the first that lockstep is made for", Missing
	case broken != "":
		return broken, Missing
	case v[0] > 10 || v[0] == 10 && v[1] > 0:
		return "newer than 10.0, the last that lockstep was tried with", Warning
	}
	return "", OK
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
