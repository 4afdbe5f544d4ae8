// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

var (
	guestIP, clientIP   = net.IPv4(10, 77, 0, 2), net.IPv4(10, 77, 0, 1)
	guestMAC, clientMAC = net.HardwareAddr{2, 0, 0, 0, 0x77, 2}, net.HardwareAddr{2, 0, 0, 0, 0x77, 1}
	// Of the link that carries what the two proxies tell each other.
	peerP, peerS = net.IPv4(198, 51, 100, 1), net.IPv4(198, 51, 100, 2)
)

// world is a client, two hosts with a bridge each, a link between them, and two guests:
// namespaces with the same address.
type world struct {
	client, hostP, hostS, pvm, svm *lab.NS
	dir                            string   // for files, with a short path
	tapO, tapP, tapS               *os.File // of a world with taps

	services [2]*lab.Process // of the PVM, the SVM
	worker   *worker         // the client
	closers  []func() error
}

// place is a device.
type place struct {
	ns     *lab.NS
	device string
}

// newWorld makes a world. With taps each guest's device is a tap that a QEMU reads from,
// and P's bridge has one too; otherwise the guests' devices are joined with the hosts'.
func newWorld(taps bool) (w *world, err error) {
	w = new(world)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
			w = nil
		}
	}()
	if w.dir, err = os.MkdirTemp("", "lsb"); err != nil {
		return w, fmt.Errorf("make a folder: %w", err)
	}
	w.closers = append(w.closers, func() error { return os.RemoveAll(w.dir) })
	for _, ns := range []**lab.NS{&w.client, &w.hostP, &w.hostS, &w.pvm, &w.svm} {
		if *ns, err = lab.NewNS(); err != nil {
			return w, err
		}
		w.closers = append(w.closers, func() error {
			(*ns).Close()
			return nil
		})
	}
	steps := []func() error{
		func() error { return w.hostP.Bridge("br0") },
		func() error { return w.hostS.Bridge("br0") },
		func() error { return w.hostP.Veth("vc", w.client, "eth0") },
		func() error { return w.hostP.Enslave("vc", "br0") },
		func() error { return w.hostP.Veth("ctl", w.hostS, "ctl") },
		func() error { return w.hostP.Veth("peerP", w.hostS, "peerS") },
		func() error { return w.hostP.Addr("ctl", net.IPv4(192, 0, 2, 1)) },
		func() error { return w.hostS.Addr("ctl", net.IPv4(192, 0, 2, 2)) },
		func() error { return w.client.MAC("eth0", clientMAC) },
		func() error { return w.client.Addr("eth0", clientIP) },
	}
	if taps {
		steps = append(steps,
			func() error { return w.tap(&w.tapO, w.hostP, "tapO") },
			func() error { return w.hostP.Enslave("tapO", "br0") },
			func() error { return w.tap(&w.tapP, w.pvm, "eth0") },
			func() error { return w.tap(&w.tapS, w.svm, "eth0") },
			func() error { return w.hostP.Addr("peerP", peerP) },
			func() error { return w.hostS.Addr("peerS", peerS) },
			// filter-rewriter does not translate timestamps, and a guest's kernel refuses a handshake
			// that echoes another one than it sent (seen with 6.18: TSEcrRejected): every connection whose SYN|ACKs
			// the guests do not send in the same millisecond would hang.
			func() error { return w.pvm.Sysctl("net/ipv4/tcp_timestamps", "0") },
			func() error { return w.svm.Sysctl("net/ipv4/tcp_timestamps", "0") },
		)
	} else {
		steps = append(steps,
			func() error { return w.hostP.Veth("tapP", w.pvm, "eth0") },
			func() error { return w.hostP.Enslave("tapP", "br0") },
			func() error { return w.hostS.Veth("tapS", w.svm, "eth0") },
			func() error { return w.hostS.Enslave("tapS", "br0") },
		)
	}
	for _, guest := range []**lab.NS{&w.pvm, &w.svm} {
		steps = append(steps,
			func() error { return (*guest).MAC("eth0", guestMAC) },
			func() error { return (*guest).Addr("eth0", guestIP) },
			// A real pair shares neighbour entries by its checkpoints.
			func() error { return (*guest).Neighbour("eth0", clientIP, clientMAC) },
		)
	}
	steps = append(steps, func() error { return w.client.Neighbour("eth0", guestIP, guestMAC) })
	for _, step := range steps {
		if err := step(); err != nil {
			return w, err
		}
	}
	return w, nil
}

func (w *world) tap(f **os.File, ns *lab.NS, name string) (err error) {
	if *f, err = ns.Tap(name); err == nil {
		w.closers = append(w.closers, (*f).Close)
	}
	return err
}

func (w *world) close() error { return lab.Undo(w.closers) }

// act starts this program in another role and waits until it is ready.
func act(ns *lab.NS, role string, args ...string) (p *lab.Process, in io.WriteCloser, out *bufio.Reader, err error) {
	cmd, err := lab.Self(role, args...)
	if err != nil {
		return nil, nil, nil, err
	}
	if in, err = cmd.StdinPipe(); err != nil {
		return nil, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	if p, err = ns.Start(cmd); err != nil {
		return nil, nil, nil, err
	}
	out = bufio.NewReaderSize(stdout, 1<<20)
	if line, err := out.ReadString('\n'); line != "ready\n" {
		p.Kill()
		return nil, nil, nil, fmt.Errorf("the %s says %q and not that it is ready: %w; its log: %s", role, line, err, p.Log())
	}
	return p, in, out, nil
}

// start starts the guests' services and the client; stop ends them.
func (w *world) start() (err error) {
	for i, ns := range []*lab.NS{w.pvm, w.svm} {
		if w.services[i], _, _, err = act(ns, "service"); err != nil {
			return errors.Join(err, w.stop())
		}
	}
	w.worker = new(worker)
	if w.worker.Process, w.worker.in, w.worker.out, err = act(w.client, "client", guestIP.String()); err != nil {
		w.worker = nil
		return errors.Join(err, w.stop())
	}
	return nil
}

func (w *world) stop() error {
	for i, s := range w.services {
		if s != nil {
			s.Kill() // it does not end by itself
			w.services[i] = nil
		}
	}
	if w.worker != nil {
		w.worker.Kill()
		w.worker = nil
	}
	return nil
}

// worker is the client's process.
type worker struct {
	*lab.Process
	in  io.Writer
	out *bufio.Reader
}

// do has the client do a job. done is called as soon as it has ended.
func (c *worker) do(ctx context.Context, j *workload.Job, done func()) (r workload.Result, err error) {
	stop := context.AfterFunc(ctx, c.Kill)
	defer stop()
	// The client bounds a job by itself, unless something is wrong with it.
	hung := time.AfterFunc(j.Limit+2*j.Stall+20*time.Second, c.Kill)
	defer hung.Stop()
	if err := json.NewEncoder(c.in).Encode(j); err != nil {
		return r, fmt.Errorf("tell the client its job: %w", errors.Join(err, ctx.Err()))
	}
	line, err := c.out.ReadString('\n')
	if line != "done\n" {
		return r, fmt.Errorf("the client failed: %q: %w; its log: %s", line, errors.Join(err, ctx.Err()), c.Log())
	}
	done()
	text, err := c.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read the client's result: %w", errors.Join(err, ctx.Err()))
	}
	slices.Sort(r.Took)
	return r, nil
}

// proxy is what runs between client and guests.
type proxy struct {
	onP, onS *lab.Process           // nil without one
	frames   func() (frames, error) // nil if it does not count them
	trouble  func() string          // what it reports when a case stalls; nil if it reports nothing
	stop     func() error
}

// frames are lockstep's counters of the PVM's frames.
type frames struct {
	held     uint64 // those that were held
	released uint64 // frames that left: a frame that was cut counts as more than one
}

// short is the beginning of a text, on one line.
func short(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return s[:min(len(s), 300)]
}
