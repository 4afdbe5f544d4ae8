// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"lockstep/bpf"
	"lockstep/control/datapath"
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

// inherited reports whether a map goes from one daemon to the next. What programs
// work on does not, nor do the object's data sections.
func inherited(name string) bool {
	return strings.HasPrefix(name, "ls_") && name != bpf.LockstepMapLsScratch
}

// findTables opens what is pinned in dir for a NIC with these options. nil: there is
// nothing to go on from. Tables of a guest that is gone are nothing: its tap is,
// and who is behind another one under the same name has none of its connections.
func findTables(dir string, o Options, tap netlink.Link) (*tables, error) {
	if here, err := guardHere(dir, o, tap); !here || err != nil {
		return nil, err
	}
	return openTables(dir, o)
}

// guardHere reports whether what is pinned in dir guards the tap.
func guardHere(dir string, o Options, tap netlink.Link) (bool, error) {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	guarded := 0
	for _, name := range []string{priOut, secOut} {
		at, err := deviceOf(filepath.Join(dir, linkPrefix+name))
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

// goOnFrom finds what Open goes on from: old, of the same role, or taken, of a
// secondary that took over and is to be a primary.
func goOnFrom(dir string, o Options, tap netlink.Link) (old, taken *tables, err error) {
	alone, err := promoted(dir)
	if err != nil || !alone || o.Role != Primary {
		old, err = findTables(dir, o, tap)
		return old, nil, err
	}
	o.Role = Secondary
	taken, err = findTables(dir, o, tap)
	return nil, taken, err
}

// deviceOf is the index of the device that a pinned link holds a program at; 0: of
// none, or there is no such link.
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

// openTables opens the maps in dir, unless they are of another lockstep or for
// something else than the options say.
func openTables(dir string, o Options) (_ *tables, err error) {
	t, err := openMeta(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	own := metaOf(o)
	differ := differences(&t.meta, &own)
	if t.meta.Abi == own.Abi {
		mode, err := pinnedMode(dir)
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
		if !inherited(name) || name == bpf.LockstepMapLsMeta || len(differ) > 0 {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
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

// openMeta opens what the tables in dir were made for, and no other map.
func openMeta(dir string) (*tables, error) {
	meta, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpf.LockstepMapLsMeta), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("what is pinned in %s is of a lockstep that did not write down what it is for; "+
			"run that one again, or end the guest and run `lockstep unload`", dir)
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
	copy(bytesOf(&t.meta), raw)
	return t, nil
}

// pinnedMode is the mode of the programs that are pinned in dir.
func pinnedMode(dir string) (datapath.Mode, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpf.LockstepMapLsConf), &ebpf.LoadPinOptions{ReadOnly: true})
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

// adopt puts the new programs in the place of those that a dead daemon left in
// dir, over the same maps. Those ran on meanwhile, and what they held or told is
// lost: the guests repeat it. Programs are shut when adopt returns.
func (n *NIC) adopt(role Role, dir string) error {
	found, err := n.found(role)
	if err != nil {
		return err
	}
	atomic.StoreUint32(&n.conf.Mode, uint32(datapath.ModeShut))
	for _, a := range n.attachments(role) {
		if err := n.replace(a, dir); err != nil {
			return err
		}
	}
	// Who looked at the mode before may still be filling slots.
	if err := grace(); err != nil {
		return err
	}
	if err := n.discard(); err != nil {
		return err
	}
	n.slots.freeAll()
	for _, leftover := range []string{stagingDir(dir), leftDir(dir)} {
		if err := removePins(leftover); err != nil {
			return err
		}
	}
	n.adopted = found
	return nil
}

// found is what the dead daemon had come to.
func (n *NIC) found(role Role) (*datapath.Recovered, error) {
	var k bpf.LockstepLsKeys
	if err := n.objs.LsKeys.Lookup(n.conf.KeyIndex, &k); err != nil {
		return nil, fmt.Errorf("read pinned keys: %w", err)
	}
	a := &datapath.Recovered{Term: n.conf.KeyGen, Epoch: n.conf.Epoch, Mode: datapath.Mode(n.conf.Mode)}
	a.Digest.Mix = k.Mix
	for lane := range k.K {
		copy(a.Digest.K[lane][:], k.K[lane][:])
	}
	n.signer.key, n.signer.term, n.signer.epoch = k.SipTx, a.Term, a.Epoch
	n.signer.to = append(net.HardwareAddr(nil), n.conf.PeerMac[:]...)
	if role != Primary {
		return a, nil
	}
	if err := each(n.objs.LsCli, func(t bpf.LockstepLsTuple, c *bpf.LockstepLsCli) {
		if t.Proto == protoTCP && tells(c) {
			a.Remotes = append(a.Remotes, datapath.Remote{Tuple: fromTuple(&t), Ack: c.Ack, At: int64(c.At)})
		}
	}); err != nil {
		return nil, fmt.Errorf("list remotes: %w", err)
	}
	return a, nil
}

// Recovered implements [datapath.NIC].
func (n *NIC) Recovered() *datapath.Recovered { return n.adopted }
