// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// tables are the maps that a daemon left pinned, and what they were made for.
type tables struct {
	meta bpf.LockstepLsMeta
	maps map[string]*ebpf.Map
}

func (t *tables) close() {
	if t != nil {
		for _, m := range t.maps {
			m.Close()
		}
	}
}

// conf is the programs' settings.
func (t *tables) conf() (c conf, err error) {
	if err := t.maps[bpf.LockstepMapLsConf].Lookup(uint32(0), &c); err != nil {
		return c, fmt.Errorf("read pinned map %s: %w", bpf.LockstepMapLsConf, err)
	}
	return c, nil
}

// recoveredTables are what Open goes on from: at most one of them.
type recoveredTables struct {
	sameRole *tables // of a daemon of the same role
	promoted *tables // of a secondary that took over and is to be a primary
}

func (r *recoveredTables) close() {
	r.sameRole.close()
	r.promoted.close()
}

func recoverTables(pins pinFolder, o Options, tap netlink.Link) (r recoveredTables, err error) {
	alone, err := promoted(pins)
	if err != nil || !alone || o.Role != Primary {
		r.sameRole, err = findTables(pins, o, tap)
		return r, err
	}
	o.Role = Secondary
	r.promoted, err = findTables(pins, o, tap)
	return r, err
}

// findTables opens what is pinned for a NIC with these options. nil: there is nothing
// to recover. If the tap is gone, so is its guest; the guest at a new tap of the same
// name has none of its connections.
func findTables(pins pinFolder, o Options, tap netlink.Link) (*tables, error) {
	if here, err := guards(pins, &o, tap); !here || err != nil {
		return nil, err
	}
	return openTables(pins, o)
}

// guards reports whether the pinned programs guard the tap.
func guards(pins pinFolder, o *Options, tap netlink.Link) (bool, error) {
	if !pins.exists() {
		return false, nil
	}
	guarded := 0
	for _, name := range []string{priOut, secOut} {
		at, err := deviceOf(pins.link(name))
		if err != nil {
			return false, err
		}
		guarded = max(guarded, at)
	}
	switch guarded {
	case tap.Attrs().Index:
		return true, nil
	case 0:
		o.Log.Info("tables made anew: the tap that they were for is gone", "nic", o.NIC, "tap", o.Tap)
		return false, nil
	}
	return false, fmt.Errorf("tap %s is device %d, but the pinned programs guard device %d: a guest keeps its tap as long as it runs; name that one, or end the guest and run `lockstep unload`",
		o.Tap, tap.Attrs().Index, guarded)
}

// deviceOf is the index of the device to which a pinned link attaches its program; 0:
// to none, or there is no such link.
func deviceOf(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("pinned link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("pinned link %s: %w", pin, err)
	}
	if tcx := info.TCX(); tcx != nil {
		return int(tcx.Ifindex), nil
	}
	return 0, nil
}

// openTables opens the pinned maps. It refuses those of another ABI, or made for
// something else than the options say.
func openTables(pins pinFolder, o Options) (_ *tables, err error) {
	t, err := openMeta(pins)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	own := metaOf(&o)
	differ := differences(&t.meta, &own)
	if t.meta.Abi == own.Abi {
		mode, err := pinnedMode(pins)
		if err != nil {
			return nil, err
		}
		differ = append(differ, o.settings(t.meta.Config, mode == datapath.ModeSolo)...)
	}
	o.Role = Role(t.meta.Role) // or it is among what differs
	spec, err := sized(o.sizes())
	if err != nil {
		return nil, err
	}
	for name, m := range spec.Maps {
		if !isPinned(name) || name == bpf.LockstepMapLsMeta || len(differ) > 0 {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(pins.path(name), nil)
		switch {
		case errors.Is(err, os.ErrNotExist):
			differ = append(differ, difference{"no map " + name, "map " + name})
			continue
		case err != nil:
			return nil, fmt.Errorf("pinned map %s: %w", name, err)
		}
		t.maps[name] = pinned
		if err := m.Compatible(pinned); err != nil {
			differ = append(differ, difference{"map " + name, fmt.Sprintf("another map %s (%v)", name, err)})
		}
	}
	if len(differ) > 0 {
		return nil, refusal(&t.meta, &own, differ)
	}
	return t, nil
}

// openMeta opens what the pinned tables were made for, and no other map.
func openMeta(pins pinFolder) (*tables, error) {
	meta, err := ebpf.LoadPinnedMap(pins.path(bpf.LockstepMapLsMeta), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("what is pinned in %s is of a lockstep that did not write down what it is for; "+
			"run that one again, or end the guest and run `lockstep unload`", pins)
	}
	if err != nil {
		return nil, fmt.Errorf("pinned map %s: %w", bpf.LockstepMapLsMeta, err)
	}
	t := &tables{maps: map[string]*ebpf.Map{bpf.LockstepMapLsMeta: meta}}
	// Another ABI may have another size.
	raw := make([]byte, meta.ValueSize())
	if err := meta.Lookup(uint32(0), raw); err != nil {
		t.close()
		return nil, fmt.Errorf("read pinned map %s: %w", bpf.LockstepMapLsMeta, err)
	}
	copy(core.BytesOf(&t.meta), raw)
	return t, nil
}

// pinnedMode is the mode of the pinned programs.
func pinnedMode(pins pinFolder) (datapath.Mode, error) {
	m, err := ebpf.LoadPinnedMap(pins.path(bpf.LockstepMapLsConf), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return 0, fmt.Errorf("pinned map %s: %w", bpf.LockstepMapLsConf, err)
	}
	defer m.Close()
	var c conf
	if err := m.Lookup(uint32(0), &c); err != nil {
		return 0, fmt.Errorf("read pinned map %s: %w", bpf.LockstepMapLsConf, err)
	}
	return datapath.Mode(c.Mode), nil
}

// promoted reports whether the pinned programs are those of a secondary that took over.
func promoted(pins pinFolder) (bool, error) {
	if _, err := os.Stat(pins.link(secOut)); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	mode, err := pinnedMode(pins)
	return mode == datapath.ModeSolo, err
}
