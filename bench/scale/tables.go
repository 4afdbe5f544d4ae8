// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/workload"
	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader"
)

// maxConnections is the largest compare.max_connections.
const maxConnections = 1 << 20

// tables measures what the secondary's daemon does with its tables, by itself: entries are put there without
// connections, which would be too many for this machine's sockets.
func (b *bench) tables(ctx context.Context) error {
	for _, n := range b.sizes {
		if err := ctx.Err(); err != nil {
			return err
		}
		b.progress("tables with " + count(n) + " connections")
		if err := b.tablesOf(n); err != nil {
			return fmt.Errorf("tables with %s connections: %w", count(n), err)
		}
	}
	return nil
}

func (b *bench) tablesOf(n int) (err error) {
	ns, err := lab.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := errors.Join(ns.Veth("tapS", ns, "guest"), ns.Veth("peerS", ns, "peerP")); err != nil {
		return err
	}
	pins, err := os.MkdirTemp("", "lsb")
	if err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.Remove(pins)) }()
	if err := unix.Mount("bpf", pins, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(pins, 0)) }()
	return ns.Do(func() (err error) {
		nic, err := loader.Open(loader.Options{
			PinDir: pins, VM: "bench", Node: "beta", Role: loader.Secondary, Tap: "tapS", PeerDevice: "peerS",
			MaxConnections: min(maxConnections, room(n)), Slots: 16, GSOSlots: 1, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, nic.Close()) }()
		t := &entries{nic: nic, n: n}
		for name, m := range map[string]**ebpf.Map{bpf.LockstepMapLsConn: &t.conns, bpf.LockstepMapLsInherited: &t.inherited} {
			if *m, err = ebpf.LoadPinnedMap(filepath.Join(pins, "bench", "beta", "nic0", name), nil); err != nil {
				return fmt.Errorf("open the table %s: %w", name, err)
			}
			defer (*m).Close()
		}
		for range b.rounds {
			if err := b.tablesOnce(t); err != nil {
				return err
			}
		}
		return nil
	})
}

// entries are those of a NIC's tables.
type entries struct {
	nic              *loader.NIC
	conns, inherited *ebpf.Map
	n                int
}

// fill puts n connections into the tables: with offsets, and as they came with a checkpoint.
func (t *entries) fill() error {
	const batch = 4096
	for from := 0; from < t.n; from += batch {
		size := min(batch, t.n-from)
		keys, conns, inherited := make([]bpf.LockstepLsTuple, size), make([]bpf.LockstepLsConn, size), make([]bpf.LockstepLsInh, size)
		for i := range keys {
			keys[i] = tupleOf(from + i)
			conns[i].Last = uint64(t.nic.Now())
		}
		for m, values := range map[*ebpf.Map]any{t.conns: conns, t.inherited: inherited} {
			if _, err := m.BatchUpdate(keys, values, nil); err != nil {
				return fmt.Errorf("fill %s: %w", m, err)
			}
		}
	}
	return nil
}

// tupleOf is the i-th connection's.
func tupleOf(i int) bpf.LockstepLsTuple {
	t := bpf.LockstepLsTuple{Gport: workload.Port, Rport: uint16(i), Proto: unix.IPPROTO_TCP}
	copy(t.Guest[:], lab.GuestIP.To16())
	copy(t.Remote[:], net.IPv4(10, 78, byte(i>>24), byte(i>>16)).To16())
	return t
}

func (b *bench) tablesOnce(t *entries) error {
	for _, m := range []struct {
		group string
		f     func() error
	}{
		{"S's tables alone: sweep, once a second", func() error {
			_, err := t.nic.Sweep(time.Hour, 2*time.Hour)
			return err
		}},
		{"S's tables alone: status", func() error { return t.nic.Offsets(func(compare.Tuple, datapath.Offset) {}) }},
		{"S's tables alone: reset at a checkpoint, while the SVM stands still", t.nic.ResetOffsets},
		{"S's tables alone: takeover", func() error { return t.nic.TakeOver(1, false) }},
	} {
		if err := t.fill(); err != nil {
			return err
		}
		began := time.Now()
		if err := m.f(); err != nil {
			return err
		}
		took := time.Since(began)
		b.alone(figure(m.group, "ms", true, t.n, "connections"), float64(took)/1e6, "it has no such tables")
	}
	return nil
}
