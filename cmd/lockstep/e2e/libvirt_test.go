// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// libvirtPair is a pair whose QEMUs are libvirt domains, made as docs/LIBVIRT.md says. Each host has a libvirtd of its own.
type libvirtPair struct {
	*livingPair
	libvirtd map[string]*exec.Cmd
	script   string // the document's, which starts a domain that follows
}

// runLibvirtd is a shell script; its argument is the folder that takes the place of libvirtd's own ones.
const runLibvirtd = `set -eu
mount --make-rprivate /
for d in /etc/libvirt /var/lib /var/log /var/cache /run; do
	mkdir -p "$1$d"
	mount --bind "$1$d" "$d"
done
for f in passwd group; do # libvirtd does not start without this user, which a larger package makes
	{ cat "/etc/$f"; echo "libvirt-qemu:x:64055:$([ $f = group ] || echo 64055::/nonexistent:/usr/sbin/nologin)"; } >"$1/$f"
	mount --bind "$1/$f" "/etc/$f"
done
exec libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirtd.pid`

// newLibvirtPair has a disk, and domains that nobody has started yet.
func newLibvirtPair(t *testing.T) *libvirtPair {
	t.Helper()
	for _, program := range []string{"libvirtd", "virsh"} {
		if _, err := exec.LookPath(program); err != nil {
			lt.Missing(t, "%v: make soak-deps installs it", err)
		}
	}
	doc, err := os.ReadFile("../../../docs/LIBVIRT.md")
	if err != nil {
		t.Fatal(err)
	}
	p := &libvirtPair{livingPair: newLivingPair(t, 1, "migration: {port: 9998}"), libvirtd: make(map[string]*exec.Cmd)}
	block := func(kind string, n int) string {
		parts := strings.Split(string(doc), "\n```"+kind+"\n")
		if len(parts) <= n {
			t.Fatalf("docs/LIBVIRT.md has no block %d of %s", n, kind)
		}
		text, _, _ := strings.Cut(parts[n], "```")
		return text
	}
	p.script = block("sh", 1)
	serves := block("xml", 1)
	var follows strings.Builder
	for line := range strings.Lines(serves) {
		if strings.Contains(line, `"driver":"quorum"`) {
			line = block("xml", 2)
		}
		follows.WriteString(line)
	}
	for _, node := range []string{"alpha", "beta"} {
		for name, xml := range map[string]string{"web1.xml": serves, "web1-follow.xml": follows.String()} {
			if err := os.WriteFile(filepath.Join(p.Dir, node+"-"+name), []byte(p.as(node, xml)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.endGuest = p.destroy
	b, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	config := string(b)
	for _, node := range []string{"alpha", "beta"} {
		at := "  " + node + ":"
		i := strings.Index(config, at)
		j := i + strings.Index(config[i:], "]}\n")
		config = config[:j] + "], qmp: '" + p.monitor(node) + "'" + config[j+1:]
	}
	if err := os.WriteFile(p.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"alpha", "beta"} {
		for name, text := range map[string]string{
			"libvirtd.conf": "auth_unix_rw = \"none\"\n",
			// Without systemd there are neither cgroups to use nor virtlogd.
			"qemu.conf": "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\nstdio_handler = \"file\"\nremember_owner = 0\n",
		} {
			path := filepath.Join(p.folder(node), "etc/libvirt", name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { p.endLibvirtd(node) })
		p.startLibvirtd(node)
	}
	return p
}

// folder has what libvirtd of a node keeps.
func (p *libvirtPair) folder(node string) string  { return filepath.Join(p.Dir, "lv-"+node) }
func (p *libvirtPair) monitor(node string) string { return filepath.Join(p.Dir, node+".lsqmp") }

func (p *libvirtPair) startLibvirtd(node string) {
	p.t.Helper()
	cmd := exec.Command("nsenter", "--net=/run/netns/"+p.host(node), "unshare", "--mount", "sh", "-c", runLibvirtd, "libvirtd", p.folder(node))
	log, err := os.OpenFile(filepath.Join(p.Dir, node+".libvirtd"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.libvirtd[node] = cmd
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		out, err := p.virsh(node, "list", "--all")
		log, _ := os.ReadFile(filepath.Join(p.Dir, node+".libvirtd"))
		return err == nil, out + string(log)
	})
}

// endLibvirtd ends a host's libvirtd, and leaves its domains.
func (p *libvirtPair) endLibvirtd(node string) {
	cmd := p.libvirtd[node]
	cmd.Process.Kill()
	cmd.Wait()
}

func (p *libvirtPair) uri(node string) string {
	return "qemu:///system?socket=" + filepath.Join(p.folder(node), "run/libvirt/libvirt-sock")
}

func (p *libvirtPair) virsh(node string, args ...string) (string, error) {
	out, err := exec.Command("timeout", append([]string{"20", "virsh", "-c", p.uri(node)}, args...)...).CombinedOutput()
	return string(out), err
}

// pid is the process of a node's QEMU; 0: there is none.
func (p *libvirtPair) pid(node string) int {
	b, err := os.ReadFile(filepath.Join(p.folder(node), "run/libvirt/qemu/web1.pid"))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(line, []byte(p.Dir)) {
		return 0
	}
	return pid
}

func (p *libvirtPair) destroy(node string) {
	if pid := p.pid(node); pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		lt.Eventually(p.t, 20*time.Second, func() (bool, string) { return p.pid(node) == 0, "QEMU is there" })
	}
}

// as is a text of the document's as it is for a node of this test.
func (p *libvirtPair) as(node, text string) string {
	p.t.Helper()
	conf, err := os.ReadFile(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	value := func(key string) string {
		_, rest, _ := strings.Cut(string(conf), "\n  "+key+": ")
		line, _, _ := strings.Cut(rest, "\n")
		return strings.Trim(line, `"`)
	}
	args := fmt.Sprintf("<qemu:env name='LD_PRELOAD' value='%s'/>", strings.TrimPrefix(p.preload, preloadName+"="))
	// libvirt rounds to MiB, with which TCG loses dirty pages (guestimage.Memory).
	size := fmt.Sprintf("%dK", qemutest.Memory>>10)
	for _, arg := range []string{"-m", size, "-object", "memory-backend-ram,id=odd,size=" + size, "-machine", "memory-backend=odd"} {
		args += fmt.Sprintf("<qemu:arg value='%s'/>", arg)
	}
	return strings.NewReplacer(
		"domain type='kvm'", "domain type='qemu'",
		"4194304", "131072",
		"<vcpu>2", "<vcpu>1",
		"<cpu mode='host-passthrough'/>", "<cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>",
		"hvm</type>", fmt.Sprintf("hvm</type><kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline>", value("kernel"), value("initrd"), value("append")),
		"52:54:00:39:72:73", lt.GuestMAC,
		"web1-tap", map[string]string{"alpha": "tapP", "beta": "tapS"}[node],
		"<memballoon", fmt.Sprintf("<serial type='file'><source path='%s'/></serial><memballoon", filepath.Join(p.Dir, node+".serial")),
		"/run/lockstep/web1.qmp", p.monitor(node),
		"/vms/web1.qcow2", filepath.Join(p.Dir, node+"0.qcow2"),
		"/vms/", filepath.Join(p.Dir, node+"-"),
		"/etc/lockstep/", filepath.Join(p.Dir, node+"-"),
		"SIZE", "67108864",
		"<qemu:commandline>", "<qemu:commandline>"+args,
		"lockstep status CONFIG", fmt.Sprintf("%s status -c %s --node %s", lockstepBinary(p.t, 0), p.config, node),
	).Replace(text)
}

// create starts a node's domain as the one that serves.
func (p *libvirtPair) create(node string) {
	p.t.Helper()
	p.sh(node, p.as(node, "virsh create /etc/lockstep/web1.xml --paused"))
}

// follow starts a node's domain as one that follows, once its daemon waits for that.
func (p *libvirtPair) follow(node string) {
	p.t.Helper()
	p.await(node, func(s *api.Status) bool { return s.Role == "secondary" && s.State == "start" })
	p.sh(node, p.as(node, p.script))
}

func (p *libvirtPair) sh(node, script string) {
	p.t.Helper()
	cmd := lt.Command(p.host(node), "sh", "-c", script)
	cmd.Env = append(os.Environ(), "LIBVIRT_DEFAULT_URI="+p.uri(node))
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(p.folder(node), "var/log/libvirt/qemu/web1.log"))
		p.t.Fatalf("%s: %v\n%s\n%s", script, err, out, log)
	}
}

// domstate waits until libvirt has a node's domain in a state; "": there is none.
func (p *libvirtPair) domstate(node, want string) {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		out, err := p.virsh(node, "domstate", "web1")
		return err == nil && strings.TrimSpace(out) == want || want == "" && (strings.Contains(out, "Domain not found") || strings.Contains(out, "failed to get domain")), out
	})
}

// TestLibvirt: both QEMUs are libvirt domains, made and started as docs/LIBVIRT.md says. A client's session lasts while each
// libvirtd is killed and started again, with a checkpoint in between, while the primary's QEMU dies, through a planned failover
// back and a virsh destroy; and each time the other host follows again.
func TestLibvirt(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes, and what only make soak-deps installs
	}
	p := newLibvirtPair(t)
	u := &unitPair{p.livingPair}
	u.ordered("alpha", "start", "--here")
	u.auto("alpha", "beta")
	for node, tap := range map[string]string{"alpha": "tapP", "beta": "tapS"} {
		lt.Eventually(t, time.Minute, func() (bool, string) {
			out, err := lt.Command(p.host(node), "ip", "link", "show", tap).CombinedOutput()
			return err == nil, string(out)
		})
	}
	p.create("alpha")
	p.follow("beta")
	p.covered()
	p.booted()
	p.lockstepped()
	c := p.open()

	for _, node := range []string{"alpha", "beta"} {
		p.endLibvirtd(node)
		c.ask(5)
		u.ordered("alpha", "checkpoint")
		c.ask(5)
		p.startLibvirtd(node)
		p.domstate(node, "running")
		u.ordered("alpha", "checkpoint")
		c.ask(5)
	}
	p.covered()
	if s := p.status("alpha"); s == nil || s.ArbiterTerm != p.record {
		t.Errorf("libvirtd's restarts cost the pair: %+v", s)
	}

	if err := syscall.Kill(p.pid("alpha"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.ask(5)
	u.isPrimary("beta")
	p.domstate("alpha", "")
	p.domstate("beta", "running")
	p.follow("alpha")
	p.covered()
	c.ask(5)

	// The former primary's domain stays, and waits to be replaced; nothing is copied to it.
	u.ordered("alpha", "failover")
	c.ask(5)
	u.isPrimary("alpha")
	p.await("beta", func(s *api.Status) bool { return strings.Contains(s.Peer.Error, "it waits for no primary") })
	p.domstate("beta", "paused")
	if s := p.status("alpha"); s == nil || s.Replication != nil && s.Replication.Failed > 0 {
		t.Errorf("alpha tried to replicate to the former primary: %+v", s)
	}
	p.follow("beta")
	p.covered()
	c.ask(5)
	p.domstate("alpha", "running")
	p.domstate("beta", "running")

	// Destroyed by libvirt, a primary's QEMU is as dead as one that is killed.
	p.sh("alpha", "virsh destroy web1")
	c.ask(5)
	u.isPrimary("beta")
}
