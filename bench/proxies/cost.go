// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

// parties are who uses CPU, as far as it can be told apart: threads, with what
// they do in the kernel, the interrupts' work among it.
var parties = []string{"client", "PVM", "SVM", "proxy on P", "proxy on S", "softirq threads"}

// counters are what one can read of a variant; of a run they are the differences.
type counters struct {
	cpu      map[string]time.Duration // by party
	waits    uint64                   // of the proxies
	switches uint64                   // of context, of the whole machine
	// Of the whole machine, counted in ticks.
	busy, softirq, idle time.Duration

	toS, toP    uint64 // bytes on the peer link
	rx, packets uint64 // bytes and packets that the client received; a GSO frame is one
	frames      frames
	programs    time.Duration // run time of the kernel programs, while the kernel counts that
}

// run is a job and what it cost.
type run struct {
	job      *workload.Job
	result   workload.Result
	counters // differences
}

// read reads all counters.
func (v *variant) read() (c counters, err error) {
	c.cpu = make(map[string]time.Duration)
	for party, p := range map[string]*lab.Process{
		"client": v.world.Clients[0].Process, "PVM": v.world.Services[0][0], "SVM": v.world.Services[1][0], "proxy on P": v.proxy.OnP, "proxy on S": v.proxy.OnS,
	} {
		if p == nil {
			continue
		}
		u, err := lab.UsageOf(p.PID())
		if err != nil {
			return c, fmt.Errorf("%s: %w; its log: %s", party, err, p.Log())
		}
		c.cpu[party] = u.CPU
		if strings.HasPrefix(party, "proxy") {
			c.waits += u.Waits
		}
	}
	for _, pid := range v.softirqs {
		u, err := lab.UsageOf(pid)
		if err != nil {
			return c, err
		}
		c.cpu["softirq threads"] += u.CPU
	}
	if err := c.machine(); err != nil {
		return c, err
	}
	for at, to := range map[place][2]*uint64{
		{v.world.HostP, "peerP"}: {&c.toS, new(uint64)},
		{v.world.HostS, "peerS"}: {&c.toP, new(uint64)},
		{v.world.HostP, "vc"}:    {&c.rx, &c.packets}, // what it transmits the client receives
	} {
		dev, err := at.ns.Device(at.device)
		if err != nil {
			return c, err
		}
		*to[0], *to[1] = dev.Statistics.TxBytes, dev.Statistics.TxPackets
	}
	if v.proxy.frames != nil {
		if c.frames, err = v.proxy.frames(); err != nil {
			return c, err
		}
	}
	for _, at := range []place{{v.world.HostP, "tapP"}, {v.world.HostP, "peerP"}, {v.world.HostS, "tapS"}, {v.world.HostS, "peerS"}} {
		if v.taps {
			break // there are no programs
		}
		ran, err := at.programs()
		if err != nil {
			return c, err
		}
		c.programs += ran
	}
	return c, nil
}

// tick is that of /proc/stat (USER_HZ).
const tick = 10 * time.Millisecond

// machine reads /proc/stat.
func (c *counters) machine() error {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return fmt.Errorf("read the machine's counters: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 7 && f[0] == "cpu": // user nice system idle iowait irq softirq
			for i, s := range f[1:8] {
				n, _ := strconv.ParseUint(s, 10, 64)
				t := time.Duration(n) * tick
				switch i {
				case 3, 4:
					c.idle += t
				case 6:
					c.softirq = t
					c.busy += t
				default:
					c.busy += t
				}
			}
		case len(f) == 2 && f[0] == "ctxt":
			c.switches, _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	return nil
}

// since is the difference.
func (c counters) since(b counters) counters {
	d := counters{
		cpu: make(map[string]time.Duration), waits: c.waits - b.waits, switches: c.switches - b.switches,
		busy: c.busy - b.busy, softirq: c.softirq - b.softirq, idle: c.idle - b.idle,
		toS: c.toS - b.toS, toP: c.toP - b.toP, rx: c.rx - b.rx, packets: c.packets - b.packets,
		frames: frames{c.frames.held - b.frames.held, c.frames.released - b.frames.released}, programs: c.programs - b.programs,
	}
	for party, t := range c.cpu {
		d.cpu[party] = t - b.cpu[party]
	}
	return d
}

// all is the CPU time of all parties.
func (c *counters) all() (sum time.Duration) {
	for _, t := range c.cpu {
		sum += t
	}
	return sum
}

// programs is how long the programs of a device have run while the kernel counted that
// (BPF_ENABLE_STATS).
func (at place) programs() (sum time.Duration, err error) {
	err = at.ns.Do(func() error {
		dev, err := at.ns.Device(at.device)
		if err != nil {
			return err
		}
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			q, err := link.QueryPrograms(link.QueryOptions{Target: dev.Index, Attach: attach})
			if err != nil {
				return fmt.Errorf("list the programs of %s: %w", at.device, err)
			}
			for _, p := range q.Programs {
				ran, err := runTime(p.ID)
				if err != nil {
					return fmt.Errorf("program %d of %s: %w", p.ID, at.device, err)
				}
				sum += ran
			}
		}
		return nil
	})
	return sum, err
}

func runTime(id ebpf.ProgramID) (time.Duration, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0, err
	}
	defer prog.Close()
	s, err := prog.Stats()
	if err != nil {
		return 0, err
	}
	return s.Runtime, nil
}

// softirqThreads are the kernel's, one of each CPU; a container does not see them.
func softirqThreads() (pids []int, err error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.HasPrefix(b, []byte("ksoftirqd/")) {
			continue // or it has ended meanwhile
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}
