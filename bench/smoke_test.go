// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The test binary is also the service of the guests and the client.
const actAs = "LOCKSTEP_BENCH_ACT_AS"

func TestMain(m *testing.M) {
	as, arg, _ := strings.Cut(os.Getenv(actAs), " ")
	err := error(nil)
	switch as {
	case "guest":
		err = serve()
	case "client":
		err = runJob(arg)
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Targets of the ratios.
const (
	latencyMost = 2.5  // times mirroring only, median
	bulkLeast   = 0.60 // of mirroring only
	peerMost    = 0.05 // record bytes per byte of output
)

// size is how much a run does.
type size struct {
	rounds, warm, exchanges, bulk int
}

// TestSmoke measures and prints. It fails when something does not work, never because of
// a figure. LOCKSTEP_BENCH names the lockstep binary to measure in a whole run. Without it
// the run is short, as a test of the benchmark.
func TestSmoke(t *testing.T) {
	lt.NeedRoot(t)
	bin, s := os.Getenv("LOCKSTEP_BENCH"), size{rounds: 5, warm: 1000, exchanges: 5000, bulk: 1 << 30}
	if bin == "" {
		bin, s = filepath.Join(t.TempDir(), "lockstep"), size{rounds: 1, warm: 50, exchanges: 500, bulk: 32 << 20}
		lt.Run(t, "go", "build", "-o", bin, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	}
	ours, base := newLockstep(t, bin), newBaseline(t)
	describe(t, bin, s)

	for range s.rounds { // in turn, so that disturbances of the machine hit both alike
		for _, u := range []*setup{base, ours} {
			for do, r := range u.round(s) {
				u.results[do] = append(u.results[do], r)
			}
		}
	}
	// In a round of its own, because the kernel's counting costs time too.
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatalf("count programs' run time: %v", err)
	}
	defer stats.Close()
	report(base, ours, base.round(s), ours.round(s))
}

// setup is a World with services, and the measurements made in it.
type setup struct {
	*lt.World
	t       testing.TB
	daemons []*exec.Cmd
	results map[byte][]result
}

func newSetup(t testing.TB) *setup {
	u := &setup{World: lt.NewWorld(t, lt.Veth), t: t, results: make(map[byte][]result)}
	for _, ns := range []string{u.PVM, u.SVM} {
		u.serve(ns)
	}
	return u
}

func newBaseline(t testing.TB) *setup {
	u := newSetup(t)
	attachBaseline(t, u.World)
	return u
}

// act runs this binary in a namespace, in another role.
func (u *setup) act(ns, as string) *exec.Cmd {
	exe, err := os.Executable()
	if err != nil {
		u.t.Fatal(err)
	}
	cmd := lt.Command(ns, exe)
	cmd.Env = append(os.Environ(), actAs+"="+as, "GODEBUG=asyncpreemptoff=1")
	return cmd
}

func (u *setup) serve(ns string) {
	u.t.Helper()
	cmd := u.act(ns, "guest")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() {
		cmd.Process.Kill() // it does not end by itself
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		u.t.Fatalf("service in %s: %q, %v", ns, line, err)
	}
}

func newLockstep(t testing.TB, bin string) *setup {
	u := newSetup(t)
	config := filepath.Join(u.Dir, "pair.yaml")
	yaml := `vm: bench
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
tls: {insecure: true}
pin_dir: bpf/lockstep
run_dir: run
`
	if err := os.WriteFile(config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []struct{ node, ns, role string }{{"alpha", u.HostP, "primary"}, {"beta", u.HostS, "secondary"}} {
		var log bytes.Buffer
		cmd := lt.Command(d.ns, bin, "run", "-c", config, "--node", d.node, "--role", d.role)
		cmd.Stderr = &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		u.daemons = append(u.daemons, cmd)
		t.Cleanup(func() {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Errorf("stop %s: %v", d.node, err)
			}
			if err := cmd.Wait(); err != nil || t.Failed() {
				t.Errorf("%s: %v; its log:\n%s", d.node, err, log.String())
			}
			if out, err := lt.Command(d.ns, bin, "unload", "-c", config, "--node", d.node).CombinedOutput(); err != nil {
				t.Errorf("unload %s: %v\n%s", d.node, err, out)
			}
		})
	}
	for _, node := range []string{"alpha", "beta"} {
		lt.Eventually(t, 20*time.Second, func() (bool, string) {
			s := new(api.Status)
			out, err := exec.Command(bin, "status", "-c", config, "--node", node, "--json").CombinedOutput()
			if err == nil {
				err = json.Unmarshal(out, s)
			}
			return err == nil && s.State == "replicating", fmt.Sprintf("%s: %s %v", node, out, err)
		})
	}
	return u
}

// result is a job and what it cost.
type result struct {
	job
	records, mirrored uint64        // bytes on the peer link, from S and from P
	packets           uint64        // that the client received; a GSO frame is one
	daemons           time.Duration // CPU of both
	programs          time.Duration // CPU of the programs on all devices
}

// round does each job once.
func (u *setup) round(s size) map[byte]result {
	out := make(map[byte]result)
	for _, j := range []job{
		{Do: doEcho, Warm: s.warm, N: s.exchanges},
		{Do: doSource, N: s.bulk},
		{Do: doSink, N: s.bulk},
	} {
		out[j.Do] = u.measure(j)
	}
	return out
}

// measure has the client do a job.
func (u *setup) measure(j job) result {
	u.t.Helper()
	arg, err := json.Marshal(&j)
	if err != nil {
		u.t.Fatal(err)
	}
	before := u.costs()
	cmd := u.act(u.Client, "client "+string(arg))
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		u.t.Fatalf("client, job %s: %v: %s", arg, err, &stderr)
	}
	r := u.costs()
	if err := json.Unmarshal(out.Bytes(), &r.job); err != nil {
		u.t.Fatalf("client, job %s: %v: %s", arg, err, &out)
	}
	r.records -= before.records
	r.mirrored -= before.mirrored
	r.packets -= before.packets
	r.daemons -= before.daemons
	r.programs -= before.programs
	return r
}

// costs reads the counters.
func (u *setup) costs() (r result) {
	r.records = u.device(u.HostS, "peerS").TxBytes
	r.mirrored = u.device(u.HostP, "peerP").TxBytes
	r.packets = u.device(u.Client, "eth0").RxPackets
	for _, d := range u.daemons {
		r.daemons += u.cpu(d.Process.Pid)
	}
	for _, d := range [][2]string{{u.HostP, "tapP"}, {u.HostP, "peerP"}, {u.HostS, "tapS"}, {u.HostS, "peerS"}} {
		lt.In(u.t, d[0], func() { r.programs += u.runTime(d[1]) })
	}
	return r
}

func (u *setup) device(ns, name string) (s *netlink.LinkStatistics) {
	lt.In(u.t, ns, func() {
		l, err := netlink.LinkByName(name)
		if err != nil {
			u.t.Fatalf("%s in %s: %v", name, ns, err)
		}
		s = l.Attrs().Statistics
	})
	return s
}

// cpu is the time that a process's threads have run.
func (u *setup) cpu(pid int) (sum time.Duration) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		u.t.Fatalf("threads of process %d: %v", pid, err)
	}
	for _, f := range threads {
		b, err := os.ReadFile(f)
		if err != nil {
			u.t.Fatal(err)
		}
		var ran time.Duration
		if _, err := fmt.Sscan(string(b), &ran); err != nil {
			u.t.Fatalf("%s: %q: %v", f, b, err)
		}
		sum += ran
	}
	return sum
}

// runTime is how long the programs on a device have run while the kernel counted that
// (BPF_ENABLE_STATS). It is called in the device's namespace.
func (u *setup) runTime(device string) (sum time.Duration) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		u.t.Fatalf("%s: %v", device, err)
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at})
		if err != nil {
			u.t.Fatalf("programs of %s: %v", device, err)
		}
		for _, p := range q.Programs {
			prog, err := ebpf.NewProgramFromID(p.ID)
			if err != nil {
				u.t.Fatalf("program %d of %s: %v", p.ID, device, err)
			}
			s, err := prog.Stats()
			prog.Close()
			if err != nil {
				u.t.Fatalf("program %d of %s: %v", p.ID, device, err)
			}
			sum += s.Runtime
		}
	}
	return sum
}

// describe prints what is measured and on which machine.
func describe(t testing.TB, bin string, s size) {
	t.Helper()
	version, err := exec.Command(bin, "version").Output()
	if err != nil {
		t.Fatalf("version of %s: %v", bin, err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	model := "unknown CPU"
	if m := regexp.MustCompile(`(?m)^(?:model name|Model|uarch)\s*:\s*(.*)$`).FindSubmatch(cpus); m != nil {
		model = string(m[1])
	}
	fmt.Printf("%s, Linux %s, %s, %d cores for client, both hosts and both guests\n",
		bytes.TrimSpace(version), unix.ByteSliceToString(uts.Release[:]), model, runtime.NumCPU())
	control, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control") // new namespaces have the same
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("medians of %d rounds in turn; a round: %d exchanges of %d bytes, %d MiB each way; GSO on, TCP %s\n\n",
		s.rounds, s.exchanges, message, s.bulk>>20, bytes.TrimSpace(control))
}

// median is that of f over the results.
func median[T cmp.Ordered](rs []result, f func(*result) T) T {
	var v []T
	for i := range rs {
		v = append(v, f(&rs[i]))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "NOT met"
}

func report(base, ours *setup, costBase, costOurs map[byte]result) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	row("", "mirroring only", "lockstep", "ratio", "target")

	p50 := func(r *result) int64 { return r.P50 }
	p99 := func(r *result) int64 { return r.P99 }
	µs := func(ns int64) string { return fmt.Sprintf("%.1f µs", float64(ns)/1e3) }
	b, o := base.results[doEcho], ours.results[doEcho]
	ratio := float64(median(o, p50)) / float64(median(b, p50))
	row("request/response p50", µs(median(b, p50)), µs(median(o, p50)), fmt.Sprintf("%.2f", ratio), fmt.Sprintf("≤ %.1f: %s", latencyMost, verdict(ratio <= latencyMost)))
	row("request/response p99", µs(median(b, p99)), µs(median(o, p99)), fmt.Sprintf("%.2f", float64(median(o, p99))/float64(median(b, p99))))

	for _, j := range []struct {
		do   byte
		name string
	}{{doSource, "bulk, guest to client"}, {doSink, "bulk, client to guest"}} {
		rate := func(r *result) float64 { return float64(r.N) * 8 / float64(r.Wall) } // Gbit/s
		b, o := median(base.results[j.do], rate), median(ours.results[j.do], rate)
		row(j.name, fmt.Sprintf("%.2f Gbit/s", b), fmt.Sprintf("%.2f Gbit/s", o), fmt.Sprintf("%.0f %%", 100*o/b), fmt.Sprintf("≥ %.0f %%: %s", 100*bulkLeast, verdict(o/b >= bulkLeast)))
	}

	share := median(ours.results[doSource], func(r *result) float64 { return float64(r.records) / float64(r.N) })
	row("peer-link bytes per output byte", "", "", fmt.Sprintf("%.2f %%", 100*share), fmt.Sprintf("≤ %.0f %%: %s", 100*peerMost, verdict(share <= peerMost)))
	share = median(ours.results[doSource], func(r *result) float64 { return float64(r.mirrored) / float64(r.N) })
	row("the same, mirrored input", "", "", fmt.Sprintf("%.2f %%", 100*share))

	for _, j := range []struct {
		do   byte
		name string
	}{{doEcho, "request/response"}, {doSource, "bulk, guest to client"}} {
		b, o := costBase[j.do], costOurs[j.do]
		each := func(r *result, d time.Duration) string {
			return fmt.Sprintf("%.2f µs", float64(d)/1e3/float64(r.packets))
		}
		row(j.name+", CPU per packet out: daemons", "", each(&o, o.daemons))
		row(j.name+", CPU per packet out: programs", each(&b, b.programs), each(&o, o.programs))
	}
}
