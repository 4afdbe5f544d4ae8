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

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestGuestOptions: a guest whose NIC has several queues and not all offloads, and whose disks are of both formats, pass
// the host's page cache by, and have folders of their own. Both hosts die, one after the other.
func TestGuestOptions(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // control/qemu.TestArgs and loader/device.TestQueues stay
	}
	p := newLivingPair(t, 2, "migration: {port: 9998, nbd_port: 9999}")
	for _, node := range []string{"alpha", "beta"} {
		at := func(name string) string { return filepath.Join(p.Dir, node+name) }
		lt.Run(t, "qemu-img", "convert", "-O", "raw", at("1.qcow2"), at("1.raw"))
	}
	const options = ", cache: none, aio: native, discard: true"
	p.replace("'{node}0.qcow2', overlay_dir: 'overlays-{node}'", "'{node}0.qcow2', overlay_dir: 'overlays-{node}'"+options)
	p.replace("'{node}1.qcow2', overlay_dir: 'overlays-{node}'", "'{node}1.raw', format: raw, overlay_dir: 'more-{node}'"+options)
	p.replace("  smp: 1\n", "  smp: 2\n  offloads: {host_tso6: false, mrg_rxbuf: false}\n")
	for _, tap := range []string{"tapP", "tapS"} {
		p.replace("tap: "+tap+",", "tap: "+tap+", queues: 2,")
	}
	p.start()
	for host, tap := range map[string]string{p.HostP: "tapP", p.HostS: "tapS"} {
		out, err := exec.Command("ip", "-n", host, "-d", "link", "show", tap).Output()
		if err != nil || !strings.Contains(string(out), "numqueues 2 ") {
			t.Fatalf("%v: QEMU has not opened two queues: %s", err, out)
		}
	}
	c := p.open()
	for i, node := range []string{"alpha", "beta"} {
		w := p.writes(30 * time.Second)
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > 20, fmt.Sprintf("%d writes", w.count()) })
		p.kill(node)
		p.killQEMU(node)
		c.ask(3)
		disk, ok := p.served(30 * time.Second)
		if !ok {
			t.Fatal("no host serves the disk")
		}
		p.verify(disk, w.end())
		disk.Close()
		if i == 0 {
			p.run(node, "secondary")
			p.covered()
			c.ask(3)
		}
	}
	if s := p.status("alpha"); s.State != "solo" {
		t.Errorf("the last host is %q", s.State)
	}
}
