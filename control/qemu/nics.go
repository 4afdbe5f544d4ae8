// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"regexp"
	"strings"

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

// Device returns an error for a device of QEMU's whose state COLO does not copy, or over
// which the guest transmits without lockstep.
func Device(model string) error {
	switch {
	case strings.HasPrefix(model, "vfio-"):
		return fmt.Errorf("%s: a device of the host that the guest has to itself (PCI passthrough, SR-IOV) has a state that nothing copies, and as a NIC transmits without lockstep; use an emulated one, for a NIC %s", model, useTap)
	case strings.HasPrefix(model, "vhost-user-"), strings.HasPrefix(model, "vhost-vdpa-"):
		return fmt.Errorf("%s: another process has a part of the device's state, which nothing copies; use QEMU's own virtio device", model)
	}
	return nil
}

// word matches the type or model that begins an option's value, in either of QEMU's two
// spellings.
var word = regexp.MustCompile(`^(?:\{.*?"(?:type|driver)"\s*:\s*"([^"]*)"|(?:driver=|type=)?([^,{]*))`)

// CheckExtra returns an error if arguments for QEMU give the guest a NIC or a device
// which lockstep cannot keep in step. i is the index of that argument.
func CheckExtra(args []string) (i int, err error) {
	for i, a := range args {
		value := ""
		if i+1 < len(args) {
			m := word.FindStringSubmatch(args[i+1])
			if m != nil {
				value = m[1] + m[2]
			}
		}
		switch "-" + strings.TrimLeft(a, "-") {
		case "-netdev", "-nic", "-net":
			if value == "tap" {
				return i, fmt.Errorf("%s tap: a tap that is not under nics does not pass lockstep; list it there", a)
			}
			if err := Backend(value); err != nil {
				return i, fmt.Errorf("%s %w", a, err)
			}
		case "-device":
			if err := Device(value); err != nil {
				return i, fmt.Errorf("%s %w", a, err)
			}
		}
	}
	return 0, nil
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
