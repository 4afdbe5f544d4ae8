// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// gate is the programs' live settings.
type gate struct {
	core.Gate
	conf     *confMemory
	skipWait bool // MutateWait
}

// keyTable is the map ls_keys.
type keyTable struct{ *ebpf.Map }

func (m keyTable) Put(index uint32, k *bpf.LockstepLsKeys) error    { return m.Map.Put(index, k) }
func (m keyTable) Lookup(index uint32, k *bpf.LockstepLsKeys) error { return m.Map.Lookup(index, k) }

func newGate(objs *bpf.LockstepObjects, peer netlink.Link, skipWait bool) (*gate, error) {
	conf, err := mapConf(objs.LsConf)
	if err != nil {
		return nil, err
	}
	g := &gate{conf: conf, skipWait: skipWait}
	g.Gate = core.Gate{Conf: conf.conf, Keys: keyTable{objs.LsKeys}, Own: peer.Attrs().HardwareAddr}
	return g, nil
}

func (g *gate) close() error { return g.conf.unmap() }

// SetMode implements [datapath.NIC]. When it returns after SHUT or QUIET, no program
// goes by the mode before any more.
func (g *gate) SetMode(m datapath.Mode) error {
	err := g.Gate.SetMode(m)
	if err != nil || m != datapath.ModeShut && m != datapath.ModeQuiet || g.skipWait {
		return err
	}
	// A program that read the mode before may still let a frame out, or return an echo.
	return waitRCU()
}

// InstallSession implements [datapath.NIC].
func (g *gate) InstallSession(s datapath.Session) error { return g.Install(s, bootTime()) }

func (g *gate) goSolo() { atomic.StoreUint32(&g.conf.Mode, uint32(datapath.ModeSolo)) }

// waitRCU returns when every run of a program that was under way has ended. The
// kernel waits for just that before a change in a map of maps returns
// (maybe_wait_bpf_programs, seen in 6.18); membarrier(2) would not on a
// kernel with nohz_full.
func waitRCU() error {
	inner := &ebpf.MapSpec{Name: "ls_rcu_in", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	in, err := ebpf.NewMap(inner)
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer in.Close()
	out, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ls_rcu", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer out.Close()
	if err := out.Put(uint32(0), in); err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	return nil
}
