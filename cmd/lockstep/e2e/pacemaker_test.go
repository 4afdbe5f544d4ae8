// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// cluster is a pair whose hosts are a Pacemaker cluster, which starts the daemons and fences through a BMC that the
// test plays.
type cluster struct {
	*livingPair
	files string      // of the cluster, below the pair's folder
	bmc   chan string // hosts that were fenced

	mu    sync.Mutex // of hosts, which the BMC looks up
	hosts map[string]*clusterHost
}

// clusterHost is this machine's Debian once more, with processes, folders for what changes and a name of its own.
type clusterHost struct {
	debianHost
	cmd  *exec.Cmd
	kill sync.Once
}

// bootCluster is a shell script; its arguments are a folder for what is changed, the pair's folder, which is one
// of the test's folders, and the host's name.
const bootCluster = `set -eu
own=$1 dir=$2 name=$3
mount --make-rprivate /
mkdir -p "$own/upper" "$own/work" "$own/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$own/upper,workdir=$own/work" "$own/root"
cd "$own/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir -p dev/net dev/shm old ".${dir%/*}" etc/corosync usr/lib/ocf/resource.d/lockstep usr/lib/lockstep var/log/pacemaker
chmod 1777 dev/shm
ln -s /proc/self/fd dev/fd
for d in null zero full random urandom tty net/tun; do
	touch "dev/$d"
	mount --bind "/dev/$d" "dev/$d"
done
mount --bind "${dir%/*}" ".${dir%/*}"
mount -t bpf bpf ".$dir/bpf" # each host's own
hostname "$name"
find var/lib/pacemaker var/lib/corosync -type f -delete
cp "$dir/cluster/corosync.conf" etc/corosync/
cp "$dir/cluster/fence_played" usr/sbin/
cp "$dir/cluster/agent" usr/lib/ocf/resource.d/lockstep/lockstep
cp "$dir/cluster/pacemaker-arbiter" usr/lib/lockstep/
cp "$dir/cluster/lockstep" usr/bin/
pivot_root . old
exec chroot . sh -c 'umount -l /old; corosync && { pacemakerd -f & wait; }' # which reaps what ends, as an init does
`

const corosyncConf = `# SPDX-License-Identifier: Apache-2.0
totem {
  version: 2
  cluster_name: web1
  transport: udpu
  token: 1000
}
quorum {
  provider: corosync_votequorum
  two_node: 1
}
nodelist {
  node {
    name: alpha
    nodeid: 1
    ring0_addr: 192.0.2.1
  }
  node {
    name: beta
    nodeid: 2
    ring0_addr: 192.0.2.2
  }
}
logging {
  to_logfile: yes
  logfile: /var/log/corosync.log
  to_syslog: no
}
`

// fencePlayed is a fence agent that asks the test, which plays the BMC of both hosts.
const fencePlayed = `#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
while read -r line; do
	case $line in
	action=*) action=${line#*=} ;;
	port=* | plug=*) port=${line#*=} ;;
	esac
done
[ "${1:-}" != -o ] || action=$2
case $action in
metadata)
	cat <<XML
<?xml version="1.0"?>
<resource-agent name="fence_played" shortdesc="a BMC that a test plays">
<longdesc>a BMC that a test plays</longdesc>
<parameters>
<parameter name="action" required="1"><getopt mixed="-o"/><content type="string" default="reboot"/><shortdesc lang="en">action</shortdesc></parameter>
<parameter name="port"><getopt mixed="-n"/><content type="string"/><shortdesc lang="en">host</shortdesc></parameter>
</parameters>
<actions><action name="on"/><action name="off"/><action name="reboot"/><action name="status"/><action name="monitor"/><action name="metadata"/></actions>
</resource-agent>
XML
	;;
monitor | status | on) ;;
off | reboot) exec curl --silent --fail --max-time 20 --unix-socket SOCKET "http://bmc/$port" ;;
*) exit 1 ;;
esac
`

// newCluster makes the hosts, the pair's config with what is given of it, and the cluster's, and boots both hosts.
func newCluster(t *testing.T, extra string) *cluster {
	t.Helper()
	for _, tool := range []string{"pacemakerd", "corosync", "crm_mon", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			lt.Missing(t, "%v: make soak-deps installs it", err)
		}
	}
	if _, err := os.Stat("/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs"); err != nil {
		lt.Missing(t, "no resource-agents: make soak-deps installs them (%v)", err)
	}
	c := &cluster{livingPair: newLivingPair(t, 1, extra), hosts: make(map[string]*clusterHost), bmc: make(chan string, 100)}
	c.files = filepath.Join(c.Dir, "cluster")
	if err := os.Mkdir(c.files, 0o755); err != nil {
		t.Fatal(err)
	}
	bmc := filepath.Join(c.files, "bmc")
	for name, text := range map[string]string{"corosync.conf": corosyncConf, "fence_played": strings.Replace(fencePlayed, "SOCKET", bmc, 1)} {
		if err := os.WriteFile(filepath.Join(c.files, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lt.Run(t, "cp", "../../../packaging/ocf/lockstep", filepath.Join(c.files, "agent"))
	lt.Run(t, "cp", "../../../packaging/ocf/pacemaker-arbiter", c.files)
	lt.Run(t, "cp", lockstepBinary(t, 0), filepath.Join(c.files, "lockstep"))
	// The hosts see the test's folders, and perhaps not the one with the guest's kernel.
	kernel := guestimage.Kernel(qemutest.Dir(t))
	lt.Run(t, "cp", kernel, c.Dir)
	b, err := os.ReadFile(c.config)
	if err == nil {
		err = os.WriteFile(c.config, []byte(strings.Replace(string(b), kernel, "vmlinuz", 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", bmc)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		node := strings.TrimPrefix(r.URL.Path, "/")
		h := c.up(node)
		if h == nil {
			http.NotFound(w, r)
			return
		}
		c.bmc <- node
		if err := h.off(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})}
	go func() { _ = server.Serve(l) }() // until it is closed
	t.Cleanup(func() { server.Close() })
	c.boot("alpha", "beta")
	return c
}

// up is the host as it was booted last.
func (c *cluster) up(node string) *clusterHost {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hosts[node]
}

// boot switches hosts on, and waits until they are a cluster.
func (c *cluster) boot(nodes ...string) {
	c.t.Helper()
	for _, node := range nodes {
		own := c.t.TempDir()
		cmd := lt.Command(c.host(node), "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "sh", "-c", bootCluster, "sh", own, c.Dir, node)
		cmd.Env = append(os.Environ(), c.preload)
		var log strings.Builder
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			c.t.Fatal(err)
		}
		h := &clusterHost{debianHost: debianHost{t: c.t, root: filepath.Join(own, "root")}, cmd: cmd}
		lt.Eventually(c.t, 10*time.Second, func() (bool, string) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
			_, scan := fmt.Sscan(string(b), &h.init)
			return err == nil && scan == nil, fmt.Sprintf("%v, %v: %s", err, scan, log.String())
		})
		c.t.Cleanup(func() {
			if c.t.Failed() {
				for _, file := range []string{"/var/log/pacemaker/pacemaker.log", "/var/log/lockstep-web1.log"} {
					out, _ := h.run("grep", "-v", "-E", "(info|debug): ", file)
					c.t.Logf("%s of %s:\n%s", file, node, out)
				}
			}
			if err := h.off(); err != nil {
				c.t.Error(err)
			}
		})
		c.mu.Lock()
		c.hosts[node] = h
		c.mu.Unlock()
	}
	for _, node := range nodes {
		c.shows(node, "partition with quorum", "Online: [ alpha beta ]")
	}
}

// off takes the host's power away.
func (h *clusterHost) off() error {
	h.kill.Do(func() {
		_ = h.cmd.Process.Kill() // and with it all that runs there
		_ = h.cmd.Wait()
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", h.init)); err != nil {
			return nil
		}
		<-tick.C
	}
	return fmt.Errorf("process %d, a host's first, does not end", h.init)
}

// shows waits until Pacemaker on a node says all of this about the cluster.
func (c *cluster) shows(node string, what ...string) {
	c.t.Helper()
	var out string
	lt.Eventually(c.t, 2*time.Minute, func() (bool, string) {
		out, _ = c.up(node).run("crm_mon", "-1", "-A")
		for _, w := range what {
			if !strings.Contains(out, w) {
				return false, fmt.Sprintf("no %q in:\n%s", w, out)
			}
		}
		return true, ""
	})
	c.t.Logf("%s# crm_mon -1 -A\n%s", node, out)
	if strings.Contains(out, "Failed ") && !strings.Contains(strings.Join(what, ""), "Failed ") {
		c.t.Errorf("Pacemaker on %s shows failures", node)
	}
}

// fencings are the hosts that were fenced since it was asked last.
func (c *cluster) fencings() []string {
	var all []string
	for {
		select {
		case host := <-c.bmc:
			all = append(all, host)
		default:
			return all
		}
	}
}

// begin has Pacemaker start the pair, with the example that is installed.
func (c *cluster) begin() {
	c.t.Helper()
	alpha := c.up("alpha")
	// Of two hosts that shoot each other beta is faster.
	alpha.mustRun("cibadmin", "--create", "--scope", "resources", "--xml-text", `<primitive id="fencing" class="stonith" type="fence_played"><instance_attributes id="fencing-parameters"><nvpair id="fencing-hosts" name="pcmk_host_list" value="alpha beta"/><nvpair id="fencing-delay" name="pcmk_delay_base" value="alpha:0s;beta:8s"/></instance_attributes></primitive>`)
	alpha.mustRun("lockstep", "start", "--here", "-c", c.config, "--node", "alpha")
	example, err := os.ReadFile("../../../packaging/examples/web1-pacemaker.xml")
	if err == nil {
		err = os.WriteFile(filepath.Join(c.files, "web1.xml"), []byte(strings.Replace(string(example), "/etc/lockstep/web1.yaml", c.config, 1)), 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	alpha.mustRun("cibadmin", "--create", "--scope", "resources", "--xml-file", filepath.Join(c.files, "web1.xml"))
	c.covered()
	c.booted()
	c.lockstepped()
	c.shows("beta", "Promoted: [ alpha ]", "Unpromoted: [ beta ]")
	if f := c.fencings(); len(f) != 0 {
		c.t.Errorf("fenced at the first start: %v", f)
	}
}

// TestPacemaker: two hosts are a Pacemaker cluster, which starts the pair and is its arbiter. Its promoted instance
// follows lockstep's primary: when a host is lost, when it comes back, when a host is put into standby, and when the hosts
// lose each other; and the client's session lasts. A host is fenced where it has to be, and only there.
func TestPacemaker(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes, and what only make soak-deps installs
	}
	c := newCluster(t, "arbiter: {type: exec, command: [/usr/lib/lockstep/pacemaker-arbiter, web1]}")
	c.begin()
	alpha, beta := c.up("alpha"), c.up("beta")
	watch := lt.WatchTransmitters(t, c.Switch, "portP", "portS")
	s := c.open()

	// The primary's host is lost.
	began := time.Now()
	if err := alpha.off(); err != nil {
		t.Fatal(err)
	}
	s.ask(1)
	t.Logf("the first answer took %v", time.Since(began))
	s.ask(20)
	c.shows("beta", "Promoted: [ beta ]", "OFFLINE: [ alpha ]")
	if f := c.fencings(); len(f) == 0 || strings.Contains(strings.Join(f, " "), "beta") {
		t.Errorf("fenced when alpha was lost: %v", f)
	}
	// It comes back, and follows.
	c.boot("alpha")
	c.covered()
	c.shows("beta", "Promoted: [ beta ]", "Unpromoted: [ alpha ]")
	s.ask(20)
	c.fencings()

	// The other one is put into standby: it is stopped there, and nobody is fenced for that.
	beta.mustRun("crm_standby", "--node", "beta", "--update", "on")
	c.shows("alpha", "Promoted: [ alpha ]", "Node beta: standby")
	s.ask(20)
	if f := c.fencings(); len(f) != 0 {
		t.Errorf("fenced when beta was put into standby: %v", f)
	}
	beta.mustRun("crm_standby", "--node", "beta", "--delete")
	c.covered()
	c.shows("alpha", "Promoted: [ alpha ]", "Unpromoted: [ beta ]")
	s.ask(20)

	// The hosts lose each other, and both live: the one that is fenced does not transmit any more, the other one does.
	c.fencings()
	c.SetLink(t, c.HostP, "ctl", false)
	began = time.Now()
	lt.Eventually(t, time.Minute, func() (bool, string) { return len(c.bmc) > 0, "nobody is fenced" })
	s.ask(1)
	t.Logf("when the hosts had lost each other the first answer took %v", time.Since(began))
	s.ask(20)
	c.shows("beta", "Promoted: [ beta ]", "OFFLINE: [ alpha ]")
	if f := c.fencings(); strings.Contains(strings.Join(f, " "), "beta") {
		t.Errorf("fenced when the hosts had lost each other: %v", f)
	}
	c.SetLink(t, c.HostP, "ctl", true)
	c.boot("alpha")
	c.covered()
	c.shows("alpha", "Promoted: [ beta ]", "Unpromoted: [ alpha ]")
	s.ask(20)
	if turns := watch.Turns(); len(turns) != 4 {
		t.Errorf("turns of speech: %v", turns)
	}
	t.Log(c.up("alpha").mustRun("crm_attribute", "--type", "crm_config", "--name", "lockstep-web1", "--query"))
}

// TestPacemakerFollows: the pair has an arbiter of its own, and Pacemaker only follows. An operator's failover and
// Pacemaker's order to promote the other instance are both planned failovers: no daemon is started anew for
// them, and nobody is fenced.
func TestPacemakerFollows(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes minutes, and what only make soak-deps installs
	}
	c := newCluster(t, "")
	c.begin()
	watch := lt.WatchTransmitters(t, c.Switch, "portP", "portS")
	s := c.open()
	c.up("beta").mustRun("lockstep", "failover", "-c", c.config, "--node", "beta")
	s.ask(20)
	c.shows("beta", "Promoted: [ beta ]", "Unpromoted: [ alpha ]", "Failed Resource Actions", "monitor on alpha returned 'ok'") // and "promoted" was expected
	c.up("beta").mustRun("crm_resource", "--cleanup", "--resource", "web1")
	c.covered()
	c.shows("beta", "Promoted: [ beta ]", "Unpromoted: [ alpha ]", "Node: alpha:\n    * master-web1                     \t: 10 ")
	s.ask(20)
	c.up("beta").mustRun("crm_resource", "--ban", "--promoted", "--resource", "web1-clone", "--node", "beta")
	c.shows("alpha", "Promoted: [ alpha ]", "Unpromoted: [ beta ]")
	s.ask(20)
	c.covered()
	c.shows("alpha", "Promoted: [ alpha ]", "Unpromoted: [ beta ]")
	for _, node := range []string{"alpha", "beta"} {
		if n := strings.Count(c.up(node).mustRun("cat", "/var/log/lockstep-web1.log"), " msg=lockstep "); n != 1 {
			t.Errorf("the daemon of %s was started %d times", node, n)
		}
	}
	if f := c.fencings(); len(f) != 0 {
		t.Errorf("fenced: %v", f)
	}
	if turns := watch.Turns(); len(turns) != 3 {
		t.Errorf("turns of speech: %v", turns)
	}
}
