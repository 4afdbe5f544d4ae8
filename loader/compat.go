// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// settings are the settings that differ between this config and the one whose hash is
// pinned.
func (o *Options) settings(pinned [32]byte, alone bool) (out []difference) {
	if pinned == o.ConfigHash {
		return nil
	}
	if o.Differ == nil {
		return []difference{{fmt.Sprintf("config %x", pinned[:4]), fmt.Sprintf("config %x", o.ConfigHash[:4])}}
	}
	for _, name := range o.Differ(pinned, alone) {
		out = append(out, difference{"another " + name, "this " + name})
	}
	return out
}

// metaOf describes what tables of these options are made for.
func metaOf(o *Options) bpf.LockstepLsMeta {
	m := bpf.LockstepLsMeta{
		Abi: uint32(bpf.LockstepLsConstLS_ABI_VERSION), Role: uint32(o.Role),
		MaxConns: uint32(o.MaxConnections), Slots: uint32(o.Slots), GsoSlots: uint32(o.GSOSlots), Config: o.ConfigHash,
	}
	copy(m.Version[:len(m.Version)-1], o.Version)
	return m
}

// writeMeta notes for the next daemon what the tables are made for. In recovered tables
// (old is not nil) only the config may have changed.
func writeMeta(m *ebpf.Map, o *Options, tap netlink.Link, old *tables) (bpf.LockstepLsMeta, error) {
	var meta bpf.LockstepLsMeta
	if old != nil {
		meta = old.meta
		meta.Config = o.ConfigHash
	} else {
		meta = metaOf(o)
		if s := tap.Attrs().Statistics; s != nil {
			meta.TapBase = uint32(s.TxPackets + s.TxDropped)
		}
	}
	if err := m.Put(uint32(0), &meta); err != nil {
		return meta, fmt.Errorf("write down what the tables are for: %w", err)
	}
	return meta, nil
}

// difference is one property, of the pinned tables and as this daemon wants it.
type difference struct{ pinned, own string }

func differences(pinned, own *bpf.LockstepLsMeta) (out []difference) {
	numbers := func(name string, a, b uint32) {
		if a != b {
			out = append(out, difference{fmt.Sprintf("%s %d", name, a), fmt.Sprintf("%s %d", name, b)})
		}
	}
	numbers("ABI", pinned.Abi, own.Abi)
	if len(out) > 0 {
		return out // the other fields may be elsewhere
	}
	if pinned.Role != own.Role && own.Role != 0 {
		out = append(out, difference{"role " + Role(pinned.Role).String(), "role " + Role(own.Role).String()})
	}
	numbers("max_connections", pinned.MaxConns, own.MaxConns)
	numbers("slots", pinned.Slots, own.Slots)
	numbers("gso_slots", pinned.GsoSlots, own.GsoSlots)
	return out
}

// refusal is the error that names both sides.
func refusal(pinned, own *bpf.LockstepLsMeta, differ []difference) error {
	var theirs, ours []string
	for _, d := range differ {
		theirs, ours = append(theirs, d.pinned), append(ours, d.own)
	}
	return fmt.Errorf("pinned by lockstep %s with %s; this is lockstep %s with %s: run lockstep %[1]s with the config it had; "+
		"docs/CONFIG.md says under \"Changing a setting\" how a pair that runs gets another",
		versionOf(pinned), strings.Join(theirs, ", "), versionOf(own), strings.Join(ours, ", "))
}

func versionOf(m *bpf.LockstepLsMeta) string {
	v, _, _ := bytes.Cut(m.Version[:], []byte{0})
	return string(v)
}

// CheckUpgrade reports whether Open with these options would recover what is pinned,
// up to loading the programs, and changes nothing. Role 0 is that of the pinned tables.
// It returns the version of the lockstep that made them.
func CheckUpgrade(o Options) (version string, err error) {
	pins := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if !pins.exists() {
		return "", fmt.Errorf("nothing to take over: %s does not exist", pins)
	}
	tap, err := netlink.LinkByName(o.Tap)
	if err != nil {
		return "", fmt.Errorf("nothing to take over: tap %s: %w", o.Tap, err)
	}
	if here, err := guards(pins, &o, tap); err != nil {
		return "", err
	} else if !here {
		return "", fmt.Errorf("nothing to take over: what is pinned does not guard tap %s", o.Tap)
	}
	old, err := openTables(pins, o)
	if err != nil {
		return "", err
	}
	defer old.close()
	o.Role = Role(old.meta.Role)
	spec, err := sized(o.sizes())
	if err != nil {
		return "", err
	}
	var objs bpf.LockstepObjects
	if _, err := loadOver(o.Role, spec, old, &objs); err != nil {
		return "", err
	}
	return versionOf(&old.meta), objs.Close()
}

// Pinned describes what an earlier daemon left pinned for a NIC, whatever its role was.
// Whether it fits these options is checked by Open, but for the ABI.
func Pinned(o Options) (datapath.Pinned, error) {
	tap, err := netlink.LinkByName(o.Tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return datapath.Pinned{}, nil // the programs went with the tap
	}
	if err != nil {
		return datapath.Pinned{}, fmt.Errorf("tap %s: %w", o.Tap, err)
	}
	pins := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if here, err := guards(pins, &o, tap); !here || err != nil {
		return datapath.Pinned{}, err
	}
	t, err := openMeta(pins)
	if err != nil {
		return datapath.Pinned{}, err
	}
	defer t.close()
	own := metaOf(&o)
	if t.meta.Abi != own.Abi {
		return datapath.Pinned{}, refusal(&t.meta, &own, differences(&t.meta, &own))
	}
	mode, err := pinnedMode(pins)
	if err != nil {
		return datapath.Pinned{}, err
	}
	return datapath.Pinned{Role: datapath.Role(Role(t.meta.Role).String()), Mode: mode}, nil
}
