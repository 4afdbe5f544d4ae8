// SPDX-License-Identifier: Apache-2.0

// Package probe finds out what this host's kernel and devices can do.
package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// inScratchNetns runs f in a network namespace of its own, so that f does not affect
// this host's devices.
func inScratchNetns(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, and the namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// TCX attaches a program by tcx, which kernels before 6.6 cannot.
func TCX() error {
	return inScratchNetns(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("device lo: %w", err)
		}
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "ls_probe", Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TCX_NEXT
		})
		if err != nil {
			return fmt.Errorf("load a program: %w", err)
		}
		defer prog.Close()
		l, err := link.AttachTCX(link.TCXOptions{Interface: lo.Attrs().Index, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return fmt.Errorf("attach a program by tcx: %w", err)
		}
		return l.Close()
	})
}

// VXLAN makes a VXLAN device.
func VXLAN() error {
	return inScratchNetns(func() error {
		err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "lsx1"}, VxlanId: 1, Port: 4790})
		if err != nil {
			return fmt.Errorf("create a vxlan: %w", err)
		}
		return nil
	})
}

// Of linux/netdev.h.
const (
	netdevCmdDevGet       = 1
	netdevAttrIfindex     = 1
	netdevAttrXDPFeatures = 3
	netdevXDPBasic        = 1
)

// NativeXDP reports whether the device's driver runs XDP programs itself. It asks the
// kernel; to attach a program would reset some NICs.
func NativeXDP(device string) (bool, error) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return false, fmt.Errorf("device %s: %w", device, err)
	}
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return false, fmt.Errorf("xdp features of %s: %w", device, err)
	}
	req := nl.NewNetlinkRequest(int(family.ID), 0)
	// nl.Genlmsg does not initialize the reserved bytes, and this family wants zeros.
	head := []byte{netdevCmdDevGet, 1, 0, 0}
	req.AddRawData(append(head, nl.NewRtAttr(netdevAttrIfindex, nl.Uint32Attr(uint32(l.Attrs().Index))).Serialize()...))
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return false, fmt.Errorf("xdp features of %s: %w", device, err)
	}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofGenlmsg:])
		if err != nil {
			return false, fmt.Errorf("xdp features of %s: %w", device, err)
		}
		for _, a := range attrs {
			if a.Attr.Type == netdevAttrXDPFeatures && len(a.Value) == 8 {
				return binary.NativeEndian.Uint64(a.Value)&netdevXDPBasic != 0, nil
			}
		}
	}
	return false, fmt.Errorf("xdp features of %s: %w", device, errors.New("the kernel does not report them"))
}
