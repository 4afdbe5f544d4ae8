// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"log/slog"
	"sync/atomic"

	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// transmitter carries out effects: it sends frames in the guests' name and records to
// the peer, and frees slots.
type transmitter struct {
	core.Transmitter
	log     *slog.Logger
	sockets []*packetConn
}

// outlet is a socket on a device, with the counter of what the kernel refused there.
type outlet struct {
	*packetConn
	log    *slog.Logger
	device string
	lost   *atomic.Uint64
}

// Flush implements [core.Outlet].
func (o *outlet) Flush() {
	if lost, err := o.flush(); lost > 0 {
		o.lost.Add(uint64(lost))
		o.log.Debug("frames not sent", "device", o.device, "frames", lost, "err", err)
	}
}

// Lost implements [core.Outlet].
func (o *outlet) Lost() { o.lost.Add(1) }

func newSigner(role Role, g *core.Gate) core.Signer {
	if role == Secondary {
		return core.Signer{Gate: g, Dir: bpf.LockstepLsDirLS_DIR_S2P}
	}
	return core.Signer{Gate: g, Dir: bpf.LockstepLsDirLS_DIR_P2S}
}

func (t *transmitter) open(role Role, tap, peer netlink.Link, m marks, c *counters) error {
	mark := m.release
	if role == Secondary {
		mark = m.parked
	}
	for _, o := range []struct {
		out  *core.Outlet
		dev  netlink.Link
		mark uint32
		lost *atomic.Uint64
	}{
		{&t.ToTap, tap, mark, &c.lost.tap},
		{&t.Retransmit, tap, m.release, &c.lost.tap},
		{&t.ToGuest, tap, m.mirrored, &c.lost.tap},
		{&t.ToPeer, peer, 0, &c.lost.peer},
	} {
		conn, err := newPacketConn(o.dev.Attrs().Index, o.mark)
		if err != nil {
			return err
		}
		t.sockets = append(t.sockets, conn)
		*o.out = &outlet{conn, t.log, o.dev.Attrs().Name, o.lost}
	}
	return nil
}

func (t *transmitter) close() error {
	var errs []error
	for _, s := range t.sockets {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// Apply implements [datapath.NIC].
func (t *transmitter) Apply(effs []compare.Effect) error {
	t.Transmitter.Apply(effs)
	return nil
}

// RequestEcho implements [datapath.NIC].
func (t *transmitter) RequestEcho() error {
	t.Transmitter.RequestEcho(bootTime())
	return nil
}

// MarkStop implements [datapath.NIC].
func (t *transmitter) MarkStop() error {
	t.Transmitter.MarkStop()
	return nil
}
