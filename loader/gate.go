// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"lockstep/bpf"
	"lockstep/control/datapath"
)

// MAC implements [datapath.NIC].
func (n *NIC) MAC() net.HardwareAddr { return n.signer.own }

// SetMode implements [datapath.NIC].
func (n *NIC) SetMode(m datapath.Mode) error {
	atomic.StoreUint32(&n.conf.Mode, uint32(m))
	if m != datapath.ModeShut && m != datapath.ModeQuiet || n.hasty {
		return nil
	}
	// Who looked at the mode before may still let a frame out, or return an echo.
	return grace()
}

// SetEpoch implements [datapath.NIC].
func (n *NIC) SetEpoch(e uint32) error {
	n.signer.epoch = e
	atomic.StoreUint32(&n.conf.Epoch, e)
	return nil
}

// SetLeaseUntil implements [datapath.NIC].
func (n *NIC) SetLeaseUntil(t int64) error {
	atomic.StoreUint64(&n.conf.LeaseUntil, uint64(t))
	return nil
}

// SetLeaseDuration implements [datapath.NIC].
func (n *NIC) SetLeaseDuration(d time.Duration) error {
	atomic.StoreUint64(&n.conf.LeaseDuration, uint64(d))
	return nil
}

// rotation is how long frames of the term before are taken once keys rotated:
// those on their way, and what the peer signs until it has the new keys too.
const rotation = time.Second

// InstallSession implements [datapath.NIC]. Frames of the old term are
// refused from the moment the term changes, but for a rotation's.
func (n *NIC) InstallSession(s datapath.Session) error {
	k := bpf.LockstepLsKeys{SipTx: s.TxKey, SipRx: s.RxKey, Mix: s.Digest.Mix}
	for lane := range k.K {
		m := copy(k.K[lane][:], s.Digest.K[lane][:])
		copy(k.K[lane][m:], s.Digest.K[lane][:])
	}
	index := s.Term & 1
	if err := n.objs.LsKeys.Put(index, &k); err != nil {
		return fmt.Errorf("install keys: %w", err)
	}
	copy(n.conf.PeerMac[:], s.PeerMAC)
	copy(n.conf.OwnMac[:], n.signer.own)
	oldUntil := uint64(0)
	if s.Rotated {
		oldUntil = uint64(n.Now() + int64(rotation))
	}
	// Before the term: no frame of the old one is refused between the two. Until the
	// term changes, term - 1 would be verified with the new keys, and so refused.
	atomic.StoreUint64(&n.conf.OldUntil, oldUntil)
	atomic.StoreUint32(&n.conf.KeyIndex, index)
	atomic.StoreUint32(&n.conf.KeyGen, s.Term)
	n.signer.key, n.signer.term = s.TxKey, s.Term
	n.signer.to = append(net.HardwareAddr(nil), n.conf.PeerMac[:]...)
	if s.Rotated {
		return nil // the epoch may be changing at this very moment (R13)
	}
	atomic.StoreUint32(&n.conf.Epoch, s.Epoch)
	n.signer.epoch = s.Epoch
	return nil
}

// grace returns when every run of a program that was under way has ended. The
// kernel waits for just that before a change in a map of maps returns
// (maybe_wait_bpf_programs, seen in 6.18); membarrier(2) would not on a
// kernel with nohz_full.
func grace() error {
	inner := &ebpf.MapSpec{Name: "ls_grace_in", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	in, err := ebpf.NewMap(inner)
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer in.Close()
	out, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ls_grace", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	if err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	defer out.Close()
	if err := out.Put(uint32(0), in); err != nil {
		return fmt.Errorf("wait for programs: %w", err)
	}
	return nil
}

// LastEcho implements [datapath.NIC].
func (n *NIC) LastEcho() int64 { return int64(atomic.LoadUint64(&n.conf.Echoed)) }
