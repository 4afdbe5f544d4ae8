// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"net"

	"lockstep/control"
	"lockstep/control/config"
	"lockstep/loader"
)

// kernel is what the program needs of the kernel: package loader, or a test's.
type kernel struct {
	checkBPFFS  func(pinDir string) error
	lock        func(pinDir, vm, node string) (release func(), err error)
	device      func(name string) (*net.Interface, error)
	ensureVXLAN func(v *config.VXLAN, guestMTU int) (device string, err error)
	removeVXLAN func(device string) error
	ensureTap   func(tap, bridge string) error
	removeTap   func(tap string) error
	inUse       func(tap string) (bool, error) // a process has it open
	mute        func(tap string) error         // sets it down
	open        func(nicOptions) (dp control.DataPath, fresh bool, err error)
	upgradable  func(nicOptions) (from string, err error)       // the version to take over from
	unload      func(pinDir, vm, node string, force bool) error // sets the taps down
	letGo       func(pinDir, vm, node string, force bool) error // leaves the taps as they are
	found       func(nicOptions) (control.Found, error)         // what an earlier daemon left
}

// nicOptions are what a NIC's programs and maps are made with.
type nicOptions struct {
	pinDir, vm, node string
	index            int
	primary          bool
	discard          bool   // what is there of an earlier part
	tap, peer        string // devices
	compare          config.Compare
	rules            []config.Rule
	xdp              string
	hash             [32]byte // of the config
	log              *slog.Logger
}

// mutation names a rule that this build leaves out, and is empty but in tests that show
// that they notice it missing: go build -ldflags "-X main.mutation=R9".
var mutation string

var mutations = map[string]loader.Mutation{
	"R9": loader.MutateR9, "guard": loader.MutateGuard, "edges": loader.MutateEdge, "quotes": loader.MutateQuote,
}

var realKernel = kernel{
	checkBPFFS: loader.CheckBPFFS,
	lock:       loader.Lock,
	device:     net.InterfaceByName,
	ensureVXLAN: func(v *config.VXLAN, guestMTU int) (string, error) {
		return loader.EnsureVXLAN(loader.VXLAN{
			Name: v.Device(), ID: int(v.ID), Port: int(v.Port),
			Local: v.Local.AsSlice(), Remote: v.Remote.AsSlice(),
			Underlay: v.Underlay, GuestMTU: guestMTU,
		})
	},
	removeVXLAN: loader.RemoveVXLAN,
	ensureTap:   loader.EnsureTap,
	removeTap:   loader.RemoveTap,
	inUse:       loader.TapInUse,
	mute:        loader.Mute,
	open:        openNIC,
	upgradable: func(o nicOptions) (string, error) {
		l := loaderOptions(o)
		l.Role = 0
		return loader.CheckUpgrade(l)
	},
	unload: loader.Unload,
	letGo:  loader.LetGo,
	found:  func(o nicOptions) (control.Found, error) { return loader.Found(loaderOptions(o)) },
}

// loaderOptions are a NIC's.
func loaderOptions(o nicOptions) loader.Options {
	role := loader.Secondary
	if o.primary {
		role = loader.Primary
	}
	var rules []loader.Rule
	for _, r := range o.rules {
		rules = append(rules, loader.Rule(r))
	}
	return loader.Options{
		PinDir: o.pinDir, VM: o.vm, Node: o.node, NIC: o.index, Role: role,
		Tap: o.tap, PeerDevice: o.peer,
		MaxConnections: o.compare.MaxConnections, Slots: o.compare.Slots, GSOSlots: o.compare.GSOSlots,
		Rules: rules, MPTCP: o.compare.MPTCP, XDP: o.xdp, ConfigHash: o.hash, Version: versionString(),
		Differ: func(pinned [32]byte, alone bool) []string {
			if alone { // nobody else depends on the rest
				return config.DifferFixed(pinned, o.hash)
			}
			return config.Differ(pinned, o.hash)
		},
		Log: o.log, Mutation: mutations[mutation], Discard: o.discard,
	}
}

func openNIC(o nicOptions) (dp control.DataPath, fresh bool, err error) {
	n, err := loader.Open(loaderOptions(o))
	if err != nil {
		return nil, false, err // not n: a nil *NIC in an interface is not nil
	}
	return n, n.Adopted() == nil, nil
}
