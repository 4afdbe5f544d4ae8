// SPDX-License-Identifier: Apache-2.0

package lab

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
	"strconv"
	"time"

	"github.com/lockstep-ft/lockstep/bench/workload"
)

// Addresses.
var (
	GuestIP, ClientIP   = net.IPv4(10, 77, 0, 2), net.IPv4(10, 77, 0, 1)
	GuestMAC, clientMAC = net.HardwareAddr{2, 0, 0, 0, 0x77, 2}, net.HardwareAddr{2, 0, 0, 0, 0x77, 1}
	// Where the two hosts reach each other.
	ControlP, ControlS = net.IPv4(192, 0, 2, 1), net.IPv4(192, 0, 2, 2)
	// Of the link that carries what the two proxies tell each other.
	PeerP, PeerS = net.IPv4(198, 51, 100, 1), net.IPv4(198, 51, 100, 2)
)

// World is a client, two hosts with a bridge each, a link between them, and two guests:
// namespaces with the same address.
type World struct {
	Client, HostP, HostS, PVM, SVM *NS
	Dir                            string   // for files, with a short path
	TapO, TapP, TapS               *os.File // of a world with taps

	Services [2][]*Process // of the PVM, the SVM, by lane
	Clients  []*Worker     // by lane

	number  int // among those on the same hosts, from 0 on
	closers []func() error
}

// name is that of a device on the hosts: those of further worlds there have a number.
func (w *World) name(device string) string {
	if w.number == 0 {
		return device
	}
	return device + strconv.Itoa(w.number)
}

// PairConfig is the beginning of a config for a pair between this world's guests: vm and nodes, with their
// QEMUs' sockets if these are not "".
func (w *World) PairConfig(qmpP, qmpS string) string {
	node := func(name, address, tap, peer, qmp string) string {
		if qmp != "" {
			qmp = ", qmp: " + qmp
		}
		return fmt.Sprintf("  %s: {control: \"%s:%d\", nics: [{tap: %s, peer: {device: %s}}]%s}\n", name, address, 7700+w.number, w.name(tap), w.name(peer), qmp)
	}
	return "vm: " + w.name("bench") + "\nnodes:\n" + node("alpha", "192.0.2.1", "tapP", "peerP", qmpP) + node("beta", "192.0.2.2", "tapS", "peerS", qmpS)
}

// NewWorld makes a world. With taps each guest's device is a tap that a QEMU reads from,
// and P's bridge has one too; otherwise the guests' devices are joined with the hosts'.
func NewWorld(taps bool) (*World, error) { return newWorld(taps, true, 0, nil) }

// NewHosts makes a world without guests, for QEMUs that have some.
func NewHosts() (*World, error) { return newWorld(false, false, 0, nil) }

// Beside makes a world with a client, guests, bridges and a peer link of its own on the hosts of this one.
// number is from 1 on. It is closed before this one.
func (w *World) Beside(number int) (*World, error) { return newWorld(false, true, number, w) }

func newWorld(taps, guests bool, number int, hosts *World) (w *World, err error) {
	w = &World{number: number}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
			w = nil
		}
	}()
	if w.Dir, err = os.MkdirTemp("", "lsb"); err != nil {
		return w, fmt.Errorf("make a folder: %w", err)
	}
	w.closers = append(w.closers, func() error { return os.RemoveAll(w.Dir) })
	own := []**NS{&w.Client}
	var guestsNS []**NS
	if guests {
		guestsNS = []**NS{&w.PVM, &w.SVM}
		own = append(own, guestsNS...)
	}
	if hosts == nil {
		own = append(own, &w.HostP, &w.HostS)
	} else {
		w.HostP, w.HostS = hosts.HostP, hosts.HostS
	}
	for _, ns := range own {
		if *ns, err = NewNS(); err != nil {
			return w, err
		}
		w.closers = append(w.closers, func() error {
			(*ns).Close()
			return nil
		})
	}
	br := w.name("br0")
	steps := []func() error{
		func() error { return w.HostP.Bridge(br) },
		func() error { return w.HostS.Bridge(br) },
		func() error { return w.HostP.Veth(w.name("vc"), w.Client, "eth0") },
		func() error { return w.HostP.Enslave(w.name("vc"), br) },
		func() error { return w.HostP.Veth(w.name("peerP"), w.HostS, w.name("peerS")) },
		func() error { return w.Client.MAC("eth0", clientMAC) },
		func() error { return w.Client.Addr("eth0", ClientIP) },
		func() error { return w.Client.Sysctl("net/ipv4/ip_local_port_range", "1024 65535") }, // or it searches long
	}
	if hosts == nil {
		steps = append(steps,
			func() error { return w.HostP.Veth("ctl", w.HostS, "ctl") },
			func() error { return w.HostP.Addr("ctl", ControlP) },
			func() error { return w.HostS.Addr("ctl", ControlS) },
		)
	}
	switch {
	case !guests:
	case taps:
		steps = append(steps,
			func() error { return w.tap(&w.TapO, w.HostP, "tapO") },
			func() error { return w.HostP.Enslave("tapO", br) },
			func() error { return w.tap(&w.TapP, w.PVM, "eth0") },
			func() error { return w.tap(&w.TapS, w.SVM, "eth0") },
			func() error { return w.HostP.Addr("peerP", PeerP) },
			func() error { return w.HostS.Addr("peerS", PeerS) },
			// filter-rewriter does not translate timestamps, and a guest's kernel refuses a handshake
			// that echoes another one than it sent (seen with 6.18: TSEcrRejected): every connection whose SYN|ACKs
			// the guests do not send in the same millisecond would hang.
			func() error { return w.PVM.Sysctl("net/ipv4/tcp_timestamps", "0") },
			func() error { return w.SVM.Sysctl("net/ipv4/tcp_timestamps", "0") },
		)
	default:
		steps = append(steps,
			func() error { return w.HostP.Veth(w.name("tapP"), w.PVM, "eth0") },
			func() error { return w.HostP.Enslave(w.name("tapP"), br) },
			func() error { return w.HostS.Veth(w.name("tapS"), w.SVM, "eth0") },
			func() error { return w.HostS.Enslave(w.name("tapS"), br) },
		)
	}
	for _, guest := range guestsNS {
		steps = append(steps,
			func() error { return (*guest).MAC("eth0", GuestMAC) },
			func() error { return (*guest).Addr("eth0", GuestIP) },
			// A real pair shares neighbour entries by its checkpoints.
			func() error { return (*guest).Neighbour("eth0", ClientIP, clientMAC) },
		)
	}
	steps = append(steps, func() error { return w.Client.Neighbour("eth0", GuestIP, GuestMAC) })
	for _, step := range steps {
		if err := step(); err != nil {
			return w, err
		}
	}
	return w, nil
}

func (w *World) tap(f **os.File, ns *NS, name string) (err error) {
	if *f, err = ns.Tap(name); err == nil {
		w.closers = append(w.closers, (*f).Close)
	}
	return err
}

// Close takes it all away.
func (w *World) Close() error { return Undo(w.closers) }

// act starts this program in another role and waits until it is ready.
func act(ns *NS, role string, args ...string) (p *Process, in io.WriteCloser, out *bufio.Reader, err error) {
	cmd, err := Self(role, args...)
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

// Roles of this program, which its main gives to [Act]. The service's argument is its port.
const (
	Service = "service"
	client  = "client"
)

// Act runs one of the roles in which this program starts itself; the arguments are those after "bench act".
func Act(in io.Reader, out io.Writer, args []string) error {
	switch {
	case len(args) == 2 && args[0] == Service:
		port, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("the port of the service: %w", err)
		}
		return workload.Serve(port, out)
	case len(args) == 2 && args[0] == client:
		return workload.Client(args[1], in, out)
	}
	return fmt.Errorf("there is no role %q", args)
}

// Start starts the guests' services and as many clients; each client, and its service in both guests, is a
// process of its own. Stop ends them.
func (w *World) Start(lanes int) error {
	for lane := range lanes {
		port := strconv.Itoa(workload.Port + lane)
		for i, ns := range []*NS{w.PVM, w.SVM} {
			s, _, _, err := act(ns, Service, port)
			if err != nil {
				return errors.Join(err, w.Stop())
			}
			w.Services[i] = append(w.Services[i], s)
		}
		if err := w.StartClient(workload.Port + lane); err != nil {
			return errors.Join(err, w.Stop())
		}
	}
	return nil
}

// StartClient starts a further client, of the guest's service on a port. Stop ends it.
func (w *World) StartClient(port int) error {
	p, in, out, err := act(w.Client, client, net.JoinHostPort(GuestIP.String(), strconv.Itoa(port)))
	if err == nil {
		w.Clients = append(w.Clients, &Worker{p, in, out})
	}
	return err
}

// Stop ends what Start has started.
func (w *World) Stop() error {
	for i := range w.Services {
		for _, s := range w.Services[i] {
			s.Kill() // it does not end by itself
		}
		w.Services[i] = nil
	}
	for _, c := range w.Clients {
		c.Kill()
	}
	w.Clients = nil
	return nil
}

// Worker is a client's process.
type Worker struct {
	*Process
	in  io.Writer
	out *bufio.Reader
}

// Do has the client do a job. done is called as soon as it has ended.
func (c *Worker) Do(ctx context.Context, j *workload.Job, done func()) (r workload.Result, err error) {
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
