// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// A stock Debian as guest, with services that nobody made for a pair: sshd's keys,
// PostgreSQL's cancel keys and nginx's dates differ between the guests, and each costs a
// checkpoint. What is judged is what clients see.

// debian is a pair of guests that run Debian, and clients that stay connected.
type debian struct {
	*livingPair
	dir         string // what .ci/debian made
	ssh         []string
	primary     string
	psql, shell *worker
	redis       *net.TCPConn
	pids        []string // of what serves these three
	web         *clientLoad
	committed   int // transactions of pgbench
	keys        int // set in redis
	began       time.Time
}

// newDebian boots the pair and connects the clients.
func newDebian(t *testing.T) *debian {
	t.Helper()
	d := &debian{dir: filepath.Join(filepath.Dir(qemutest.Dir(t)), "debian"), primary: "alpha", began: time.Now()}
	if _, err := os.Stat(filepath.Join(d.dir, "ready")); err != nil {
		lt.Missing(t, "no Debian for the guest: run make soak-deps (%v)", err)
	}
	d.livingPair = newMachinePair(t, "compare: {timeout: 500ms}", machine{
		kernel: filepath.Join(d.dir, "vmlinuz"), initrd: filepath.Join(d.dir, "initrd"),
		append: "console=ttyS0 root=/dev/vda ro net.ifnames=0 tsc=unstable",
		memory: 256<<20 - 16<<10, // no multiple of 256 KiB: see guestimage
		disks:  1,
		image:  func(path string) { lt.Run(t, "cp", filepath.Join(d.dir, "disk.qcow2"), path) },
	})
	d.patience = 10 * time.Minute
	t.Setenv("PGPASSWORD", "guest")
	t.Setenv("PGHOST", lt.Guest4)
	t.Setenv("PGUSER", "postgres")
	d.ssh = []string{"-i", filepath.Join(d.dir, "id"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=" + filepath.Join(d.Dir, "known"), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"}
	d.run("beta", "secondary")
	d.run("alpha", "primary")
	d.covered()
	d.say("the pair replicates, and the guest boots")
	lt.Eventually(t, d.patience, func() (bool, string) {
		console, err := os.ReadFile(filepath.Join(d.Dir, "alpha.serial"))
		return strings.Contains(string(console), "guest login:"), fmt.Sprintf("no login, %v", err)
	})
	d.say("the console shows a login")
	// PostgreSQL is the last one, and recovers if it was not shut down.
	lt.Eventually(t, d.patience, func() (bool, string) {
		out, err := lt.Command(d.Client, "pg_isready", "-t", "20").CombinedOutput()
		if err != nil {
			<-time.After(time.Second) // each try is a connection, which may cost a checkpoint
		}
		return err == nil, string(out)
	})
	d.say("sshd, nginx, PostgreSQL and redis take connections")
	d.psql = converse(d.pair, lt.Command(d.Client, "psql", "-qAtX", "-v", "ON_ERROR_STOP=1"))
	d.shell = converse(d.pair, lt.Command(d.Client, "ssh", append(d.ssh, "root@"+lt.Guest4, "exec sh")...))
	d.redis = d.mustDial(lt.Guest4, portRedis)
	d.pids = d.serving()
	d.web = openWebLoad(d.pair, "80", "/index.nginx-debian.html", 615, 500*time.Millisecond)
	d.say("clients are connected; systemd: %s", d.shell.ask("systemctl is-system-running"))
	return d
}

func (d *debian) say(format string, args ...any) {
	d.t.Logf("%6.1fs  %s", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

// serving are the guest's ends of the three connections.
func (d *debian) serving() []string {
	d.t.Helper()
	return []string{d.psql.ask("select pg_backend_pid();"), d.shell.ask("echo $$"), d.ask(d.redis, "CLIENT ID")}
}

// pgbench begins so many transactions of two clients, and returns when some are done.
func (d *debian) pgbench(transactions int) (end func()) {
	d.t.Helper()
	history := func() (n int) {
		if got := d.psql.ask("select count(*) from pgbench_history;"); !sscan(got, &n) {
			d.t.Fatalf("pgbench's history: %q", got)
		}
		return n
	}
	before := history()
	b := begin(d.pair, d.Client, filepath.Join(d.dir, "pgbench"), "-n", "-c", "2", "-t", fmt.Sprint(transactions/2), "postgres")
	lt.Eventually(d.t, d.patience, func() (bool, string) { return history() >= before+transactions/10, "few transactions" })
	return func() {
		d.t.Helper()
		out, err := b.end()
		if err != nil || !strings.Contains(out, fmt.Sprintf("processed: %[1]d/%[1]d\n", transactions)) || !strings.Contains(out, "failed transactions: 0 ") {
			d.t.Fatalf("pgbench: %v\n%s", err, out)
		}
		d.committed += transactions
	}
}

// copies takes a file to the guest and back.
func (d *debian) copies(size int) {
	d.t.Helper()
	content, file, back := make([]byte, size), filepath.Join(d.Dir, "file"), filepath.Join(d.Dir, "back")
	rand.NewChaCha8([32]byte{byte(size), byte(d.keys)}).Read(content)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		d.t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	client(d.pair, "scp", append(slices.Clone(d.ssh), file, "root@"+lt.Guest4+":file")...)
	if got := d.shell.ask("sha256sum < file"); !strings.HasPrefix(got, hex.EncodeToString(sum[:])) {
		d.t.Fatalf("the file came as %s, not %x", got, sum)
	}
	client(d.pair, "scp", append(slices.Clone(d.ssh), "root@"+lt.Guest4+":file", back)...)
	if got, err := os.ReadFile(back); err != nil || sha256.Sum256(got) != sum {
		d.t.Fatalf("the file came back with %d bytes, not the same %d, %v", len(got), size, err)
	}
}

// set sets another key in redis, and gets all that there are.
func (d *debian) set() {
	d.t.Helper()
	value := func(n int) string { return fmt.Sprintf("value-%d", n*n) }
	if got := d.ask(d.redis, fmt.Sprintf("SET key-%d %s", d.keys, value(d.keys))); got != "+OK" {
		d.t.Fatalf("redis: %q", got)
	}
	d.keys++
	for n := range d.keys {
		// As a number's length, so that the answer is one line.
		if got, want := d.ask(d.redis, fmt.Sprintf("STRLEN key-%d", n)), fmt.Sprintf(":%d", len(value(n))); got != want {
			d.t.Fatalf("redis: key-%d has a length of %q, not %q", n, got, want)
		}
	}
}

// all uses each service, beside transactions, and orders a checkpoint meanwhile.
func (d *debian) all(during func()) {
	d.t.Helper()
	pages := d.web.Answers.Load()
	d.web.Longest.Store(0)
	end := d.pgbench(100)
	during()
	d.set()
	if got := d.shell.ask("uname -n"); got != "guest" {
		d.t.Fatalf("the shell says %q", got)
	}
	d.copies(4 << 20)
	if got := client(d.pair, "ssh", append(slices.Clone(d.ssh), "root@"+lt.Guest4, "systemctl is-active nginx postgresql redis-server")...); got != "active\nactive\nactive\n" {
		d.t.Fatalf("services: %q", got)
	}
	end()
	if got := d.serving(); !slices.Equal(got, d.pids) {
		d.t.Fatalf("a client connected again: %q, were %q", got, d.pids)
	}
	d.say("%d transactions, %d keys, %d pages so far; the longest wait for a page was %v", d.committed, d.keys, d.web.Answers.Load(),
		time.Duration(d.web.Longest.Load()).Round(time.Millisecond))
	lt.Eventually(d.t, d.patience, func() (bool, string) { return d.web.Answers.Load() > pages, "no pages" })
}

// kills ends a node's QEMU, and returns when the other one serves.
func (d *debian) kills(node string) {
	d.t.Helper()
	d.killQEMU(node)
	began := time.Now()
	d.shell.ask("echo")
	d.say("the QEMU of %s died; the shell answered after %v", node, time.Since(began).Round(time.Millisecond))
}

// checkpoints reports the checkpoints of both hosts, by cause and by the service whose
// connection asked for them.
func (d *debian) checkpoints() {
	d.t.Helper()
	type cause struct {
		n, failed      int
		frozen, paused float64 // ms
	}
	causes, all := make(map[string]*cause), 0
	for _, node := range []string{"alpha", "beta"} {
		events, err := journal.Read(filepath.Join(d.Dir, "state"), "web1", node, 0)
		if err != nil {
			d.t.Fatal(err)
		}
		for _, e := range events {
			if e.Kind != journal.Checkpoint {
				continue
			}
			flow, _ := e.Fields["flow"].(string)
			guest, _, _ := strings.Cut(flow, ">")
			name := e.Cause + strings.TrimPrefix(guest, lt.Guest4)
			if causes[name] == nil {
				causes[name] = new(cause)
			}
			c := causes[name]
			if e.Fields["result"] != "committed" {
				c.failed++
				d.say("a checkpoint for %q failed: %v", e.Cause, e.Fields["result"])
				continue
			}
			var frozen, paused float64
			if sscan(fmt.Sprint(e.Fields["frozen_ms"], " ", e.Fields["pvm_pause_ms"]), &frozen, &paused) {
				c.n, c.frozen, c.paused = c.n+1, c.frozen+frozen, max(c.paused, paused)
				all++
			}
		}
	}
	minutes := time.Since(d.began).Minutes()
	d.say("%d checkpoints, %.1f a minute", all, float64(all)/minutes)
	for _, name := range slices.Sorted(maps.Keys(causes)) {
		c := causes[name]
		d.say("  %-40s %4d, %5.1f a minute, %d failed; output held for %.0f ms on average, the guest paused for %.0f ms at most",
			name, c.n, float64(c.n)/minutes, c.failed, c.frozen/max(1, float64(c.n)), c.paused)
	}
}

// fsck checks the file system in an image that no QEMU uses.
func (d *debian) fsck(node string) {
	d.t.Helper()
	raw := filepath.Join(d.Dir, "fsck.raw")
	defer os.Remove(raw)
	lt.Run(d.t, "qemu-img", "convert", "-O", "raw", filepath.Join(d.Dir, node+"0.qcow2"), raw)
	if out, err := exec.Command("e2fsck", "-fn", raw).CombinedOutput(); err != nil {
		d.t.Errorf("the disk of %s: %v\n%s", node, err, out)
	} else {
		d.say("the disk of %s: %s", node, strings.TrimSpace(string(out)))
	}
}

// TestDebian: a stock Debian serves SSH, HTTP, SQL and redis through checkpoints, either
// host's death and what follows. No client connects twice, balances sum up, and
// file systems are clean.
func TestDebian(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes half an hour, and packages that only make soak-deps installs
	}
	d := newDebian(t)
	client(d.pair, filepath.Join(d.dir, "pgbench"), "-i", "-q", "postgres")
	d.say("pgbench has its tables")
	d.all(func() {
		for range 3 {
			if out, err := d.order(d.primary, "checkpoint"); err != nil {
				t.Fatalf("checkpoint: %s, %v", out, err)
			}
			d.set()
		}
	})
	for _, dies := range []string{"primary", "secondary", "primary"} {
		old := d.primary
		if dies == "primary" {
			d.primary = other(d.primary)
			d.all(func() { d.kills(old) })
			d.rejoin(old)
		} else {
			d.all(func() { d.kills(other(old)) })
		}
		d.covered()
		d.say("the %s died, and the pair is whole again", dies)
		d.all(func() {})
	}
	d.web.end(t)
	want := fmt.Sprintf("%d|true", d.committed)
	if got := d.psql.ask(`select count(*) || '|' || (select array[sum(delta), sum(delta), sum(delta)] = array[
		(select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers)]
		from pgbench_history) from pgbench_history;`); got != want {
		t.Errorf("pgbench's history and balances: %q, want %q", got, want)
	}
	d.checkpoints()
	d.psql.in.Close()
	if _, err := fmt.Fprintln(d.shell.in, "systemctl poweroff"); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"alpha", "beta"} {
		if err := d.procs[node].Wait(); err != nil {
			t.Errorf("the daemon of %s ended with %v", node, err)
		}
		lt.Eventually(t, d.patience, func() (bool, string) { return d.qemu(node) == 0, "its QEMU is there" })
		d.fsck(node)
	}
}
