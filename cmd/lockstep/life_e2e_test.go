// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"lockstep/control"
	"lockstep/control/qemu/qemutest"
	lt "lockstep/loader/loadertest"
)

// livingPair is a pair of real guests that lockstep starts, on hosts that the client
// reaches over a switch.
type livingPair struct {
	*pair
	preload string
}

// newLivingPair makes hosts, images and the config, and starts nothing.
func newLivingPair(t *testing.T, disks int, extra string) *livingPair {
	t.Helper()
	lt.NeedRoot(t)
	p := &livingPair{preload: qemutest.Preload(t)}
	w := lt.NewHosts(t)
	p.pair = &pair{World: w, t: t, config: filepath.Join(w.Dir, "pair.yaml"), own: make(map[string]string), acts: "lockstep"}
	p.procs = make(map[string]*exec.Cmd)
	kernel, initrd := qemutest.Image(t, qemutest.Guest{Service: p.self(), Env: []string{actAs + "=guest pvm"}})
	var images []string
	for i := range disks {
		images = append(images, fmt.Sprintf("{id: colo-disk%d, image: '{node}%d.qcow2', overlay_dir: run}", i, i))
		for _, node := range []string{"alpha", "beta"} {
			qemutest.Disk(t, filepath.Join(w.Dir, fmt.Sprintf("%s%d.qcow2", node, i)), 64<<20, true)
		}
	}
	if !strings.Contains(extra, "arbiter:") {
		extra += fmt.Sprintf("\narbiter: {type: file, path: %s}", filepath.Join(w.Dir, "arbiter"))
		if err := os.Mkdir(filepath.Join(w.Dir, "arbiter"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	yaml := fmt.Sprintf(`vm: web1
nodes:
  alpha: {control: "192.0.2.1:7700", nics: [{tap: tapP, peer: {device: peerP}}]}
  beta:  {control: "192.0.2.2:7700", nics: [{tap: tapS, peer: {device: peerS}}]}
pin_dir: bpf/lockstep
run_dir: run
state_dir: state
tls: {ca: certs/ca.pem, cert: 'certs/{node}.pem', key: 'certs/{node}.key'}
migration: {unix: migration.sock}
qemu:
  accel: tcg
  cpu: qemu64
  memory: 128M
  smp: 1
  kernel: %s
  initrd: %s
  append: %q
  macs: ["%s"]
  disks: [%s]
  extra: [-m, %dK, -serial, "file:%s/{node}.serial"]
%s
`, kernel, initrd, qemutest.Append([]string{lt.Guest4 + "/24," + lt.Guest6 + "/64"}), lt.GuestMAC, strings.Join(images, ", "), qemutest.Memory>>10, w.Dir, extra)
	if err := os.WriteFile(p.config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := p.lockstep("keys", "-c", p.config, "-d", filepath.Join(w.Dir, "certs")).CombinedOutput(); err != nil {
		t.Fatalf("keys: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		for _, node := range []string{"alpha", "beta"} {
			p.killQEMU(node)
		}
		if t.Failed() {
			for _, node := range []string{"alpha", "beta"} {
				serial, _ := os.ReadFile(filepath.Join(w.Dir, node+".serial"))
				qemu, _ := os.ReadFile(filepath.Join(w.Dir, "run/web1-"+node+".log"))
				t.Logf("QEMU on %s: %s\nconsole: %s", node, qemu, serial)
			}
		}
	})
	return p
}

// host is a node's namespace.
func (p *livingPair) host(node string) string {
	return map[string]string{"alpha": p.HostP, "beta": p.HostS}[node]
}

// run starts a node's daemon.
func (p *livingPair) run(node, role string) {
	p.t.Helper()
	p.t.Setenv(preloadName, strings.TrimPrefix(p.preload, preloadName+"="))
	p.daemon(node, p.host(node), role)
}

const preloadName = "LD_PRELOAD"

// killQEMU ends a node's QEMU at once; nothing, when there is none.
func (p *livingPair) killQEMU(node string) {
	b, err := os.ReadFile(filepath.Join(p.Dir, "run/web1-"+node+".pid"))
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(line), p.Dir) {
		return
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	lt.Eventually(p.t, 10*time.Second, func() (bool, string) {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil, "QEMU is there"
	})
}

// covered waits until the pair replicates and either may die.
func (p *livingPair) covered() {
	p.t.Helper()
	for _, node := range []string{"alpha", "beta"} {
		p.await(node, func(s *control.Status) bool { return s.State == "replicating" && s.Covered })
	}
}

// booted waits until the guest's service answers.
func (p *livingPair) booted() {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		c, err := p.dial(lt.Guest4, portEcho, "")
		if err != nil {
			return false, err.Error()
		}
		defer c.Close()
		err = echo(c, 0)
		return err == nil, fmt.Sprint(err)
	})
}

// TestPairOfGuests: two daemons bring a pair up; the secondary's QEMU dies, and the
// primary goes on alone; a new secondary comes.
func TestPairOfGuests(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.run("beta", "secondary")
	p.run("alpha", "primary")
	p.covered()
	p.booted()
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	p.killQEMU("beta")
	if err := echo(c, 1); err != nil {
		t.Fatal(err)
	}
	p.covered()
	if err := echo(c, 2); err != nil {
		t.Fatal(err)
	}
}

// TestTakeover: the primary's QEMU dies; the secondary speaks, and goes on as the
// primary; the old primary's host becomes the secondary.
func TestTakeover(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.run("beta", "secondary")
	p.run("alpha", "primary")
	p.covered()
	p.booted()
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	p.killQEMU("alpha")
	if err := echo(c, 1); err != nil {
		t.Fatal(err)
	}
	p.await("beta", func(s *control.Status) bool { return s.Role == "primary" && s.State == "solo" })
	if err := echo(c, 2); err != nil {
		t.Fatal(err)
	}
	p.procs["alpha"].Wait()
	p.run("alpha", "secondary")
	p.covered()
	if err := echo(c, 3); err != nil {
		t.Fatal(err)
	}
	p.killQEMU("beta")
	if err := echo(c, 4); err != nil {
		t.Fatal(err)
	}
}
