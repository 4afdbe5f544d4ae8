// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// aheadBy is how far the SVM's sequence numbers are ahead of the PVM's.
const aheadBy = 0x1234567

// A heartbeat that comes late on a busy machine is no reason to end the measurement.
const pairYAML = `vm: engines
nodes:
  alpha: {control: "127.0.0.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta:  {control: "127.0.0.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
heartbeat: {interval: 50ms, timeout: 10s, lease: 5s}
` + lab.PairConfig

// lockstep is a pair of daemons in one network namespace. The guests' taps and a third
// one in the PVM's bridge, the client, are held by this process as a QEMU would hold them.
type lockstep struct {
	tap    [2]*tap // of the guests
	client *tap
	pair   *lab.Pair // nil: none
	progs  []*ebpf.Program
	skew   uint32 // of the SVM's sequence numbers
	ports  ports
	buf    []byte // take's
}

// newLockstep starts the pair in ns, which is the calling thread's network namespace. dir is for its files.
func newLockstep(ctx context.Context, ns *lab.NS, binary, dir string) (_ *lockstep, err error) {
	l := &lockstep{skew: aheadBy, buf: make([]byte, maxTap)}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if err := l.devices(); err != nil {
		return nil, err
	}
	if l.pair, err = lab.StartPair(ctx, dir, binary, pairYAML, ns, ns); err != nil {
		return nil, err
	}
	return l, l.findPrograms()
}

// floor is what the harness does for lockstep, without lockstep: the same taps, and a
// bridge that passes on at once what the PVM sends; what the SVM sends is dropped.
type floor struct{ lockstep }

// newFloor makes the taps in the calling thread's network namespace.
func newFloor() (*floor, error) {
	f := &floor{lockstep{buf: make([]byte, maxTap)}}
	if err := f.devices(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// feed sends the PVM's frames second, because they leave at once, and nothing is to
// leave before both guests have sent it.
func (f *floor) feed(g guest, frames []frame) error { return f.lockstep.feed(svm-g, frames) }

func (f *floor) cpu() (time.Duration, error) { return 0, nil }

// devices makes the taps, the bridge and the peer link.
func (l *lockstep) devices() (err error) {
	for _, t := range []struct {
		to   **tap
		name string
	}{{&l.tap[pvm], "tapP"}, {&l.tap[svm], "tapS"}, {&l.client, "client"}} {
		if *t.to, err = openTap(t.name); err != nil {
			return err
		}
	}
	noSnooping := false // a bridge that snoops sends IGMP
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &noSnooping}
	err = errors.Join(
		netlink.LinkAdd(bridge),
		netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "peerP", MTU: 1500}, PeerName: "peerS", PeerMTU: 1500}),
	)
	if err != nil {
		return fmt.Errorf("make bridge and peer link: %w", err)
	}
	for _, name := range []string{"br0", "peerP", "peerS", "tapP", "tapS", "client"} {
		dev, err := netlink.LinkByName(name)
		if err == nil && (name == "tapP" || name == "client") {
			err = netlink.LinkSetMaster(dev, bridge)
		}
		if err == nil {
			err = netlink.LinkSetUp(dev)
		}
		if err != nil {
			return fmt.Errorf("prepare %s: %w", name, err)
		}
	}
	// What the guests receive is the client's ACKs, for which nobody waits.
	for _, t := range l.tap {
		go t.discard()
	}
	return nil
}

// findPrograms opens the programs at the pair's devices.
func (l *lockstep) findPrograms() error {
	for _, name := range []string{"tapP", "tapS", "peerP", "peerS"} {
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			q, err := link.QueryPrograms(link.QueryOptions{Target: dev.Attrs().Index, Attach: at})
			if err != nil {
				return fmt.Errorf("programs of %s: %w", name, err)
			}
			for _, p := range q.Programs {
				prog, err := ebpf.NewProgramFromID(p.ID)
				if err != nil {
					return fmt.Errorf("program %d of %s: %w", p.ID, name, err)
				}
				l.progs = append(l.progs, prog)
			}
		}
	}
	if len(l.progs) == 0 {
		return errors.New("the pair replicates, and no program is at its devices")
	}
	return nil
}

// close ends the pair, after its guests: as long as one has its tap, lockstep is not unloaded. The other
// devices go with the namespace.
func (l *lockstep) close() error {
	var errs []error
	for _, p := range l.progs {
		errs = append(errs, p.Close())
	}
	for _, t := range []*tap{l.tap[pvm], l.tap[svm], l.client} {
		if t != nil {
			errs = append(errs, t.file.Close())
		}
	}
	if l.pair != nil {
		errs = append(errs, l.pair.Stop())
	}
	return errors.Join(errs...)
}

// renew has nothing to do: a connection that is stuck holds up no other.
func (l *lockstep) renew() error { return nil }

func (l *lockstep) port() (uint16, error) { return l.ports.next() }

func (l *lockstep) greet(f *flow) error {
	seg := segment{fromClient: true, port: f.port, seq: clientISN, flags: flagSYN, opts: []byte{optMSS, 4, mss >> 8, mss & 0xff}}
	return l.client.send(seg.head(), nil)
}

func (l *lockstep) ack(f *flow, pos uint32) error {
	seg := segment{fromClient: true, port: f.port, seq: clientISN + 1, ack: pos, flags: flagACK}
	return l.client.send(seg.head(), nil)
}

func (l *lockstep) feed(g guest, frames []frame) error {
	for _, f := range frames {
		if g == svm {
			seq := binary.BigEndian.Uint32(f.head[seqAt:])
			binary.BigEndian.PutUint32(f.head[seqAt:], seq+l.skew)
		}
		if err := l.tap[g].send(f.head, f.payload); err != nil {
			return err
		}
	}
	return nil
}

func (l *lockstep) take(visit func([]byte)) error {
	if err := l.client.file.SetReadDeadline(time.Now().Add(grain)); err != nil {
		return err
	}
	n, err := l.client.file.Read(l.buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read from the client's tap: %w", err)
	}
	if n > vnetLen {
		visit(l.buf[vnetLen:n])
	}
	return nil
}

func (l *lockstep) cpu() (sum time.Duration, err error) {
	for _, d := range []*lab.Process{l.pair.P, l.pair.S} {
		ran, err := cpuOf(d.PID())
		if err != nil {
			return 0, fmt.Errorf("%w; its log: %s", err, d.Log())
		}
		sum += ran
	}
	return sum, nil
}

func (l *lockstep) programs() (sum time.Duration, err error) {
	for _, p := range l.progs {
		s, err := p.Stats()
		if err != nil {
			return 0, fmt.Errorf("run time of a program: %w", err)
		}
		sum += s.Runtime
	}
	return sum, nil
}

// lost names what the kernel programs had no room for; "": nothing.
func (l *lockstep) lost(ctx context.Context) (string, error) {
	var all []string
	for _, node := range []string{"alpha", "beta"} {
		s, err := l.pair.Status(ctx, node)
		if err != nil {
			return "", fmt.Errorf("status of %s: %w", node, err)
		}
		for _, name := range []string{"no_slot", "no_ring", "copy_lost", "conn_full"} {
			if n := s.Counters[name]; n > 0 {
				all = append(all, fmt.Sprintf("%s %s %d times", s.Role, name, n))
			}
		}
	}
	return strings.Join(all, ", "), nil
}
