// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"strconv"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/doctor"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
	"github.com/lockstep-ft/lockstep/loader/device"
)

// kernel is what the program needs of the kernel: package loader, or a test's.
type kernel struct {
	checkBPFFS  func(pinDir string) error
	lock        func(pinDir, vm, node string) (release func(), err error)
	device      func(name string) (*net.Interface, error)
	ensureVXLAN func(v *config.VXLAN, guestMTU int) (device string, err error)
	directVXLAN func(v *config.VXLAN) error // has one that exists lead to its remote
	removeVXLAN func(device string) error
	ensureTap   func(tap, bridge string, queues int) error
	checkQueues func(tap, bridge string, queues int) error
	removeTap   func(tap string) error
	inUse       func(tap string) (bool, error) // a process has it open
	mute        func(tap string) error         // sets it down
	open        func(loader.Options) (dp datapath.NIC, fresh bool, err error)
	upgradable  func(loader.Options) (from string, err error)   // the version to take over from
	unload      func(pinDir, vm, node string, force bool) error // sets the taps down
	letGo       func(pinDir, vm, node string, force bool) error // leaves the taps as they are
	found       func(loader.Options) (datapath.Pinned, error)   // what an earlier daemon left
}

// mutation is the number of a [loader.Mutation] that this build has. Only tests build one,
// with -ldflags "-X main.mutation=1", to show that they notice it.
var mutation string

var realKernel = kernel{
	checkBPFFS: loader.CheckBPFFS,
	lock:       loader.Lock,
	device:     net.InterfaceByName,
	ensureVXLAN: func(v *config.VXLAN, guestMTU int) (string, error) {
		return device.EnsureVXLAN(doctor.VXLAN(v, guestMTU))
	},
	directVXLAN: func(v *config.VXLAN) error { return device.DirectVXLAN(v.Device(), v.Remote.AsSlice()) },
	removeVXLAN: device.RemoveVXLAN,
	ensureTap:   device.EnsureTap,
	checkQueues: device.CheckQueues,
	removeTap:   device.RemoveTap,
	inUse:       device.TapInUse,
	mute:        device.Mute,
	open:        openNIC,
	upgradable:  loader.CheckUpgrade,
	unload:      loader.Unload,
	letGo:       loader.Detach,
	found:       loader.Pinned,
}

func openNIC(o loader.Options) (dp datapath.NIC, fresh bool, err error) {
	if m, err := strconv.ParseUint(mutation, 10, 32); err == nil {
		o.Mutation = loader.Mutation(m)
	}
	n, err := loader.Open(o)
	if err != nil {
		return nil, false, err // not n: a nil *NIC in an interface is not nil
	}
	return n, n.Recovered() == nil, nil
}
