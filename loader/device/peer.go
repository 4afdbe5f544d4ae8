// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
)

// CheckPeerMTU refuses a peer device that does not take the guest's largest frame, and says behind "; " what mends that.
func CheckPeerMTU(peer string, peerMTU int, tap string, tapMTU int) error {
	if peerMTU >= tapMTU {
		return nil
	}
	return fmt.Errorf("peer device %s has MTU %d, less than tap %s with %d; ip link set %s mtu %d", peer, peerMTU, tap, tapMTU, peer, tapMTU)
}

// PreparePeer makes a device fit to be a peer link: it receives frames for any address,
// and this host's own stack does not transmit on it (its neighbour discovery would reach
// the SVM as if a client had sent it).
func PreparePeer(l netlink.Link) error {
	name := l.Attrs().Name
	// A device may have no IPv6; then there is nothing to switch off.
	sysctl := filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
	if err := os.WriteFile(sysctl, []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("peer device %s: %w", name, err)
	}
	if err := netlink.SetPromiscOn(l); err != nil {
		return fmt.Errorf("peer device %s: set promiscuous: %w", name, err)
	}
	if err := netlink.LinkSetARPOff(l); err != nil {
		return fmt.Errorf("peer device %s: switch ARP off: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("peer device %s: set up: %w", name, err)
	}
	return nil
}
