// SPDX-License-Identifier: Apache-2.0

// Package guestimage makes small real guests, for tests and benchmarks: a kernel and an initramfs
// that boot a static binary as the guest's service, and what QEMU needs to run COLO under
// TCG, where no KVM is. Production needs none of that:
//
//   - [Preload]: without it the primary deadlocks, or sleeps forever, at a checkpoint
//     (preload/bql.c).
//   - [Memory]: with a RAM that is a multiple of 256 KiB dirty pages are lost.
package guestimage

import (
	"debug/elf"
	_ "embed" // of bql.c
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Memory is the size of a guest's RAM in bytes: enough to boot the image and run a Go
// service, and no multiple of 256 KiB.
const Memory = 131056 << 10

// Guest is what an image has besides kernel and busybox.
type Guest struct {
	// Service is a static binary, run as /svc. What it prints goes to the serial
	// console ttyS0; its standard input never ends.
	Service string
	// Args are the service's arguments.
	Args []string
	// Env is the service's environment, "NAME=value".
	Env []string
	// Files are further files: paths in the guest → paths here.
	Files map[string]string
}

// Missing returns an error if dir is not a folder into which `make deps` has put kernel and modules, or
// [Preload] has no compiler.
func Missing(dir string) error {
	if !Fetched(dir) {
		return fmt.Errorf("no guest kernel in %s: run make deps", dir)
	}
	_, err := compiler()
	return err
}

// Kernel is the kernel in such a folder, for QEMU's -kernel.
func Kernel(dir string) string { return filepath.Join(dir, "vmlinuz") }

// Build writes the initramfs for QEMU's -initrd; [Append] makes the -append. dir is as in [Missing]. The
// guest loads the virtio modules, gives its NICs their addresses, mounts the first
// disk at /disk if that has an ext4 file system (a disk without one is there
// as /dev/vda all the same), prints "guest up" and runs the service.
func Build(initrd, dir string, g Guest) error {
	if err := build(initrd, dir, g); err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	return nil
}

// Append makes the kernel command line. nics are the guest's addresses, NIC by NIC, each
// in the form "10.77.0.2/24,fd77::2/64". more is appended; "gw=ADDRESS" in it gives a
// default route.
func Append(nics []string, more ...string) string {
	// The kernel passes parameters it does not know to init, as environment variables.
	line := []string{"console=ttyS0", "quiet", "panic=-1", "rdinit=/init"}
	for i, addrs := range nics {
		line = append(line, fmt.Sprintf("eth%d=%s", i, addrs))
	}
	return strings.Join(append(line, more...), " ")
}

// Disk makes a qcow2 image of size bytes. With ext4 it has a file system, which the guest
// mounts.
func Disk(path string, size int64, ext4 bool) error {
	if !ext4 {
		return run("qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	}
	raw := path + ".raw"
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		return err
	}
	defer os.Remove(raw)
	if err := os.Truncate(raw, size); err != nil {
		return err
	}
	if err := run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", raw); err != nil {
		return err
	}
	return run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
}

//go:embed preload/bql.c
var bql []byte

// Preload returns the environment variable "LD_PRELOAD=…" that a primary's QEMU needs
// under TCG. It builds the library, in dir.
func Preload(dir string) (env string, err error) {
	cc, err := compiler()
	if err != nil {
		return "", err
	}
	source, library := filepath.Join(dir, "bql.c"), filepath.Join(dir, "bql.so")
	if err := os.WriteFile(source, bql, 0o600); err != nil {
		return "", err
	}
	return "LD_PRELOAD=" + library, run(cc, "-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-o", library, source)
}

// compiler is a C compiler with headers and a linker.
func compiler() (path string, err error) {
	for _, c := range []string{"clang-19", "cc", "gcc", "clang"} { // the first is what make deps installs
		if path, err = exec.LookPath(c); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("QEMU under TCG needs a library that no C compiler is here for: install one (Debian: apt install gcc libc6-dev), or run make deps (%w)", err)
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w; make deps installs what is missing\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// modules are in the order in which they can be loaded.
var modules = []string{
	"virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"failover", "net_failover", "virtio_net", "virtio_blk",
}

// initScript is the guest's init. A NIC without an address is only set up.
const initScript = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in %s; do insmod /mods/$m.ko; done
cd /proc/sys/net/ipv6/conf
echo 0 > default/accept_dad; echo 0 > default/router_solicitations; echo 0 > default/accept_ra
cd /
ip link set lo up
for n in 0 1 2 3 4 5 6 7; do
	[ -e /sys/class/net/eth$n ] || break
	echo 0 > /proc/sys/net/ipv6/conf/eth$n/accept_dad
	eval "addrs=\$eth$n"
	for a in $(echo $addrs | tr , ' '); do ip addr add $a dev eth$n; done
	ip link set eth$n up
done
[ -z "$gw" ] || ip route add default via $gw
[ ! -e /dev/vda ] || mount -t ext4 /dev/vda /disk 2>/dev/null
echo guest up
env -i PATH=/bin %s/svc%s < /dev/console > /dev/console 2>&1
echo "guest: the service ended: $?"
exec sleep 1000000
`

// build writes the initramfs, a cpio archive. It is not compressed, because an emulated
// CPU takes longer to unpack than to read.
func build(path, parts string, g Guest) error {
	svc, err := service(g.Service)
	if err != nil {
		return err
	}
	var env, args strings.Builder
	for _, e := range g.Env {
		env.WriteString(quote(e) + " ")
	}
	for _, a := range g.Args {
		args.WriteString(" " + quote(a))
	}
	var c cpio
	for _, dir := range []string{"bin", "dev", "disk", "etc", "mods", "proc", "sys", "tmp"} {
		c.dir(dir)
	}
	c.file("init", 0o755, fmt.Appendf(nil, initScript, strings.Join(modules, " "), env.String(), args.String()))
	c.file("svc", 0o755, svc)
	files := map[string]string{"bin/busybox": filepath.Join(parts, "busybox")}
	for _, m := range modules {
		files["mods/"+m+".ko"] = filepath.Join(parts, m+".ko")
	}
	for to, from := range g.Files {
		files[strings.TrimPrefix(filepath.Clean("/"+to), "/")] = from
	}
	for _, to := range slices.Sorted(maps.Keys(files)) {
		b, err := os.ReadFile(files[to])
		if err != nil {
			return err
		}
		info, err := os.Stat(files[to])
		if err != nil {
			return err
		}
		c.file(to, uint32(info.Mode().Perm()), b)
	}
	return os.WriteFile(path, c.end(), 0o600)
}

// quote is a word of a shell's.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// service is a static binary without what is not loaded, like debugging information: it would
// take the guest's memory.
func service(path string) ([]byte, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("service: %w", err)
	}
	defer f.Close()
	end := uint64(0)
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_INTERP:
			return nil, fmt.Errorf("service %s is linked dynamically, and the guest has no libraries: build it with CGO_ENABLED=0", path)
		case elf.PT_LOAD:
			end = max(end, p.Off+p.Filesz)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return b[:min(end, uint64(len(b)))], nil
}

// cpio makes an archive in the "newc" format, which the kernel unpacks.
type cpio struct {
	b    []byte
	made map[string]bool // folders
	n    int
}

func (c *cpio) entry(name string, mode uint32, data []byte) {
	c.n++
	// Inode, mode, uid, gid, links, mtime, size, device, rdev, name's length, checksum.
	c.b = fmt.Appendf(c.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.n, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	c.b = append(append(c.b, name...), 0)
	c.pad()
	c.b = append(c.b, data...)
	c.pad()
}

func (c *cpio) pad() {
	for len(c.b)%4 != 0 {
		c.b = append(c.b, 0)
	}
}

func (c *cpio) dir(name string) {
	if name == "." || c.made[name] {
		return
	}
	c.dir(filepath.Dir(name))
	if c.made == nil {
		c.made = make(map[string]bool)
	}
	c.made[name] = true
	c.entry(name, 0o040755, nil)
}

func (c *cpio) file(name string, perm uint32, data []byte) {
	c.dir(filepath.Dir(name))
	c.entry(name, 0o100000|perm, data)
}

func (c *cpio) end() []byte {
	c.entry("TRAILER!!!", 0, nil)
	return c.b
}
