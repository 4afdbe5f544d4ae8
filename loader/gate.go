// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"math"
	"net"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// gate is what the programs decide by: the mode, the epoch, the session's keys, and the
// output lease (R20). It owns ls_conf and ls_keys.
type gate struct {
	conf     *confMemory
	keys     *ebpf.Map
	mac      net.HardwareAddr // the peer device's own
	txKey    [2]uint64        // signs what this host sends
	skipWait bool             // MutateWait
}

func newGate(objs *bpf.LockstepObjects, peer netlink.Link, skipWait bool) (*gate, error) {
	conf, err := mapConf(objs.LsConf)
	if err != nil {
		return nil, err
	}
	return &gate{conf: conf, keys: objs.LsKeys, mac: peer.Attrs().HardwareAddr, skipWait: skipWait}, nil
}

func (g *gate) close() error { return g.conf.unmap() }

// MAC implements [datapath.NIC].
func (g *gate) MAC() net.HardwareAddr { return g.mac }

// SetMode implements [datapath.NIC]. When it returns after SHUT or QUIET, no program
// goes by the mode before any more.
func (g *gate) SetMode(m datapath.Mode) error {
	atomic.StoreUint32(&g.conf.Mode, uint32(m))
	if m != datapath.ModeShut && m != datapath.ModeQuiet || g.skipWait {
		return nil
	}
	// A program that read the mode before may still let a frame out, or return an echo.
	return waitRCU()
}

// SetEpoch implements [datapath.NIC].
func (g *gate) SetEpoch(e uint32) error {
	atomic.StoreUint32(&g.conf.Epoch, e)
	return nil
}

// SetLeaseUntil implements [datapath.NIC].
func (g *gate) SetLeaseUntil(t int64) error {
	atomic.StoreUint64(&g.conf.LeaseUntil, uint64(t))
	return nil
}

// SetLeaseDuration implements [datapath.NIC].
func (g *gate) SetLeaseDuration(d time.Duration) error {
	atomic.StoreUint64(&g.conf.LeaseDuration, uint64(d))
	return nil
}

// LastEcho implements [datapath.NIC].
func (g *gate) LastEcho() int64 { return int64(atomic.LoadUint64(&g.conf.Echoed)) }

// rotationOverlap is how long frames of the previous generation are accepted after the keys
// rotated: those under way, and what the peer signs until it has the new keys too.
const rotationOverlap = time.Second

// InstallSession implements [datapath.NIC]. Frames of the previous key generation are
// refused from the moment the generation changes, except after a rotation.
func (g *gate) InstallSession(s datapath.Session) error {
	k := bpf.LockstepLsKeys{SipTx: s.TxKey, SipRx: s.RxKey, Mix: s.Digest.Mix}
	for lane := range k.K {
		m := copy(k.K[lane][:], s.Digest.K[lane][:])
		copy(k.K[lane][m:], s.Digest.K[lane][:])
	}
	index := s.Term & 1
	if err := g.keys.Put(index, &k); err != nil {
		return fmt.Errorf("install keys: %w", err)
	}
	copy(g.conf.PeerMac[:], s.PeerMAC)
	copy(g.conf.OwnMac[:], g.mac)
	oldUntil := uint64(0)
	if s.Rotated {
		oldUntil = uint64(bootTime() + int64(rotationOverlap))
	}
	// Before the generation, so that no frame of the old one is refused between the two.
	// Until it changes, the one before it would be verified with the new keys, and refused.
	atomic.StoreUint64(&g.conf.OldUntil, oldUntil)
	atomic.StoreUint32(&g.conf.KeyIndex, index)
	atomic.StoreUint32(&g.conf.KeyGen, s.Term)
	g.txKey = s.TxKey
	if !s.Rotated { // else the epoch may be changing at this very moment (R13)
		atomic.StoreUint32(&g.conf.Epoch, s.Epoch)
	}
	return nil
}

// recoveredSession is the session of the recovered tables, which continues.
func (g *gate) recoveredSession() (*datapath.Recovered, error) {
	var k bpf.LockstepLsKeys
	if err := g.keys.Lookup(g.conf.KeyIndex, &k); err != nil {
		return nil, fmt.Errorf("read pinned keys: %w", err)
	}
	g.txKey = k.SipTx
	r := &datapath.Recovered{Term: g.conf.KeyGen, Epoch: g.conf.Epoch, Mode: datapath.Mode(g.conf.Mode)}
	r.Digest.Mix = k.Mix
	for lane := range k.K {
		copy(r.Digest.K[lane][:], k.K[lane][:])
	}
	return r, nil
}

// inherit continues the session of a secondary that took over, whose lease never ends.
func (g *gate) inherit(c *conf) {
	g.conf.KeyGen, g.conf.Epoch = c.KeyGen, c.Epoch
	atomic.StoreUint64(&g.conf.LeaseUntil, math.MaxInt64)
}

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
