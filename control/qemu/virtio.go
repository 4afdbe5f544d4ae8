// SPDX-License-Identifier: Apache-2.0

package qemu

import "github.com/lockstep-ft/lockstep/control/qmp"

// BrokenDevices returns the QOM paths of the virtio devices that QEMU does not serve any
// more, because a queue in the guest's memory made no sense. No event reports that, and
// only a reset by the guest's driver ends it: neither does loading a checkpoint. A QEMU
// before 7.2 cannot be asked, and has none.
func BrokenDevices(m *qmp.Monitor) (paths []string, err error) {
	var devices []struct{ Path string }
	if err := m.Execute("x-query-virtio", nil, &devices); err != nil {
		if qmp.IsUnknown(err) {
			return nil, nil
		}
		return nil, err
	}
	for _, d := range devices {
		var status struct{ Broken bool }
		if err := m.Execute("x-query-virtio-status", map[string]any{"path": d.Path}, &status); err != nil {
			return nil, err
		}
		if status.Broken {
			paths = append(paths, d.Path)
		}
	}
	return paths, nil
}
