// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// Caps are what a running QEMU has.
type Caps struct {
	Version string
	Machine string // with its version, "pc-i440fx-7.2"
	Accel   string // "kvm" or "tcg"
	Disks   bool   // it can replicate disks: it has the quorum and the replication driver
}

// Probe asks a QEMU what it has, and refuses one whose COLO is missing or known to be
// broken.
func Probe(m *qmp.Monitor) (Caps, error) {
	c := Caps{Version: m.Version(), Accel: "tcg"}
	var kvm struct{ Enabled bool }
	if err := m.Execute("query-kvm", nil, &kvm); err != nil {
		return c, err
	}
	if kvm.Enabled {
		c.Accel = "kvm"
	}
	if why := BrokenCOLO(ParseVersion(c.Version), c.Accel); why != "" {
		return c, fmt.Errorf("QEMU %s: %s; use %s", c.Version, why, GoodQEMU)
	}
	if err := m.Execute("qom-get", map[string]string{"path": "/machine", "property": "type"}, &c.Machine); err != nil {
		return c, err
	}
	c.Machine = strings.TrimSuffix(c.Machine, "-machine")
	var commands []struct{ Name string }
	if err := m.Execute("query-commands", nil, &commands); err != nil {
		return c, err
	}
	for _, need := range []string{"x-colo-lost-heartbeat", "query-colo-status", "yank", "x-blockdev-change"} {
		if !slices.ContainsFunc(commands, func(n struct{ Name string }) bool { return n.Name == need }) {
			return c, fmt.Errorf("QEMU %s has no %s: it was built without COLO, or is older than 6.0", c.Version, need)
		}
	}
	if _, ok, err := capability(m, "x-colo"); err != nil {
		return c, err
	} else if !ok {
		return c, fmt.Errorf("QEMU %s has no migration capability x-colo", c.Version)
	}
	var schema []struct{ Values []string }
	if err := m.Execute("query-qmp-schema", nil, &schema); err != nil {
		return c, err
	}
	for _, s := range schema {
		if slices.Contains(s.Values, "quorum") && slices.Contains(s.Values, "replication") {
			c.Disks = true
		}
	}
	return c, nil
}

// ParseVersion reads the three numbers of "7.2.22"; one that is missing is 0.
func ParseVersion(version string) (v [3]int) {
	for i, f := range strings.SplitN(version, ".", 3) {
		v[i], _ = strconv.Atoi(f)
	}
	return v
}

// GoodQEMU is what to use in place of a release that [BrokenCOLO] names.
const GoodQEMU = "10.0.13 or later of 10.0, or a release from 7.2 to 9.2"

// BrokenCOLO returns what is wrong with COLO in a release under an accelerator ("kvm",
// "tcg"); "": it works.
func BrokenCOLO(v [3]int, accel string) string {
	switch {
	case v[0] == 10 && v[1] == 0 && v[2] < 13:
		return "COLO is broken in 10.0 before 10.0.13"
	case v[0] == 10 && v[1] == 1:
		return "COLO is broken in 10.1"
	case v[0] >= 11 && accel == "tcg":
		return "under TCG, from 11 on, a COLO secondary crashes or falls silent at a checkpoint"
	}
	return ""
}

// SameMachine returns an error unless the two hosts' guests have the same hardware: an
// alias such as "pc" is another machine in each release of QEMU.
func SameMachine(own, peer Caps) error {
	if own.Machine == peer.Machine {
		return nil
	}
	return fmt.Errorf("the guest's machine is %s here (QEMU %s), and %s there (QEMU %s): set qemu.machine to the older of the two in both hosts' configs, "+
		"or install the same QEMU on both", own.Machine, own.Version, peer.Machine, peer.Version)
}

func checkCaps(caps Caps, disks []Disk) error {
	if len(disks) > 0 && !caps.Disks {
		return fmt.Errorf("QEMU %s cannot replicate disks: it was built without the quorum or the replication driver", caps.Version)
	}
	return nil
}

// capability reports whether a migration capability is on, and whether this QEMU has it.
func capability(m *qmp.Monitor, name string) (on, there bool, err error) {
	var caps []struct {
		Capability string
		State      bool
	}
	err = m.Execute("query-migrate-capabilities", nil, &caps)
	for _, c := range caps {
		if c.Capability == name {
			return c.State, true, err
		}
	}
	return false, false, err
}

func setCapabilities(m *qmp.Monitor, on bool, names ...string) error {
	var list []map[string]any
	for _, n := range names {
		list = append(list, map[string]any{"capability": n, "state": on})
	}
	return m.Execute("migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// setCOLO sets the migration capability x-colo. From QEMU 11 on it needs return-path,
// with which 7.2 never enters COLO: return-path is set only where x-colo alone is refused.
func setCOLO(m *qmp.Monitor, on bool) error {
	if is, _, err := capability(m, "x-colo"); err != nil || is == on {
		return err
	}
	err := setCapabilities(m, on, "x-colo")
	if err != nil && on && setCapabilities(m, on, "return-path", "x-colo") == nil {
		return nil
	}
	return err
}
