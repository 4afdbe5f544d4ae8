// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter/arbitertest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// historyClients is the number of clients, each with one connection for the whole of a
// history.
const historyClients = 8

// history is a pair whose guest's registers clients use while hosts, daemons, links and
// disks fail.
type history struct {
	registerHistory
	p       *livingPair
	seed    uint64
	rng     *rand.Rand
	disk    net.Conn              // writes files, one after the other
	small   map[string]*smallDisk // the nodes' images are on these
	files   int
	primary string
	faults  []porcupine.Annotation

	stop    chan struct{} // ends the clients
	working sync.WaitGroup
	broken  chan error // why clients ended before that
}

// newHistory starts a pair and its clients. binary is the daemons'; "": the whole one. One
// of loose operations may be carried out in another order by either guest.
func newHistory(t *testing.T, seed uint64, binary string, loose int) *history {
	t.Helper()
	h := &history{seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), small: make(map[string]*smallDisk), primary: "alpha", stop: make(chan struct{}), broken: make(chan error, historyClients)}
	h.p = newLivingPair(t, 1, `heartbeat: {restart: 20s}
migration: {unix: migration.sock, nbd_port: 10809}
arbiter: {type: etcd, endpoints: ['198.51.100.9:2379'], timeout: 1s}`)
	if binary != "" {
		h.p.binary = binary
	}
	arbitertest.StartEtcd(t, arbitertest.Options{Listen: "198.51.100.9:2379", Command: func(name string, args ...string) *exec.Cmd {
		return lt.Command(h.p.Switch, name, args...)
	}})
	for _, node := range []string{"alpha", "beta"} {
		h.small[node] = newSmallDisk(t, filepath.Join(h.p.Dir, "small-"+node), 48<<20)
		h.small[node].take(filepath.Join(h.p.Dir, node+"0.qcow2"))
		h.p.smallOverlays(node, 32)
	}
	h.p.start()
	h.disk = h.p.mustDial(lt.Guest4, portDisk)
	h.began = time.Now()
	for id := range historyClients {
		conn := h.p.mustDial([]string{lt.Guest4, lt.Guest6}[id%2], portCAS)
		c := &registerClient{registerHistory: &h.registerHistory, id: id, loose: loose, c: conn, in: bufio.NewReader(conn), rng: rand.New(rand.NewPCG(seed, uint64(id+1)))}
		h.working.Go(func() {
			for {
				select {
				case <-h.stop:
					return
				default:
				}
				if err := c.do(); err != nil {
					h.broken <- err
					return
				}
			}
		})
	}
	return h
}

// end stops the clients and checks the history. It fails the test if a connection has broken
// or the check's result is another than want, and keeps the history's picture then.
func (h *history) end(want porcupine.CheckResult) {
	t := h.p.t
	close(h.stop)
	h.working.Wait()
	close(h.broken)
	for err := range h.broken {
		t.Error(err)
	}
	took, checkpoints, differed := time.Since(h.began), 0, 0
	for _, node := range []string{"alpha", "beta"} {
		out, _ := h.p.order(node, "events", "--json")
		checkpoints += strings.Count(out, `"kind":"checkpoint"`)
		differed += strings.Count(out, "payload differs")
	}
	ops, result := h.check()
	var what []string
	for _, f := range h.faults {
		what = append(what, f.Description)
	}
	t.Logf("seed %d: %d operations of %d clients and %d checkpoints, %d because the guests differed, in %v; %d faults (%s): linearizable: %s",
		h.seed, len(ops), historyClients, checkpoints, differed, took.Round(time.Second), len(what), strings.Join(what, ", "), result)
	if result != want {
		t.Errorf("linearizable: %s, want %s", result, want)
	}
	if t.Failed() {
		h.picture(ops)
	}
}

// picture keeps what porcupine shows of a history, in the repository's bin/histories.
func (h *history) picture(ops []porcupine.Operation) {
	t := h.p.t
	_, info := porcupine.CheckOperationsVerbose(registerModel, ops, time.Minute)
	info.AddAnnotations(h.faults)
	path, err := filepath.Abs(fmt.Sprintf("../../../bin/histories/%d.html", h.seed))
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = porcupine.VisualizePath(registerModel, info, path)
	}
	if err != nil {
		t.Errorf("the history's picture: %v", err)
		return
	}
	t.Logf("the history's picture is %s", path)
}

// historyFault is something that goes wrong, and is mended before anything else does.
type historyFault struct {
	name   string
	strike func(h *history)
	mend   func(h *history) // after one host goes alone; nil: nothing is to be done
	stays  bool             // no host goes alone
}

func (h *history) secondary() string { return other(h.primary) }

func cutLinks(what string) historyFault {
	return historyFault{
		name:   "cut " + what,
		strike: func(h *history) { h.p.partition(what, true) },
		mend:   func(h *history) { h.p.partition(what, false) },
	}
}

// loseHost is the end of a whole host, without a sign.
func loseHost(role string, node func(h *history) string) historyFault {
	var lost string
	links := func(h *history, up bool) {
		h.p.SetLink(h.p.t, h.p.HostP, "ctl", up)
		h.p.SetLink(h.p.t, h.p.HostP, "peerP", up)
		h.p.SetLink(h.p.t, h.p.host(lost), "uplink", up)
	}
	return historyFault{
		name: "the " + role + "'s host is gone",
		strike: func(h *history) {
			lost = node(h)
			links(h, false)
			h.p.kill(lost)
			h.p.killQEMU(lost)
		},
		mend: func(h *history) {
			links(h, true)
			h.p.run(lost, "secondary")
		},
	}
}

// freeze stops a process, which goes on when its host is given up.
func freeze(name string, pid func(h *history) int) historyFault {
	var stopped int
	return historyFault{
		name: name,
		strike: func(h *history) {
			if stopped = pid(h); stopped == 0 {
				h.p.t.Fatal("no QEMU to freeze")
			}
			_ = syscall.Kill(stopped, syscall.SIGSTOP)
		},
		mend: func(*history) { _ = syscall.Kill(stopped, syscall.SIGCONT) }, // fails when it was ended meanwhile
	}
}

// fillImage leaves no room for a node's image, and has the guest write what needs some.
func fillImage(role string, node func(h *history) string) historyFault {
	var full *smallDisk
	return historyFault{
		name: "the " + role + "'s image is full",
		strike: func(h *history) {
			full = h.small[node(h)]
			full.fill()
			h.files++
			h.disk.SetDeadline(time.Now().Add(patience))
			name := fmt.Sprintf("f%d", h.files)
			if _, err := fmt.Fprintf(h.disk, "fill %s 1\n", name); err != nil {
				h.p.t.Fatal(err)
			}
			got, err := bufio.NewReader(h.disk).ReadString('\n')
			if want := fmt.Sprintf("wrote %s <nil>\n", name); got != want {
				h.p.t.Fatalf("%q, %v, want %q", got, err, want)
			}
		},
		mend: func(*history) { full.empty() },
	}
}

var historyFaults = []historyFault{
	{name: "the primary's QEMU is killed", strike: func(h *history) { h.p.killQEMU(h.primary) }},
	{name: "the secondary's QEMU is killed", strike: func(h *history) { h.p.killQEMU(h.secondary()) }},
	{name: "the primary's daemon is killed", stays: true, strike: func(h *history) {
		h.p.kill(h.primary)
		h.p.run(h.primary, "primary")
	}},
	{name: "the secondary's daemon is killed", stays: true, strike: func(h *history) {
		h.p.kill(h.secondary())
		h.p.run(h.secondary(), "secondary")
	}},
	loseHost("primary", func(h *history) string { return h.primary }),
	loseHost("secondary", (*history).secondary),
	cutLinks("control"),
	cutLinks("peer"),
	cutLinks("control peer"),
	freeze("the primary's QEMU stands still", func(h *history) int { return h.p.qemu(h.primary) }),
	freeze("the secondary's QEMU stands still", func(h *history) int { return h.p.qemu(h.secondary()) }),
	freeze("the primary's daemon stands still", func(h *history) int { return h.p.procs[h.primary].Process.Pid }),
	fillImage("primary", func(h *history) string { return h.primary }),
	fillImage("secondary", (*history).secondary),
	{name: "the connection to the secondary's disk is reset", strike: func(h *history) {
		lt.Run(h.p.t, "nsenter", "--net=/run/netns/"+h.p.host(h.primary), "ss", "-K", "dport", "=", "10809")
	}},
	{
		name:   "the secondary's overlays are full",
		strike: func(h *history) { fillUp(h.p.t, h.p.overlays(h.secondary())) },
		mend: func(h *history) {
			for _, node := range []string{"alpha", "beta"} {
				_ = os.Remove(filepath.Join(h.p.overlays(node), "ballast")) // one of them has it
			}
		},
	},
}

// status is a node's; the zero one when no daemon answers.
func (h *history) status(node string) api.Status {
	ctx, cancel := context.WithTimeout(h.p.t.Context(), 10*time.Second)
	defer cancel()
	s, err := api.FetchStatus(ctx, filepath.Join(h.p.Dir, "run/web1-"+node+".sock"))
	if err != nil {
		return api.Status{Detail: err.Error()}
	}
	return s
}

// until waits until a node is the primary, with a status as wanted of it, and returns
// which.
func (h *history) until(what string, want func(primary, secondary api.Status) bool) (primary string) {
	h.p.t.Helper()
	lt.Eventually(h.p.t, 3*time.Minute, func() (bool, string) {
		a, b := h.status("alpha"), h.status("beta")
		for _, x := range [][2]api.Status{{a, b}, {b, a}} {
			if x[0].Role == "primary" && want(x[0], x[1]) {
				primary = x[0].Node
				return true, ""
			}
		}
		text, _ := json.Marshal([]api.Status{a, b})
		return false, what + ": " + string(text)
	})
	return primary
}

// covered waits until either host may die. A node whose daemon has ended, because the other
// one serves, follows that again.
func (h *history) covered(term uint64) {
	h.p.t.Helper()
	h.primary = h.until("the pair is not covered", func(p, s api.Status) bool {
		for _, node := range []string{"alpha", "beta"} {
			var info unix.Siginfo
			if err := unix.Waitid(unix.P_PID, h.p.procs[node].Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err == nil && info.Signo != 0 {
				h.p.rejoin(node)
				return false
			}
		}
		return p.State == "replicating" && p.Covered && p.ArbiterTerm >= term && s.State == "replicating" && s.Covered
	})
}

// suffer has a fault strike, at a random moment and maybe in the middle of a checkpoint, and
// waits until the pair is covered again.
func (h *history) suffer(f historyFault) {
	t := h.p.t
	t.Helper()
	<-time.After(time.Duration(h.rng.IntN(2000)) * time.Millisecond) // a random moment of the load
	if ordered := make(chan struct{}); h.rng.IntN(2) == 0 {
		defer func() { <-ordered }()
		primary := h.primary
		go func() {
			defer close(ordered)
			_, err := h.p.order(primary, "checkpoint")
			t.Log("a checkpoint is ordered; error: ", err)
		}()
		<-time.After(time.Duration(h.rng.IntN(300)) * time.Millisecond)
	}
	h.strike(f)
}

// strike has a fault strike, and waits until the pair is covered again.
func (h *history) strike(f historyFault) {
	t := h.p.t
	t.Helper()
	term := h.status(h.primary).ArbiterTerm
	strikes := time.Since(h.began)
	t.Logf("%v: %s; %s is the primary", strikes.Round(time.Millisecond), f.name, h.primary)
	f.strike(h)
	if !f.stays {
		term++
		h.until("no host goes alone after: "+f.name, func(p, _ api.Status) bool { return p.ArbiterTerm >= term })
	}
	if f.mend != nil {
		f.mend(h)
	}
	h.covered(term)
	h.faults = append(h.faults, porcupine.Annotation{Tag: "faults", Description: f.name, Start: int64(strikes), End: int64(time.Since(h.began))})
}

// runHistory is one round: as many faults, of different kinds as long as there are some.
func runHistory(t *testing.T, seed uint64, faults int) {
	h := newHistory(t, seed, "", 5)
	defer h.end(porcupine.Ok)
	var order []int
	for range faults {
		if len(order) == 0 {
			order = h.rng.Perm(len(historyFaults))
		}
		h.suffer(historyFaults[order[0]])
		if order = order[1:]; len(h.broken) > 0 {
			return
		}
	}
}

// TestHistories: clients read, write and swap registers that are on the guest's disk, while
// hosts, QEMUs, daemons, links and disks fail at random. For the clients it is one server
// that never fails: no connection breaks, and what they see is linearizable. Soaking, with
// LOCKSTEP_HISTORIES=20m, it goes on for so long, each round with another seed.
// LOCKSTEP_HISTORIES_SEED, which is the subtest's name, has a round's faults again, as many as
// LOCKSTEP_HISTORIES_FAULTS says.
func TestHistories(t *testing.T) {
	seed, faults, length := uint64(time.Now().UnixNano()), 4, time.Duration(0)
	for name, into := range map[string]any{"LOCKSTEP_HISTORIES_SEED": &seed, "LOCKSTEP_HISTORIES_FAULTS": &faults} {
		if text := os.Getenv(name); text != "" && !sscan(text, into) {
			t.Fatalf("%s is %q, not a number", name, text)
		}
	}
	if text := os.Getenv("LOCKSTEP_HISTORIES"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("LOCKSTEP_HISTORIES: %v", err)
		}
		faults *= 3
	}
	for began := time.Now(); ; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runHistory(t, seed, faults) })
		if t.Failed() || time.Since(began) >= length {
			return
		}
	}
}

// withoutCompare is a lockstep to which all digests are equal: what the guests sent at the
// same position leaves, though it may differ (mutR1 of package compare, which no build has).
func withoutCompare(t *testing.T) (binary string) {
	t.Helper()
	dir := t.TempDir()
	source, err := filepath.Abs("../../../compare/core.go")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	const rule, without = "return k.mut&m != 0", "return (k.mut|mutR1)&m != 0"
	if strings.Count(string(b), rule) != 1 {
		t.Fatalf("%s has not one %q", source, rule)
	}
	mutated, overlay, binary := filepath.Join(dir, "core.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "lockstep")
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{source: mutated}})
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{mutated: strings.Replace(string(b), rule, without, 1), overlay: string(replace)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	lt.Run(t, "go", "build", "-trimpath", "-buildvcs=false", "-overlay", overlay, "-o", binary, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	return binary
}

// TestMutationHistories: where the guests' outputs are not compared (R1), the guest that
// takes over has written in another order than clients have seen, and their history shows
// it. What was written last stays, and is read, while the primary dies. Whether the guests
// differ at that moment is chance, so only the soak has it.
func TestMutationHistories(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return
	}
	h := newHistory(t, uint64(time.Now().UnixNano()), withoutCompare(t), 1)
	defer h.end(porcupine.Illegal)
	more := func(operations int) {
		h.mu.Lock()
		want := len(h.ops) + operations
		h.mu.Unlock()
		lt.Eventually(t, time.Minute, func() (bool, string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			return len(h.ops) >= want, fmt.Sprintf("%d operations, want %d", len(h.ops), want)
		})
	}
	for range 20 {
		more(300)
		h.quiet.Store(true)
		more(100)
		h.strike(historyFaults[0])
		more(100)
		h.quiet.Store(false)
		if _, result := h.check(); result == porcupine.Illegal {
			return
		}
	}
}
