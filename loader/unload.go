// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/loader/device"
)

// Unload removes what is pinned for a node, programs and maps. The taps are set down
// first: a guest must not transmit without its programs. Without force, a secondary that
// was promoted and a folder that is not whole are refused.
func Unload(pinDir, vm, node string, force bool) error {
	return unload(pinDir, vm, node, force, true)
}

// Detach is Unload for a guest that may transmit without the programs: its taps stay as
// they are. The caller knows that no other host runs the guest, and none will.
func Detach(pinDir, vm, node string, force bool) error {
	return unload(pinDir, vm, node, force, false)
}

func unload(pinDir, vm, node string, force, mute bool) error {
	release, err := Lock(pinDir, vm, node)
	if err != nil {
		return err
	}
	defer release()
	dir := nodeDir(pinDir, vm, node)
	nics, err := filepath.Glob(filepath.Join(dir, "nic*"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, nic := range nics {
		pins := pinFolder(nic)
		alone, err := promoted(pins)
		switch {
		case force:
		case err != nil:
			return fmt.Errorf("%w; --force removes the pins all the same", err)
		case alone:
			return fmt.Errorf("the secondary was promoted: its guest is the one that clients talk to, through programs that translate the "+
				"connections it took over; without them (%s) those connections break; --force removes them", filepath.Base(nic))
		}
		if !mute {
			continue
		}
		// Also with force: a guest must not transmit without the programs.
		for _, name := range []string{priOut, secOut} {
			if err := setTapDown(pins.link(name)); err != nil {
				return err
			}
		}
	}
	return removePins(dir)
}

// setTapDown sets down the tap to which the pinned link attaches its program. No such
// pin is no error.
func setTapDown(pin string) error {
	if _, err := os.Stat(pin); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", pin, err)
	}
	tcx := info.TCX()
	if tcx == nil || tcx.Ifindex == 0 {
		return nil // the device is gone
	}
	// In another network namespace the index would be another device's.
	q, err := link.QueryPrograms(link.QueryOptions{Target: int(tcx.Ifindex), Attach: ebpf.AttachTCXIngress})
	if err != nil || !slices.ContainsFunc(q.Programs, func(p link.AttachedProgram) bool {
		id, ok := p.LinkID()
		return ok && id == info.ID
	}) {
		return fmt.Errorf("the guest's tap (device %d) is not in this network namespace; run this where the daemon ran", tcx.Ifindex)
	}
	dev, err := netlink.LinkByIndex(int(tcx.Ifindex))
	if err != nil {
		return fmt.Errorf("the guest's tap (device %d): %w", tcx.Ifindex, err)
	}
	return device.SetDown(dev)
}
