// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"regexp"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

const useTap = "give the guest a tap in a bridge and list it under nics"

// Backend returns an error for a network backend of QEMU's that is no tap: what the
// guest sends there does not pass lockstep.
func Backend(kind string) error {
	switch kind {
	case "tap", "none", "nic":
		return nil
	case "vhost-user", "vhost-vdpa":
		return fmt.Errorf("%s: another process, or a card, has the guest's frames, without this host's kernel; %s", kind, useTap)
	}
	return fmt.Errorf("%s: what the guest sends there does not pass lockstep; %s", kind, useTap)
}

var (
	netClient = regexp.MustCompile(`(?m)^(?: \\ )?(\S+): index=\d+,type=([^,\s]+)`)
	childType = regexp.MustCompile(`^child<(.+)>$`)
)

// CheckNICs returns an error if the guest has a NIC or a device which lockstep cannot
// keep in step, or another number of NICs than n.
func CheckNICs(m *qmp.Monitor, n int) error {
	var text string
	err := m.Execute("human-monitor-command", map[string]string{"command-line": "info network"}, &text)
	if qmp.IsUnknown(err) {
		return nil // this QEMU was built without HMP
	}
	if err != nil {
		return err
	}
	nics := make(map[string]bool) // a NIC is listed once for each of its queues
	for _, c := range netClient.FindAllStringSubmatch(text, -1) {
		if c[2] == "nic" {
			nics[c[1]] = true
		}
		if err := Backend(c[2]); err != nil {
			return fmt.Errorf("the guest's network backend %s is a %w", c[1], err)
		}
	}
	if len(nics) != n {
		return fmt.Errorf("the guest has %d NICs, and the config lists %d under nics: list all of them, for what the guest sends on another does not pass lockstep", len(nics), n)
	}
	models, err := devices(m)
	if err != nil {
		return err
	}
	for name, model := range models {
		if err := Device(model); err != nil {
			return fmt.Errorf("the guest's device %s is a %w", name, err)
		}
	}
	return nil
}

// devices returns the models of the guest's devices by their names in QEMU.
func devices(m *qmp.Monitor) (map[string]string, error) {
	models := make(map[string]string)
	for _, where := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		var children []struct{ Name, Type string }
		if err := m.Execute("qom-list", map[string]string{"path": where}, &children); err != nil {
			return nil, err
		}
		for _, c := range children {
			if t := childType.FindStringSubmatch(c.Type); t != nil {
				models[c.Name] = t[1]
			}
		}
	}
	return models, nil
}
