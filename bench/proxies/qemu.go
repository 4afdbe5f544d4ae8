// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// Two QEMU processes without guests make QEMU's chain at native speed. The guest is a tap
// in a namespace of its own, which QEMU reads from as it would from a NIC: a hub joins it to
// the tap in P's bridge, or on S to the filters. A hub forwards without vnet headers, so
// the kernel cuts and checksums every segment before QEMU sees it.

// chain is QEMU's processes.
type chain struct {
	w           *lab.World
	qemu        string
	closers     []func() error
	checkpoints atomic.Uint64 // that colo-compare has asked for
}

// start starts a QEMU and waits for its monitor. The files are its descriptors from 3 on.
func (c *chain) start(ctx context.Context, ns *lab.NS, name string, files []*os.File, args ...string) (*lab.Process, error) {
	monitor := filepath.Join(c.w.Dir, name+".qmp")
	args = append([]string{"-machine", "none", "-nodefaults", "-display", "none", "-accel", "tcg", "-name", name,
		"-qmp", "unix:" + monitor + ",server=on,wait=off"}, args...)
	cmd := exec.Command(c.qemu, args...)
	cmd.ExtraFiles = files
	p, err := ns.Start(cmd)
	if err != nil {
		return nil, err
	}
	c.closers = append(c.closers, func() error {
		p.Kill()                                                        // it has nothing to tidy up
		if err := os.Remove(monitor); !errors.Is(err, fs.ErrNotExist) { // it may have ended by itself
			return err
		}
		return nil
	})
	err = lab.Eventually(ctx, 10*time.Second, p, func() error {
		conn, err := net.Dial("unix", monitor)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		_, err = bufio.NewReader(conn).ReadString('\n') // it greets when it has all its devices
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start QEMU on %s: %w", name, err)
	}
	return p, nil
}

func (c *chain) stop() error { return lab.Undo(c.closers) }

func (c *chain) socket(name string) string { return filepath.Join(c.w.Dir, name) }

// tapArgs are P's two taps, joined.
var tapArgs = []string{
	"-netdev", "tap,id=o,fd=3", "-netdev", "tap,id=g,fd=4",
	"-netdev", "hubport,id=h0,hubid=0,netdev=o", "-netdev", "hubport,id=h1,hubid=0,netdev=g",
}

// qemuAlone passes frames between client and PVM through a QEMU without filters: what
// the chain's way through QEMU costs by itself.
func qemuAlone(ctx context.Context, w *lab.World, qemu string) (*Proxy, error) {
	c := &chain{w: w, qemu: qemu}
	p, err := c.start(ctx, w.HostP, "P", []*os.File{w.TapO, w.TapP}, tapArgs...)
	if err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return &Proxy{OnP: p, Stop: c.stop}, nil
}

// QEMUChain is QEMU's proxy.
func QEMUChain(ctx context.Context, w *lab.World, qemu string) (*Proxy, error) {
	c := &chain{w: w, qemu: qemu}
	filters := lab.Filters{Netdev: "o", Host: lab.PeerP, Dir: w.Dir, Compare: ",notify_dev=notify"}
	args := slices.Concat(tapArgs, []string{"-chardev", "socket,id=notify,server=on,wait=off,path=" + c.socket("notify")}, filters.Primary())
	p := &Proxy{Stop: c.stop}
	p.Trouble = func() string { return c.trouble(p.OnP.Log()) }
	var err error
	if p.OnP, err = c.start(ctx, w.HostP, "P", []*os.File{w.TapO, w.TapP}, args...); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	if err := c.listen(); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	// The port n0 stands for a tap of which the guest's NIC, here n1 with what is behind it, is
	// the peer. The port n3 goes nowhere: without it hub 0 forwards nothing.
	filters.Netdev = "n0"
	args = append([]string{"-netdev", "hubport,id=n0,hubid=0", "-netdev", "hubport,id=n1,hubid=1,netdev=n0", "-netdev", "tap,id=g,fd=3",
		"-netdev", "hubport,id=n2,hubid=1,netdev=g", "-netdev", "hubport,id=n3,hubid=0"}, filters.Secondary()...)
	if p.OnS, err = c.start(ctx, w.HostS, "S", []*os.File{w.TapS}, args...); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return p, nil
}

// trouble is what colo-compare and QEMU's log say of a job that stalled.
func (c *chain) trouble(log string) string {
	text := "colo-compare had asked for " + strconv.FormatUint(c.checkpoints.Load(), 10) + " checkpoints by then"
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "with no nics") { // which is so
			return text + "; QEMU says: " + lab.Short(line)
		}
	}
	return text
}

// listen counts the checkpoints that colo-compare asks for. There is nobody to make
// one: what waits for it, waits on.
func (c *chain) listen() error {
	conn, err := net.Dial("unix", c.socket("notify"))
	if err != nil {
		return fmt.Errorf("connect to colo-compare: %w", err)
	}
	c.closers = append(c.closers, conn.Close)
	go lab.CountRequests(conn, &c.checkpoints)
	return nil
}
