// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/lockstep-ft/lockstep/control/program"
)

// ask runs QEMU's binary to have it print something about itself.
func (s *Spec) ask(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	out, _, err := program.OutputEnv(ctx, s.Env, s.Binary, args...)
	asked := s.Binary + " " + strings.Join(args, " ")
	if errors.Is(err, program.ErrGivenUp) {
		return "", fmt.Errorf("QEMU: `%s` does not end: %w; run it by hand: is the storage there that the program and its libraries are on?", asked, err)
	}
	if err != nil {
		return "", fmt.Errorf("QEMU: %s: %w", asked, err)
	}
	return out, nil
}

// dialect is what of the command line depends on the release of this host's QEMU.
type dialect struct {
	machine       string // the Spec's with its version, so that log and process list show which the guest has
	monitorObject bool   // a monitor is an -object
	runWith       bool   // -run-with names QEMU's user, and there is no -runas: from 10 on
}

func (s *Spec) dialect(ctx context.Context) (d dialect, err error) {
	machines, err := s.ask(ctx, "-machine", "help")
	if err != nil {
		return d, err
	}
	d.machine, _ = Machine(s.Machine, machines)
	objects, err := s.ask(ctx, "-object", "help")
	if err != nil {
		return d, err
	}
	d.monitorObject = strings.Contains(objects, "monitor-qmp")
	if s.User != "" {
		help, err := s.ask(ctx, "-help")
		if err != nil {
			return d, err
		}
		d.runWith = !strings.Contains(help, "\n-runas ")
	}
	return d, nil
}

var machineRE = regexp.MustCompile(`(?m)^(\S+) +\S.*?(?:\(alias of (\S+)\))?$`)

// Machine returns the value of -machine with an alias replaced by the name with its
// version, by QEMU's list of machines (the output of -machine help). known: the list has
// the machine.
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
