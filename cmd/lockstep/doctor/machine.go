// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/program"
	"github.com/lockstep-ft/lockstep/control/qemu"
	"github.com/lockstep-ft/lockstep/loader"
	"github.com/lockstep-ft/lockstep/loader/device"
	"github.com/lockstep-ft/lockstep/loader/probe"
)

// machine is what the doctor looks at: the host it runs on, or a test's.
type machine struct {
	checkBPFFS   func(pinDir string) error
	device       func(name string) (*net.Interface, error)
	arch         string // Go's name
	release      func() (string, error)
	capabilities func() (missing []string, err error)
	exists       func(path string) bool
	writable     func(dir string) error // or what is above it
	tcx          func() error
	programs     func() error
	vxlan        func() error
	nativeXDP    func(device string) (bool, error)
	tap          func(device string) error                  // fit to be a guest's
	queues       func(tap, bridge string, queues int) error // can be opened by QEMU
	inFront      func(tap string) (passOn, read []string, err error)
	synchronised func() (bool, error) // CLOCK_REALTIME
	addresses    func() ([]netip.Addr, error)
	bridge       func(name string) error                   // fit for a tap
	vxlanFits    func(v *config.VXLAN, guestMTU int) error // can be made, or is there as it has to be
	route        func(v *config.VXLAN) error               // to the other end, from this one
	dial         func(ctx context.Context, addr netip.AddrPort) error
	command      func(ctx context.Context, name string, args ...string) (output string, err error)
	arbiter      func(ctx context.Context, c *config.Config, node string) (entry string, err error)
	guest        func(c *config.Config, self *config.Node) (running string, err error)
	memory       func() (total, available int64, err error) // bytes
	overlays     func(c *config.Config, self *config.Node) ([]overlayRoom, error)
}

var thisMachine = machine{
	checkBPFFS:   loader.CheckBPFFS,
	device:       net.InterfaceByName,
	arch:         runtime.GOARCH,
	release:      release,
	capabilities: missingCapabilities,
	exists: func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	},
	writable:     writable,
	tcx:          probe.TCX,
	programs:     loader.CheckPrograms,
	vxlan:        probe.VXLAN,
	nativeXDP:    probe.NativeXDP,
	tap:          device.CheckTap,
	queues:       device.CheckQueues,
	inFront:      loader.InFront,
	synchronised: synchronised,
	addresses:    addresses,
	bridge:       device.CheckBridge,
	vxlanFits: func(v *config.VXLAN, guestMTU int) error {
		x := VXLAN(v, guestMTU)
		_, err := device.CheckVXLAN(&x)
		return err
	},
	route: func(v *config.VXLAN) error {
		_, err := netlink.RouteGetWithOptions(v.Remote.AsSlice(), &netlink.RouteGetOptions{Oif: v.Underlay, SrcAddr: v.Local.AsSlice()})
		return err
	},
	dial: func(ctx context.Context, addr netip.AddrPort) error {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		return c.Close()
	},
	command: command,
	arbiter: func(ctx context.Context, c *config.Config, node string) (string, error) {
		a, err := arbiter.Open(c, node)
		if err != nil {
			return "", err
		}
		defer a.Close()
		rec, err := a.Read(ctx)
		return rec.String(), err
	},
	guest: func(c *config.Config, self *config.Node) (string, error) {
		spec := c.Guest(self)
		if p, err := qemu.Find(&spec); err == nil {
			defer p.Release()
			return fmt.Sprintf("it runs, as process %d", p.Pid()), nil
		}
		// Taps that `run` makes are looked at with the other devices.
		spec.NICs = slices.DeleteFunc(spec.NICs, func(n qemu.NIC) bool {
			return slices.ContainsFunc(self.NICs, func(own config.NIC) bool { return own.Tap == n.Tap && own.Bridge != "" })
		})
		in := c.Incoming(self) // either host may come to be the secondary's
		return "", spec.Check(&in, nil)
	},
	memory: memory,
	overlays: func(c *config.Config, self *config.Node) ([]overlayRoom, error) {
		spec := c.Guest(self)
		spaces, err := spec.Overlays()
		sizes, unknown := spec.DiskSizes() // where they are not known, the check of the guest reports why
		var rooms []overlayRoom
		for _, o := range spaces {
			r := overlayRoom{OverlaySpace: o}
			for i := range spec.Disks {
				if unknown == nil && slices.Contains(o.Disks, spec.Disks[i].ID) {
					r.most += 2*sizes[i] + sizes[i]/256 // both overlays, and qcow2's tables
				}
			}
			rooms = append(rooms, r)
		}
		return rooms, err
	},
}

// VXLAN is the peer device that a config describes, for a guest's NIC of an MTU.
func VXLAN(v *config.VXLAN, guestMTU int) device.VXLAN {
	return device.VXLAN{
		Name: v.Device(), ID: int(v.ID), Port: int(v.Port), Local: v.Local.AsSlice(), Remote: v.Remote.AsSlice(),
		Underlay: v.Underlay, GuestMTU: guestMTU, Turns: v.Turns,
	}
}

// memory reads /proc/meminfo.
func memory() (total, available int64, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		var key string
		var kib int64
		if n, _ := fmt.Sscan(line, &key, &kib); n < 2 {
			continue
		}
		switch key {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	if total == 0 || available == 0 {
		return 0, 0, errors.New("/proc/meminfo does not contain this host's memory")
	}
	return total, available, nil
}

// command runs a program and returns what it printed, however it ended: QEMU's
// lists come with either exit code.
func command(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*patience) // a first start may read much from disk
	defer cancel()
	out, errs, err := program.Output(ctx, name, args...)
	if ended := (*exec.ExitError)(nil); errors.As(err, &ended) && ended.Exited() {
		err = nil
	}
	return out + errs, err
}

func release() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

// needed are the capabilities without which the daemon does not start.
var needed = map[int]string{
	unix.CAP_NET_ADMIN: "CAP_NET_ADMIN", unix.CAP_NET_RAW: "CAP_NET_RAW", unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
	unix.CAP_PERFMON: "CAP_PERFMON", unix.CAP_BPF: "CAP_BPF",
}

func missingCapabilities() (missing []string, err error) {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	for c := range unix.CAP_LAST_CAP + 1 {
		if name := needed[c]; name != "" && data[c/32].Effective&(1<<(c%32)) == 0 {
			missing = append(missing, name)
		}
	}
	return missing, nil
}

func synchronised() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return false, fmt.Errorf("adjtimex: %w", err)
	}
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, nil
}

// addresses lists this host's own.
func addresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var list []netip.Addr
	for _, a := range all {
		text, _, _ := strings.Cut(a.String(), "/")
		if ip, err := netip.ParseAddr(text); err == nil {
			list = append(list, ip.Unmap().WithZone(""))
		}
	}
	return list, nil
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
