// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// noted waits until the secondary has noted a point that it had not when the file was as before.
func noted(p *livingPair, node string, before []byte) (now []byte) {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		var err error
		now, err = os.ReadFile(filepath.Join(p.Dir, "state/web1-"+node+".replica"))
		return err == nil && string(now) != string(before), "no point is noted"
	})
	return now
}

// hostDies ends a node's daemon and QEMU at once, as a power cut does.
func hostDies(p *livingPair, node string) {
	p.t.Helper()
	p.procs[node].Process.Kill()
	ends(p.t, p.procs[node])
	p.killQEMU(node)
}

// resynced waits until the pair is whole again, and returns what was copied.
func resynced(p *livingPair) string {
	p.t.Helper()
	p.covered()
	s := p.await("alpha", func(s *api.Status) bool { return len(s.Resyncs) == 1 })
	p.t.Log(s.Resyncs)
	return s.Resyncs[0]
}

// TestResyncOfChanges: the secondary's host dies in the middle of writes and comes back, and
// gets only what was written since its last point; nothing that was confirmed is missing when
// the primary dies then. An image that somebody touched meanwhile is copied whole, and so is
// that of a host which served alone (R29).
func TestResyncOfChanges(t *testing.T) {
	soak := os.Getenv("LOCKSTEP_SOAK") != ""
	p := newLivingPair(t, 1, "checkpoint: {period: 500ms}")
	p.start()
	w := p.writes(20 * time.Second)
	more := func() {
		t.Helper()
		before := w.count()
		lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+10, "few writes" })
	}
	// comesBack has the secondary's host die and come back.
	comesBack := func(meanwhile func()) (copied string) {
		t.Helper()
		more()
		hostDies(p, "beta")
		p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
		more()
		meanwhile()
		p.run("beta", "secondary")
		return resynced(p)
	}
	note := noted(p, "beta", nil)
	if soak {
		note = noted(p, "beta", note) // and a further one
	}
	if copied := comesBack(func() {}); !strings.Contains(copied, "only what changed since") {
		t.Errorf("after a death: %s", copied)
	}
	if soak {
		noted(p, "beta", note)
		copied := comesBack(func() {
			image := filepath.Join(p.Dir, "beta0.qcow2")
			lt.Run(t, "cp", image, image+".copy")
			lt.Run(t, "mv", image+".copy", image)
		})
		if strings.Contains(copied, "only what changed") {
			t.Errorf("of an image that somebody replaced: %s", copied)
		}
		if log := p.log("beta"); !strings.Contains(log, "is another file") {
			t.Error("beta's log does not say why")
		}
		noted(p, "beta", note)
		if copied := comesBack(func() {}); !strings.Contains(copied, "only what changed since") {
			t.Errorf("after another death: %s", copied)
		}
	}
	hostDies(p, "alpha")
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" && s.State == "solo" })
	confirmed := w.end()
	c, served := p.served(30 * time.Second)
	if !served {
		t.Fatal("no host serves")
	}
	p.verify(c, confirmed)
	c.Close()
	if _, err := os.Stat(filepath.Join(p.Dir, "state/web1-beta.replica")); err == nil {
		t.Error("a host that serves alone has the note of a replica")
	}
	if !soak {
		return
	}
	p.run("alpha", "secondary")
	p.covered()
	s := p.await("beta", func(s *api.Status) bool { return len(s.Resyncs) == 1 })
	if strings.Contains(s.Resyncs[0], "only what changed") {
		t.Errorf("of a host that served: %s", s.Resyncs[0])
	}
}
