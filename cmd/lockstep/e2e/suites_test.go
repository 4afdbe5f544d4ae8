// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Load and conformance tools that others wrote, with servers that others wrote in both
// guests. A tool judges by itself whether all is well; what it finds has to be what it
// finds with mirroring alone.

// suite is such a tool with its servers.
type suite struct {
	name  string
	serve func(p *pair, ns string) // starts a guest's servers
	load  func(p *pair) found      // fails the test when the tool is not content
}

// found is what a tool found.
type found struct {
	rate   float64 // how fast
	unit   string
	report string // what has to be the same with mirroring alone
}

// times is how much longer than in `make test` the tools run: LOCKSTEP_SUITES.
func times(t *testing.T) int {
	t.Helper()
	s := os.Getenv("LOCKSTEP_SUITES")
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("LOCKSTEP_SUITES is %q, want how many times as long the suites run", s)
	}
	return n
}

// patient does not take a guest that waits for a CPU, or a handshake whose first segments were lost,
// for a divergence.
const patient = "compare: {timeout: 10s}"

// TestSuites: the tools are content with what comes through lockstep, and find what
// they find with mirroring alone; servers that answer alike cost no checkpoint.
func TestSuites(t *testing.T) {
	alone := newMirror(t, lt.Veth)
	p := newPair(t, lt.Veth, "", "", patient)
	for _, s := range suites(t, times(t)) {
		t.Run(s.name, func(t *testing.T) { s.compare(t, alone, p) })
	}
	p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 })
}

// TestSuitesMutation: one byte of a file that differs between the guests is seen: it asks for
// checkpoints, and the tool is not content.
func TestSuitesMutation(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", patient)
	both(p, serveNginx)
	f, err := os.OpenFile(filepath.Join(nginxDir(p, p.SVM), "www", "1k"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("!"), 500); err != nil {
		t.Fatal(err)
	}
	if out := client(p, "wrk", "-t", "1", "-c", "8", "-d", "2s", "--timeout", "1s", urlNginx+"/1k"); !wrkComplains(out) {
		t.Errorf("wrk got the guests' different answers:\n%s", out)
	}
	if s := p.status("alpha"); s.CheckpointsRequested == 0 {
		t.Error("no checkpoint was asked for")
	}
}

// compare runs a suite with mirroring alone and through lockstep.
func (s *suite) compare(t *testing.T, alone, p *pair) {
	var floor, got found
	before := p.status("alpha").CheckpointsRequested
	t.Run("mirroring alone", func(t *testing.T) {
		alone := alone.with(t)
		both(alone, s.serve)
		floor = s.load(alone)
	})
	t.Run("lockstep", func(t *testing.T) {
		p := p.with(t)
		both(p, s.serve)
		got = s.load(p)
		after := p.await("alpha", func(s *api.Status) bool { return s.HeldPackets == 0 })
		if n := after.CheckpointsRequested - before; n != 0 {
			t.Errorf("%d checkpoints requested: %+v", n, after.Causes)
		}
	})
	if t.Failed() {
		return
	}
	if got.report != floor.report {
		t.Errorf("through lockstep:\n%s\nwith mirroring alone:\n%s", got.report, floor.report)
	}
	t.Logf("%.0f %s, %.0f %% of the %.0f with mirroring alone", got.rate, got.unit, 100*got.rate/floor.rate, floor.rate)
}

// newMirror is a pair of guests without daemons: what the client sends is mirrored by the
// programs that bench measures lockstep against, and what the PVM sends leaves at once.
func newMirror(t *testing.T, peer lt.Peer) *pair {
	t.Helper()
	p := newWorldPair(t, peer, "", "", "")
	// The client goes by the PVM's window. What does not fit into the SVM's is lost to it for good.
	lt.Run(t, "nsenter", "--net=/run/netns/"+p.SVM, "sysctl", "-qw", "net.ipv4.tcp_rmem=4096 67108864 67108864")
	spec, err := ebpf.LoadCollectionSpec(filepath.Join("..", "..", "..", "bench", "proxies", "baseline_bpfel.o"))
	if err != nil {
		t.Fatalf("read the programs that mirror: %v", err)
	}
	for name, at := range map[string][2]string{"peer_p": {p.HostP, "peerP"}, "tap_s": {p.HostS, "tapS"}} {
		if err := spec.Variables[name].Set(uint32(lt.Index(t, at[0], at[1]))); err != nil {
			t.Fatal(err)
		}
	}
	programs, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("load the programs that mirror: %v", err)
	}
	t.Cleanup(programs.Close)
	for name, at := range map[string]struct {
		ns, device string
		attach     ebpf.AttachType
	}{
		"base_mirror":  {p.HostP, "tapP", ebpf.AttachTCXEgress},
		"base_pri_out": {p.HostP, "tapP", ebpf.AttachTCXIngress},
		"base_sec_in":  {p.HostS, "peerS", ebpf.AttachTCXIngress},
		"base_sec_out": {p.HostS, "tapS", ebpf.AttachTCXIngress},
	} {
		device := lt.Index(t, at.ns, at.device)
		lt.In(t, at.ns, func() {
			l, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: programs.Programs[name], Attach: at.attach})
			if err != nil {
				t.Fatalf("attach %s: %v", name, err)
			}
			t.Cleanup(func() { l.Close() })
		})
	}
	return p
}
