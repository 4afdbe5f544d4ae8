// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// binaryTimeout bounds what QEMU's binary is asked before a guest starts.
const binaryTimeout = 10 * time.Second

// help is what QEMU's binary lists behind an option.
func (s *Spec) help(ctx context.Context, option string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, binaryTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.Binary, option, "help")
	cmd.Env = append(os.Environ(), s.Env...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("QEMU: %s %s help: %w", s.Binary, option, err)
	}
	return string(out), nil
}

// resolved is the spec as this host's QEMU takes it: the machine by its versioned name,
// so that the log and the process list tell what the guest has.
func (s *Spec) resolved(ctx context.Context) (*Spec, error) {
	r := *s
	machines, err := s.help(ctx, "-machine")
	if err != nil {
		return nil, err
	}
	r.Machine, _ = Machine(s.Machine, machines)
	objects, err := s.help(ctx, "-object")
	if err != nil {
		return nil, err
	}
	r.monitorObject = strings.Contains(objects, "monitor-qmp")
	return &r, nil
}

var machineRE = regexp.MustCompile(`(?m)^(\S+) +\S.*?(?:\(alias of (\S+)\))?$`)

// Machine is a -machine with its versioned name in place of an alias, by QEMU's list of
// machines (-machine help), and whether that has it.
func Machine(machine, list string) (_ string, known bool) {
	name, options, more := strings.Cut(machine, ",")
	name = strings.TrimPrefix(name, "type=")
	for _, m := range machineRE.FindAllStringSubmatch(list, -1) {
		if m[1] == name {
			known = true
			if m[2] != "" {
				name = m[2]
			}
			break
		}
	}
	if more {
		name += "," + options
	}
	return name, known
}

// unfitDevices are devices that COLO fails with, by the beginnings of their names. What
// a release of QEMU cannot migrate it refuses by itself (-only-migratable).
var unfitDevices = []struct{ name, why string }{
	{"vfio-", "a device of the host has no copy on the other one, and its state is in no checkpoint"},
	{"usb-host", "a device of the host has no copy on the other one, and its state is in no checkpoint"},
	{"vhost-user-", "its state is another process's, and in no checkpoint"},
	{"vhost-vdpa-", "its state is the hardware's, and in no checkpoint"},
	{"virtio-9p-", "QEMU cannot migrate it while the guest has it mounted"},
	{"ivshmem-", "what it shares differs between the hosts"},
}

// BreaksCOLO says why QEMU's argument arg, behind those before it, keeps COLO from
// working; "": it does not, as far as is known.
func BreaksCOLO(before []string, arg string) string {
	option := ""
	if len(before) > 0 {
		option = strings.TrimLeft(before[len(before)-1], "-")
	}
	switch option {
	case "device":
		name, _, _ := strings.Cut(strings.TrimPrefix(arg, "driver="), ",")
		for _, d := range unfitDevices {
			if strings.HasPrefix(name, d.name) {
				return d.why
			}
		}
	case "cpu":
		if strings.Contains(arg, "+invtsc") || strings.Contains(arg, "invtsc=on") || strings.Contains(arg, "migratable=off") || strings.Contains(arg, "migratable=no") {
			return "QEMU cannot migrate a CPU with a clock of its own"
		}
	case "drive", "hda", "hdb", "hdc", "hdd", "virtfs":
		if !strings.Contains(arg, "media=cdrom") && !strings.Contains(arg, "readonly=on") && !strings.Contains(arg, "if=pflash") {
			return "it is not replicated, so the other host's guest would find other contents: name it under qemu.disks"
		}
	case "incoming", "loadvm":
		return "it is lockstep that says with what memory a guest begins"
	}
	return ""
}
