// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// debianHost is a bare Debian on a host: its systemd runs in namespaces of its own, but for
// the network's, which is the host's. The machine's QEMU is at /host, because the bare
// Debian has none.
type debianHost struct {
	t    *testing.T
	root string // as seen from outside
	init int    // its systemd
}

// boot is a shell script; its arguments are the bare root, a folder for what is changed of it, the pair's
// folder, which is one of the test's folders, and the daemon's environment file.
const boot = `set -eu
lower=$1 own=$2 dir=$3 environment=$4
mount --make-rprivate /
mkdir -p "$own/upper" "$own/work" "$own/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$own/upper,workdir=$own/work" "$own/root"
cd "$own/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,rw proc/sys/net
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir -p dev/net dev/shm host etc/lockstep old ".${dir%/*}" etc/tmpfiles.d
# Nothing is to be mounted over the test's folders, or to clear them.
ln -s /dev/null etc/tmpfiles.d/tmp.conf
ln -s /dev/null etc/systemd/system/tmp.mount
ln -s /dev/null etc/systemd/system/systemd-modules-load.service # the kernel is the machine's
for d in null zero full random urandom tty net/tun; do
	touch "dev/$d"
	mount --bind "/dev/$d" "dev/$d"
done
mount --bind /usr host
mount --bind "${dir%/*}" ".${dir%/*}"
mount --bind "$dir" etc/lockstep
mount -t bpf bpf etc/lockstep/bpf # each host's own
mount --bind "$environment" etc/lockstep/pair.env
for name in qemu-system-x86_64 qemu-img; do
	more=
	[ $name = qemu-img ] || more='-L /host/share/qemu -L /host/share/seabios -L /host/lib/ipxe/qemu'
	printf '#!/bin/sh\nexport QEMU_MODULE_DIR=/host/lib/x86_64-linux-gnu/qemu\nexec /host/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --argv0 %s --library-path /host/lib/x86_64-linux-gnu /host/bin/%s %s "$@"\n' $name $name "$more" >usr/local/bin/$name
	chmod 755 usr/local/bin/$name
done
export container=test
pivot_root . old
exec chroot . sh -c 'umount -l /old; exec /lib/systemd/systemd --system --unit=multi-user.target --show-status=no'
`

// bootDebian boots a suite's bare root on a node's host.
func (p *livingPair) bootDebian(suite, node string) *debianHost {
	p.t.Helper()
	lower := filepath.Join(filepath.Dir(qemutest.Dir(p.t)), "roots", suite, "root")
	if _, err := os.Stat(filepath.Join(filepath.Dir(lower), "ready")); err != nil {
		lt.Missing(p.t, "no bare Debian: run make soak-deps (%v)", err)
	}
	own, environment := p.t.TempDir(), filepath.Join(p.t.TempDir(), "pair.env")
	if err := os.WriteFile(environment, fmt.Appendf(nil, "NODE=%s\n%s\n", node, p.preload), 0o600); err != nil {
		p.t.Fatal(err)
	}
	// A group of its own, which is the root of the hierarchy that its systemd sees.
	groups := p.t.TempDir()
	lt.Run(p.t, "mount", "-t", "cgroup2", "cgroup2", groups)
	group := filepath.Join(groups, filepath.Base(p.host(node)))
	if err := os.Mkdir(group, 0o700); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		lt.Eventually(p.t, 10*time.Second, func() (bool, string) { // what was in it has to be gone
			out, err := exec.Command("find", group, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";").CombinedOutput()
			return err == nil && len(out) == 0, string(out)
		})
		lt.Run(p.t, "umount", groups)
	})
	var log strings.Builder
	cmd := lt.Command(p.host(node), "sh", "-c", `echo $$ >"$1/cgroup.procs"; shift; exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child sh "$@"`, "sh",
		group, "-c", boot, "sh", lower, own, p.Dir, environment)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	h := &debianHost{t: p.t, root: filepath.Join(own, "root")}
	p.t.Cleanup(func() {
		if p.t.Failed() {
			out, _ := h.run("journalctl", "--no-pager", "-o", "cat")
			p.t.Logf("journal of %s:\n%s", node, out)
		}
		_ = cmd.Process.Kill() // and with it all that runs there
		_ = cmd.Wait()
		lt.Eventually(p.t, 10*time.Second, func() (bool, string) {
			_, err := os.Stat(fmt.Sprintf("/proc/%d", h.init))
			return err != nil, "systemd of " + node + " does not end"
		})
	})
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if _, scan := fmt.Sscan(string(b), &h.init); err != nil || scan != nil {
			return false, fmt.Sprintf("%v, %v: %s", err, scan, log.String())
		}
		out, _ := h.run("systemctl", "is-system-running")
		failed, _ := h.run("systemctl", "--failed", "--no-legend", "--plain")
		return out == "running\n", out + failed + log.String()
	})
	return h
}

// run runs a command there.
func (h *debianHost) run(args ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"--target", fmt.Sprint(h.init), "--all", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, args...)...).CombinedOutput()
	return string(out), err
}

func (h *debianHost) mustRun(args ...string) string {
	h.t.Helper()
	out, err := h.run(args...)
	if err != nil {
		h.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// refuses removes the package, which has to fail because of why.
func (h *debianHost) refuses(why string) {
	h.t.Helper()
	out, err := h.run("dpkg", "--remove", "lockstep")
	if err == nil || !strings.Contains(out, "lockstep is not removed, because "+why) {
		h.t.Errorf("the removal ended with %v, %s", err, out)
	}
	if out := h.mustRun("dpkg-query", "-W", "-f", "${db:Status-Status}", "lockstep"); out != "installed" {
		h.t.Errorf("after a removal that was refused the package is %s", out)
	}
}

// TestPackages: on two hosts with nothing but Debian's essential packages and systemd, the
// package is installed, its unit runs a pair of real guests, and a client is served while both
// daemons are upgraded (R23). It is not removed while a guest depends on it; removed as
// docs/PACKAGES.md says, it leaves a guest that goes on alone, and nobody beside it.
func TestPackages(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes, and what only make soak-deps installs
	}
	debs := t.TempDir()
	version := func(v string) string {
		out, err := exec.Command("../../../packaging/build", "deb", debs, v).CombinedOutput()
		if err != nil {
			t.Fatalf("build the package: %v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	before, after := version("v0.0.1"), version("v0.0.2")
	for _, suite := range []string{"bookworm", "trixie"} {
		t.Run(suite, func(t *testing.T) {
			p := newLivingPair(t, 1, "heartbeat: {restart: 20s}")
			for _, deb := range []string{before, after} {
				lt.Run(t, "cp", deb, p.Dir)
			}
			// The roots see the test's folders, and not the one with the guest's kernel.
			kernel := guestimage.Kernel(qemutest.Dir(t))
			lt.Run(t, "cp", kernel, p.Dir)
			b, err := os.ReadFile(p.config)
			if err == nil {
				err = os.WriteFile(p.config, []byte(strings.Replace(string(b), kernel, "vmlinuz", 1)), 0o600)
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(p.Dir, "pair.env"), nil, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			lifeOfPackage(t, p, suite, "/etc/lockstep/"+filepath.Base(before), "/etc/lockstep/"+filepath.Base(after))
		})
	}
}

func lifeOfPackage(t *testing.T, p *livingPair, suite, before, after string) {
	const unit, config = "lockstep@pair.service", "/etc/lockstep/pair.yaml"
	hosts := make(map[string]*debianHost)
	both := []string{"beta", "alpha"}
	for _, node := range both {
		h := p.bootDebian(suite, node)
		hosts[node] = h
		h.mustRun("dpkg", "--install", before)
		if out, err := h.run("systemd-analyze", "verify", "--man=no", unit); err != nil || out != "" {
			t.Errorf("%s: %v, %s", unit, err, out)
		}
		h.mustRun("systemd-analyze", "security", "--threshold=65", unit)
		if node == "alpha" {
			h.mustRun("lockstep", "start", "--here", "-c", config, "--node", node)
		}
		h.mustRun("systemctl", "enable", "--now", "--no-block", unit)
	}
	ends := func(node string) { // its QEMU
		hosts[node].mustRun("sh", "-c", "pid=$(cat /etc/lockstep/run/web1-"+node+".pid); kill -9 $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done") // until its tap is free
	}
	p.covered()
	p.booted()
	p.lockstepped()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	load := p.openSession()
	answered := func() {
		t.Helper()
		n := load.Answers.Load()
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return load.Answers.Load() > n+100, "the session does not go on" })
	}
	answered()

	daemon := func(node string) string {
		return hosts[node].mustRun("systemctl", "show", "--property=MainPID", unit)
	}
	for _, node := range both {
		pid := daemon(node)
		out := hosts[node].mustRun("dpkg", "--install", after)
		if !strings.Contains(out, "This one can take over from it:\n    systemctl restart lockstep@pair\n") {
			t.Errorf("the upgrade says %s", out)
		}
		answered()
		if now := daemon(node); now != pid {
			t.Errorf("the upgrade restarted the daemon: %s, %s", pid, now)
		}
	}
	began := p.status("alpha")
	for _, node := range both {
		hosts[node].mustRun("systemctl", "restart", unit)
		p.covered()
		answered()
		if out := hosts[node].mustRun("sh", "-c", "readlink /proc/$(systemctl show --property=MainPID --value "+unit+")/exe"); out != "/usr/bin/lockstep\n" {
			t.Errorf("the daemon that was restarted runs %s", out)
		}
	}
	if s := p.status("alpha"); s.ArbiterTerm != p.record {
		t.Errorf("the arbiter's term was %d and is %d: a host transmitted alone", p.record, s.ArbiterTerm)
	} else {
		t.Logf("upgraded; checkpoints %d, before %d; the longest wait for an answer %v", s.CheckpointsDone, began.CheckpointsDone, time.Duration(load.Longest.Load()))
	}

	for _, node := range both {
		hosts[node].refuses("its daemon runs, as process ")
	}
	answered()
	beta := hosts["beta"]
	beta.mustRun("systemctl", "disable", "--now", unit)
	beta.refuses("its programs are in the kernel, pinned in ")
	ends("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	answered()
	beta.mustRun("lockstep", "unload", "-c", config, "--node", "beta")
	beta.mustRun("dpkg", "--purge", "lockstep")
	if left, err := beta.run("sh", "-c", "ls -d /usr/bin/lockstep /usr/share/lockstep /usr/share/doc/lockstep /usr/lib/systemd/system/lockstep* /etc/systemd/system/*.wants/lockstep* 2>/dev/null"); err == nil || left != "" {
		t.Errorf("left behind: %s", left)
	}
	answered()
	if turns := watch.Turns(); len(turns) != 1 || turns[0].Port != "portP" {
		t.Errorf("who transmitted: %v", turns)
	}
	load.end(t)

	alpha := hosts["alpha"]
	alpha.mustRun("systemctl", "disable", "--now", unit)
	alpha.refuses("its programs are in the kernel, pinned in ")
	ends("alpha")
	alpha.mustRun("lockstep", "unload", "-c", config, "--node", "alpha")
	alpha.mustRun("dpkg", "--remove", "lockstep")
}
