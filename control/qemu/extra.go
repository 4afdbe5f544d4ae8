// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"regexp"
	"strings"
)

// Device returns an error for a device of QEMU's whose state COLO does not copy, or over
// which the guest transmits without lockstep. Devices that cannot be migrated QEMU refuses
// itself (-only-migratable).
func Device(model string) error {
	switch {
	case strings.HasPrefix(model, "vfio-"):
		return fmt.Errorf("%s: a device of the host that the guest has to itself (PCI passthrough, SR-IOV) has a state that nothing copies, and as a NIC transmits without lockstep; use an emulated one, for a NIC %s", model, useTap)
	case strings.HasPrefix(model, "vhost-user-"), strings.HasPrefix(model, "vhost-vdpa-"):
		return fmt.Errorf("%s: another process has a part of the device's state, which nothing copies; use QEMU's own virtio device", model)
	case model == "usb-host":
		return fmt.Errorf("%s: the other host has no copy of a host's device; use an emulated one", model)
	case strings.HasPrefix(model, "virtio-9p-"):
		return fmt.Errorf("%s: QEMU cannot migrate it while the guest has it mounted; share files over the network", model)
	case strings.HasPrefix(model, "ivshmem-"):
		return fmt.Errorf("%s: what it shares differs between the hosts; leave it out", model)
	}
	return nil
}

// own are QEMU's options that the config has keys for, or that lockstep decides on: what an extra argument
// says about them would contradict that, on one host or on both.
var own = map[string]string{
	"machine": "give the machine and its options as qemu.machine", "M": "give the machine and its options as qemu.machine",
	"accel": "give the accelerator as qemu.accel", "enable-kvm": "give the accelerator as qemu.accel", "no-kvm": "give the accelerator as qemu.accel",
	"cpu": "give the model and its features as qemu.cpu", "smp": "give the number of CPUs as qemu.smp", "m": "give the size as qemu.memory",
	"kernel": "name the kernel as qemu.kernel", "initrd": "name it as qemu.initrd", "append": "give the kernel's command line as qemu.append",
	"runas": "name the user as qemu.user", "sandbox": "lockstep has QEMU confine itself; leave it out",
	"incoming": "lockstep decides with which memory a guest begins; leave it out", "loadvm": "lockstep decides with which memory a guest begins; leave it out",
	"S": "lockstep decides when the guest runs; leave it out", "preconfig": "lockstep decides when the guest runs; leave it out",
	"pidfile": "lockstep has its own, in run_dir; leave it out", "daemonize": "lockstep looks after QEMU's process; leave it out",
	"snapshot": "what the guest writes would be lost with QEMU; leave it out",
}

// word matches the type or model that begins an option's value, in either of QEMU's two
// spellings.
var word = regexp.MustCompile(`^(?:\{.*?"(?:type|driver)"\s*:\s*"([^"]*)"|(?:driver=|type=)?([^,{]*))`)

// CheckExtra returns an error if arguments for QEMU give the guest what lockstep cannot keep
// in step, or contradict the rest of the config. i is the index of that argument. What the fix is
// follows behind "; ".
func CheckExtra(args []string) (i int, err error) {
	for i, a := range args {
		option, isOption := strings.CutPrefix(a, "-")
		if !isOption {
			continue
		}
		option = strings.TrimPrefix(option, "-")
		value, first := "", ""
		if i+1 < len(args) {
			value = args[i+1]
			if m := word.FindStringSubmatch(value); m != nil {
				first = m[1] + m[2]
			}
		}
		if err := checkOption(option, value, first); err != nil {
			return i, fmt.Errorf("%s %w", a, err)
		}
	}
	return 0, nil
}

// checkOption checks an option, without its dash, and its value, which begins with the word first.
func checkOption(option, value, first string) error {
	has := func(setting string) bool { return strings.Contains(","+value+",", ","+setting+",") }
	switch option {
	case "netdev", "nic", "net":
		if first == "tap" {
			return fmt.Errorf("tap: a tap that is not under nics does not pass lockstep; list it there")
		}
		return Backend(first)
	case "device":
		return Device(first)
	case "drive", "hda", "hdb", "hdc", "hdd", "virtfs":
		if !has("media=cdrom") && !has("readonly=on") && !has("if=pflash") {
			return fmt.Errorf("%s: it is not replicated, so the other host's guest would find other contents; name it under qemu.disks, or have it readonly=on", first)
		}
	case "run-with":
		if strings.Contains(","+value, ",user=") {
			return fmt.Errorf("%s: lockstep decides; name the user as qemu.user", value)
		}
	case "action":
		if strings.Contains(","+value, ",shutdown=") {
			return fmt.Errorf("%s: QEMU stays until the other host knows that the guest has powered off; leave it out", value)
		}
	default:
		if fix, ok := own[option]; ok {
			return fmt.Errorf("contradicts the rest of the config; %s", fix)
		}
	}
	return nil
}
