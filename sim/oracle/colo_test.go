// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// event is something that an engine did.
type event struct {
	to    who    // whom a frame reached: the client, or the SVM; 0: a checkpoint was asked for and made
	frame []byte // from its Ethernet header on
}

// engine is a COLO proxy between two guests and a client, which a test plays.
type engine interface {
	// send has one of them transmit a frame.
	send(from who, frame []byte) error
	// settle returns when all that was sent has been dealt with. Checkpoints that the engine
	// asks for are made.
	settle() error
	// take returns what has happened since it was called last.
	take() []event
	// checkpoint makes one that nothing has asked for.
	checkpoint() error
}

// patience is for what has to come.
const patience = 10 * time.Second

// colo is a QEMU without a guest that holds a filter-rewriter, whose output goes into a
// colo-compare. Without a guest there is no COLO: this plays it.
type colo struct {
	proc *lab.Process
	mon  *qmp.Monitor
	dev  map[string]*lab.Chardev

	markers    int
	markerPort uint16
	events     []event
}

// The chardevs: colo-compare's, and to and from the rewriter.
var chardevs = []string{"primary", "secondary", "out", "notify", "client", "svm", "svmout", "rewritten"}

// newColo starts it. settings are colo-compare's, such as "compare_timeout=200".
func newColo(ctx context.Context, ns *lab.NS, dir, settings string) (*colo, error) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	args := []string{
		"-machine", "none", "-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", "unix:" + filepath.Join(dir, "qmp") + ",server=on,wait=off",
		// The port n0 stands for a tap, n1 is the guest's NIC. Without n3 hub 0 forwards nothing.
		"-netdev", "hubport,id=n0,hubid=0", "-netdev", "hubport,id=n1,hubid=1,netdev=n0", "-netdev", "hubport,id=n2,hubid=1", "-netdev", "hubport,id=n3,hubid=0",
		"-object", "iothread,id=loop",
	}
	for _, c := range chardevs {
		args = append(args, "-chardev", "socket,server=on,wait=off,id="+c+",path="+filepath.Join(dir, c))
	}
	for _, o := range []string{
		"filter-redirector,id=in,netdev=n0,queue=tx,indev=client",
		"filter-redirector,id=up,netdev=n0,queue=rx,outdev=rewritten",
		"filter-rewriter,id=rewriter,netdev=n0,queue=all",
		"filter-redirector,id=down,netdev=n0,queue=tx,outdev=svm",
		"filter-redirector,id=from,netdev=n0,queue=rx,indev=svmout",
		"colo-compare,id=compare,primary_in=primary,secondary_in=secondary,outdev=out,notify_dev=notify,iothread=loop" + settings,
	} {
		args = append(args, "-object", o)
	}
	c := &colo{dev: make(map[string]*lab.Chardev), markerPort: markerPort}
	if c.proc, err = ns.Start(exec.Command(qemu, args...)); err != nil {
		return nil, err
	}
	for _, name := range chardevs {
		if c.dev[name], err = lab.DialChardev(ctx, filepath.Join(dir, name), c.proc.Log); err != nil {
			c.close()
			return nil, err
		}
	}
	if c.mon, err = qmp.Dial(ctx, filepath.Join(dir, "qmp"), patience); err != nil {
		c.close()
		return nil, err
	}
	// What comes out before QEMU has accepted a connection is lost.
	for deadline := time.Now().Add(patience); ; {
		ready, err := c.barrier(100 * time.Millisecond)
		if ready && err == nil {
			return c, nil
		}
		if err != nil || time.Now().After(deadline) {
			c.close()
			return nil, errors.Join(err, fmt.Errorf("colo-compare releases nothing; QEMU printed: %s", c.proc.Log()))
		}
	}
}

func (c *colo) close() {
	for _, d := range c.dev {
		if d != nil {
			d.Close()
		}
	}
	if c.mon != nil {
		_ = c.mon.Disconnect() // it is over anyway
	}
	c.proc.Kill()
}

func (c *colo) send(from who, frame []byte) error {
	switch from {
	case pvm:
		return c.dev["primary"].Send(frame)
	case client:
		return c.dev["client"].Send(frame)
	}
	if err := c.dev["svmout"].Send(frame); err != nil {
		return err
	}
	out, err := c.dev["rewritten"].Receive(patience)
	if err == nil && out == nil {
		err = errors.New("filter-rewriter passes a frame of the SVM's not on")
	}
	if err != nil {
		return err
	}
	return c.dev["secondary"].Send(out)
}

// barrier sends frames behind all others, and returns when they have come through: both
// guests' to the client, and the client's to the SVM. It reports whether they came within
// wait.
func (c *colo) barrier(wait time.Duration) (bool, error) {
	c.markers++
	m := marker(pvm, c.markerPort, c.markers)
	if err := errors.Join(c.send(pvm, m), c.send(svm, m)); err != nil {
		return false, err
	}
	if ok, err := c.until(client, m, wait); !ok || err != nil {
		return ok, err
	}
	m = marker(client, c.markerPort, c.markers)
	if err := c.send(client, m); err != nil {
		return false, err
	}
	return c.until(svm, m, wait)
}

// until notes what reaches somebody until frame does.
func (c *colo) until(to who, frame []byte, wait time.Duration) (bool, error) {
	name := map[who]string{client: "out", svm: "svm"}[to]
	for deadline := time.Now().Add(wait); ; {
		f, err := c.dev[name].Receive(max(0, time.Until(deadline)))
		switch {
		case err != nil:
			return false, err
		case f == nil:
			return false, nil
		case bytes.Equal(f, frame):
			return true, nil
		case !isMarker(f):
			c.events = append(c.events, event{to, f})
		}
	}
}

// mustPass is barrier, again where colo-compare has thrown a marker away with its whole table.
func (c *colo) mustPass() error {
	for range 5 {
		if ok, err := c.barrier(patience / 5); ok || err != nil {
			return err
		}
		c.markerPort += 8 // the other guest's marker waits in the old flow
	}
	return fmt.Errorf("nothing leaves QEMU any more; it printed: %s", c.proc.Log())
}

func (c *colo) settle() error {
	for {
		if err := c.mustPass(); err != nil {
			return err
		}
		// What it says of a difference it has said before it lets the marker out.
		asked, err := c.asked()
		if err != nil || !asked {
			return err
		}
		if err := c.checkpoint(); err != nil {
			return err
		}
	}
}

// asked reports whether colo-compare has asked for a checkpoint.
func (c *colo) asked() (asked bool, err error) {
	for {
		f, err := c.dev["notify"].Receive(time.Millisecond)
		if f == nil || err != nil {
			return asked, err
		}
		asked = asked || string(f) == "DO_CHECKPOINT"
	}
}

// checkpoint does what COLO does with the filters at one: colo-compare lets go of what it holds,
// the rewriter forgets its offsets.
func (c *colo) checkpoint() error {
	c.events = append(c.events, event{})
	// Something alone, which leaves with all else that waits.
	c.markers++
	alone := marker(pvm, c.markerPort, c.markers)
	alone[36] = 0 // another port
	if err := errors.Join(c.send(pvm, alone), c.mustPass(), c.dev["notify"].Send([]byte("COLO_CHECKPOINT"))); err != nil {
		return err
	}
	if ok, err := c.until(client, alone, patience); !ok || err != nil {
		return errors.Join(err, fmt.Errorf("colo-compare makes no checkpoint; QEMU printed: %s", c.proc.Log()))
	}
	if err := c.mon.Execute("xen-colo-do-checkpoint", nil, nil); err != nil {
		return err
	}
	_, err := c.asked() // what it has asked for since is done
	return errors.Join(err, c.mustPass())
}

func (c *colo) take() []event {
	e := c.events
	c.events = nil
	return e
}

// marker is a datagram of no scenario's.
func marker(from who, port uint16, n int) []byte {
	w := newWorld(port)
	p := &packet{from: from, kind: "udp", ttl: defaultTTL, payload: fmt.Appendf(nil, "marker %d", n)}
	return p.frame(w)
}

const markerPort = 9

func isMarker(f []byte) bool { return bytes.Contains(f, []byte("marker ")) }
