// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// args is QEMU's command line: of a primary, or with in of a secondary.
func (s *Spec) args(d dialect, in *Incoming) ([]string, error) {
	a := []string{
		"-name", "guest=" + esc(s.VM), "-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on", "-only-migratable",
		"-no-shutdown", // QEMU stays until the other host knows that the guest has powered off (R25)
		"-machine", d.machine, "-accel", s.Accel, "-cpu", s.CPU, "-m", fmt.Sprintf("%dK", s.Memory>>10), "-smp", strconv.Itoa(s.SMP),
		"-pidfile", s.file(".pid"),
		"-chardev", "socket,id=lockstep,server=on,wait=off,path=" + esc(s.QMP),
	}
	if d.monitorObject {
		a = append(a, "-object", "monitor-qmp,id=lockstep-mon,chardev=lockstep")
	} else {
		a = append(a, "-mon", "chardev=lockstep,mode=control")
	}
	a = append(a, confine(s.User, d)...)
	for _, o := range []struct{ flag, value string }{{"-kernel", s.Kernel}, {"-initrd", s.Initrd}, {"-append", s.Append}} {
		if o.value != "" {
			a = append(a, o.flag, o.value)
		}
	}
	for i, n := range s.NICs {
		a = append(a,
			"-netdev", fmt.Sprintf("tap,id=hn%d,ifname=%s,script=no,downscript=no", i, esc(n.Tap))+n.backend(),
			"-device", fmt.Sprintf("%s,id=e%d,netdev=hn%d,mac=%s", s.NICModel, i, i, n.MAC)+n.frontend()+s.offloads())
	}
	for i := range s.Disks {
		nodes, err := s.blockdevs(i, in != nil)
		if err != nil {
			return nil, err
		}
		for _, n := range nodes {
			b, err := json.Marshal(n)
			if err != nil {
				return nil, err
			}
			a = append(a, "-blockdev", string(b))
		}
		device := fmt.Sprintf("virtio-blk-pci,id=d%d,drive=%s,werror=stop,rerror=stop", i, s.Disks[i].ID)
		if s.Disks[i].through() {
			device += ",write-cache=off"
		}
		a = append(a, "-device", device)
	}
	switch {
	case in != nil && in.TLS != nil:
		a = append(a, "-incoming", "defer") // until it has its certificates: see PrepareSecondary
	case in != nil:
		a = append(a, "-incoming", in.Migration)
	default:
		a = append(a, "-S")
	}
	return append(a, s.Extra...), nil
}

// backend is the host's part of a NIC's queues.
func (n *NIC) backend() (options string) {
	if n.Queues > 1 {
		options = fmt.Sprintf(",queues=%d", n.Queues)
	}
	if n.VHost {
		options += ",vhost=on"
	}
	return options
}

// frontend is the guest's: each queue has an interrupt for each direction, and there are two more for the rest.
func (n *NIC) frontend() string {
	if n.Queues > 1 {
		return fmt.Sprintf(",mq=on,vectors=%d", 2*n.Queues+2)
	}
	return ""
}

// offloads are the properties of the NICs that the config sets, in a fixed order.
func (g *Guest) offloads() (options string) {
	for _, name := range slices.Sorted(maps.Keys(g.Offloads)) {
		options += fmt.Sprintf(",%s=%s", name, map[bool]string{true: "on", false: "off"}[g.Offloads[name]])
	}
	return options
}

type node map[string]any

// blockdevs are the block nodes of disk i: a quorum (graph.go) over the image, and on a
// secondary over the replication driver over its overlays over the image.
func (s *Spec) blockdevs(i int, secondary bool) ([]node, error) {
	d := &s.Disks[i]
	driver := "file"
	if info, err := stat(d.Image); err != nil {
		return nil, err
	} else if info.Mode()&fs.ModeDevice != 0 {
		driver = "host_device"
	}
	file := node{"driver": driver, "filename": d.Image}
	image := node{"driver": d.format(), "node-name": parentNode(i), "file": file}
	if d.AIO != "" {
		file["aio"] = d.AIO
	}
	for _, n := range []node{file, image} {
		if d.direct() {
			n["cache"] = node{"direct": true}
		}
		if d.Discard {
			n["discard"] = "unmap"
		}
	}
	size, err := d.size(true)
	if err != nil {
		return nil, err
	}
	if !secondary {
		return []node{image, absent(i, size), s.quorum(i, parentNode(i))}, nil
	}
	overlay := func(name, kind string, backing any) node {
		return node{"driver": "qcow2", "node-name": name, "backing": backing,
			"file": node{"driver": "file", "filename": s.overlay(d, kind)}}
	}
	return []node{
		image,
		absent(i, size),
		{"driver": "replication", "node-name": childNode(i), "mode": "secondary", "top-id": d.ID,
			"file": overlay(activeNode(i), "active", overlay(hiddenNode(i), "hidden", parentNode(i)))},
		s.quorum(i, childNode(i)),
	}, nil
}

// esc escapes a value for one of QEMU's comma-separated lists.
func esc(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// confine are the arguments that take from QEMU what it does not need once it runs:
// system calls, and with a user root's rights. QEMU opens the tap, the disks and its
// sockets before it becomes that user.
func confine(user string, d dialect) []string {
	const sandbox = "on,obsolete=deny,spawn=deny,resourcecontrol=deny"
	switch {
	case user == "":
		// With a user, elevateprivileges=deny would kill QEMU when it becomes that user.
		return []string{"-sandbox", sandbox + ",elevateprivileges=deny"}
	case d.runWith:
		return []string{"-sandbox", sandbox, "-run-with", "user=" + user}
	}
	return []string{"-sandbox", sandbox, "-runas", user}
}
