// SPDX-License-Identifier: Apache-2.0

package core

import (
	"fmt"
	"math"
	"net"
	"sync/atomic"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// Gate is what the programs decide by: the mode, the epoch, the session's keys, and the
// output lease (R20). It owns ls_conf and ls_keys.
type Gate struct {
	Conf  *bpf.LockstepLsConf // shared with the programs
	Keys  KeyTable
	Own   net.HardwareAddr // the peer device's
	txKey [2]uint64        // signs what this host sends
}

// KeyTable is the map ls_keys.
type KeyTable interface {
	Put(index uint32, k *bpf.LockstepLsKeys) error
	Lookup(index uint32, k *bpf.LockstepLsKeys) error
}

// MAC implements [datapath.NIC].
func (g *Gate) MAC() net.HardwareAddr { return g.Own }

// SetMode sets the mode. A program that runs meanwhile may still go by the mode before.
func (g *Gate) SetMode(m datapath.Mode) error {
	atomic.StoreUint32(&g.Conf.Mode, uint32(m))
	return nil
}

// SetEpoch implements [datapath.NIC].
func (g *Gate) SetEpoch(e uint32) error {
	atomic.StoreUint32(&g.Conf.Epoch, e)
	return nil
}

// SetLeaseUntil implements [datapath.NIC].
func (g *Gate) SetLeaseUntil(t int64) error {
	atomic.StoreUint64(&g.Conf.LeaseUntil, uint64(t))
	return nil
}

// SetLeaseDuration implements [datapath.NIC].
func (g *Gate) SetLeaseDuration(d time.Duration) error {
	atomic.StoreUint64(&g.Conf.LeaseDuration, uint64(d))
	return nil
}

// LastEcho implements [datapath.NIC].
func (g *Gate) LastEcho() int64 { return int64(atomic.LoadUint64(&g.Conf.Echoed)) }

// RotationOverlap is how long frames of the previous generation are accepted after the keys
// rotated: those under way, and what the peer signs until it has the new keys too.
const RotationOverlap = time.Second

// Install begins a session at boottime now, in ns. Frames of the previous key generation are
// refused from the moment the generation changes, except after a rotation.
func (g *Gate) Install(s datapath.Session, now int64) error {
	k := bpf.LockstepLsKeys{SipTx: s.TxKey, SipRx: s.RxKey, Mix: s.Digest.Mix}
	for lane := range k.K {
		m := copy(k.K[lane][:], s.Digest.K[lane][:])
		copy(k.K[lane][m:], s.Digest.K[lane][:])
	}
	index := s.Term & 1
	if err := g.Keys.Put(index, &k); err != nil {
		return fmt.Errorf("install keys: %w", err)
	}
	copy(g.Conf.PeerMac[:], s.PeerMAC)
	copy(g.Conf.OwnMac[:], g.Own)
	oldUntil := uint64(0)
	if s.Rotated {
		oldUntil = uint64(now + int64(RotationOverlap))
	}
	// Before the generation, so that no frame of the old one is refused between the two.
	// Until it changes, the one before it would be verified with the new keys, and refused.
	atomic.StoreUint64(&g.Conf.OldUntil, oldUntil)
	atomic.StoreUint32(&g.Conf.KeyIndex, index)
	atomic.StoreUint32(&g.Conf.KeyGen, s.Term)
	g.txKey = s.TxKey
	if !s.Rotated { // else the epoch may be changing at this very moment (R13)
		atomic.StoreUint32(&g.Conf.Epoch, s.Epoch)
	}
	return nil
}

// RecoveredSession is the session of the recovered tables, which continues.
func (g *Gate) RecoveredSession() (*datapath.Recovered, error) {
	var k bpf.LockstepLsKeys
	if err := g.Keys.Lookup(g.Conf.KeyIndex, &k); err != nil {
		return nil, fmt.Errorf("read pinned keys: %w", err)
	}
	g.txKey = k.SipTx
	r := &datapath.Recovered{Term: g.Conf.KeyGen, Epoch: g.Conf.Epoch, Mode: datapath.Mode(g.Conf.Mode)}
	r.Digest.Mix = k.Mix
	for lane := range k.K {
		copy(r.Digest.K[lane][:], k.K[lane][:])
	}
	return r, nil
}

// Inherit continues the session of a secondary that took over, whose lease never ends.
func (g *Gate) Inherit(c *bpf.LockstepLsConf) {
	g.Conf.KeyGen, g.Conf.Epoch = c.KeyGen, c.Epoch
	atomic.StoreUint64(&g.Conf.LeaseUntil, math.MaxInt64)
}
