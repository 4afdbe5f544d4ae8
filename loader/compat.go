// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"errors"
	"lockstep/bpf"
	"lockstep/control/datapath"
)

// settings are the differences of a config whose hash is pinned.
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

// metaOf is what tables are made for.
func metaOf(o Options) bpf.LockstepLsMeta {
	m := bpf.LockstepLsMeta{
		Abi: uint32(bpf.LockstepLsConstLS_ABI_VERSION), Role: uint32(o.Role),
		MaxConns: uint32(o.MaxConnections), Slots: uint32(o.Slots), GsoSlots: uint32(o.GSOSlots), Config: o.ConfigHash,
	}
	copy(m.Version[:len(m.Version)-1], o.Version)
	return m
}

// difference is the same thing as the tables have it and as it is wanted.
type difference struct{ pinned, own string }

func differences(pinned, own *bpf.LockstepLsMeta) (out []difference) {
	numbers := func(name string, a, b uint32) {
		if a != b {
			out = append(out, difference{fmt.Sprintf("%s %d", name, a), fmt.Sprintf("%s %d", name, b)})
		}
	}
	numbers("ABI", pinned.Abi, own.Abi)
	if len(out) > 0 {
		return out // who knows where the rest is
	}
	if pinned.Role != own.Role && own.Role != 0 {
		out = append(out, difference{"role " + Role(pinned.Role).String(), "role " + Role(own.Role).String()})
	}
	numbers("max_connections", pinned.MaxConns, own.MaxConns)
	numbers("slots", pinned.Slots, own.Slots)
	numbers("gso_slots", pinned.GsoSlots, own.GsoSlots)
	return out
}

// refusal names both sides.
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

// CheckUpgrade reports whether Open with these options would go on from what is
// pinned, down to the kernel's taking the programs, and changes nothing. Role 0
// is the one that the tables were made for. It returns the version that made them.
func CheckUpgrade(o Options) (version string, err error) {
	dir := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("nothing to take over: %w", err)
	}
	tap, err := netlink.LinkByName(o.Tap)
	if err != nil {
		return "", fmt.Errorf("nothing to take over: tap %s: %w", o.Tap, err)
	}
	if here, err := guardHere(dir, o, tap); err != nil {
		return "", err
	} else if !here {
		return "", fmt.Errorf("nothing to take over: what is pinned does not guard tap %s", o.Tap)
	}
	old, err := openTables(dir, o)
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
	if _, err := loadOver(spec, old, &objs); err != nil {
		return "", err
	}
	return versionOf(&old.meta), objs.Close()
}

// Found tells what an earlier daemon left pinned for a NIC, whatever role it had.
func Found(o Options) (datapath.Pinned, error) {
	tap, err := netlink.LinkByName(o.Tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return datapath.Pinned{}, nil // with the tap goes what guarded it
	}
	if err != nil {
		return datapath.Pinned{}, fmt.Errorf("tap %s: %w", o.Tap, err)
	}
	dir := nicDir(o.PinDir, o.VM, o.Node, o.NIC)
	if here, err := guardHere(dir, o, tap); !here || err != nil {
		return datapath.Pinned{}, err
	}
	// Whether they fit is asked only by whoever goes on from them.
	t, err := openMeta(dir)
	if err != nil {
		return datapath.Pinned{}, err
	}
	defer t.close()
	own := metaOf(o)
	if t.meta.Abi != own.Abi {
		return datapath.Pinned{}, refusal(&t.meta, &own, differences(&t.meta, &own))
	}
	mode, err := pinnedMode(dir)
	if err != nil {
		return datapath.Pinned{}, err
	}
	return datapath.Pinned{Role: datapath.Role(Role(t.meta.Role).String()), Mode: mode}, nil
}
