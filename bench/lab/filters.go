// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"net"
	"path/filepath"
)

// Ports of what the two halves of QEMU's proxy tell each other.
const mirrorPort, comparePort = "9003", "9004"

// Filters are the arguments of QEMU's own proxy, as its documentation sets it up (docs/colo-proxy.txt,
// docs/COLO-FT.txt). The sockets between the hosts send at once, those within a host are Unix sockets.
type Filters struct {
	Netdev  string // id of the guest's
	Host    net.IP // P's, as both hosts reach it
	Dir     string // P's, for sockets
	VNetHdr bool   // the guest's NIC uses vnet headers
	Compare string // further options of colo-compare, as ",notify_dev=…"
}

func (f *Filters) socket(id, where, more string) []string {
	return []string{"-chardev", "socket,id=" + id + "," + where + more}
}

func (f *Filters) tcp(port string) string {
	return "host=" + f.Host.String() + ",port=" + port + ",nodelay=on"
}

func (f *Filters) object(o string) []string {
	if f.VNetHdr {
		o += ",vnet_hdr_support=on"
	}
	return []string{"-object", o}
}

// Primary are filter-mirror, redirectors and colo-compare.
func (f *Filters) Primary() (args []string) {
	const server = ",server=on,wait=off"
	in, out := "path="+filepath.Join(f.Dir, "compare"), "path="+filepath.Join(f.Dir, "out")
	for _, a := range [][]string{
		f.socket("mirror0", f.tcp(mirrorPort), server), f.socket("compare1", f.tcp(comparePort), server),
		f.socket("compare0", in, server), f.socket("compare0-0", in, ""),
		f.socket("compare_out", out, server), f.socket("compare_out0", out, ""),
		f.object("filter-mirror,id=m0,netdev=" + f.Netdev + ",queue=tx,outdev=mirror0"),
		f.object("filter-redirector,id=redire0,netdev=" + f.Netdev + ",queue=rx,indev=compare_out"),
		f.object("filter-redirector,id=redire1,netdev=" + f.Netdev + ",queue=rx,outdev=compare0"),
		{"-object", "iothread,id=iothread1"},
		f.object("colo-compare,id=comp0,primary_in=compare0-0,secondary_in=compare1,outdev=compare_out0,iothread=iothread1" + f.Compare),
	} {
		args = append(args, a...)
	}
	return args
}

// Secondary are redirectors and filter-rewriter.
func (f *Filters) Secondary() (args []string) {
	for _, a := range [][]string{
		f.socket("red0", f.tcp(mirrorPort), ""), f.socket("red1", f.tcp(comparePort), ""),
		f.object("filter-redirector,id=f1,netdev=" + f.Netdev + ",queue=tx,indev=red0"),
		f.object("filter-redirector,id=f2,netdev=" + f.Netdev + ",queue=rx,outdev=red1"),
		f.object("filter-rewriter,id=rew0,netdev=" + f.Netdev + ",queue=all"),
	} {
		args = append(args, a...)
	}
	return args
}
