// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"net"

	"lockstep/control"
	"lockstep/control/config"
)

var errNoLoader = errors.New("this build has no kernel half")

var realKernel = kernel{
	checkBPFFS:  func(string) error { return errNoLoader },
	lock:        func(string, string, string) (func(), error) { return nil, errNoLoader },
	device:      net.InterfaceByName,
	ensureVXLAN: func(*config.VXLAN, int) (string, error) { return "", errNoLoader },
	open:        func(nicOptions) (control.DataPath, bool, error) { return nil, false, errNoLoader },
	unload:      func(string, string, string, bool) error { return errNoLoader },
}
