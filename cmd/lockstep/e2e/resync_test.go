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
func (p *livingPair) noted(node string, before []byte) (now []byte) {
	p.t.Helper()
	lt.Eventually(p.t, time.Minute, func() (bool, string) {
		var err error
		now, err = os.ReadFile(filepath.Join(p.Dir, "state/web1-"+node+".replica"))
		return err == nil && string(now) != string(before), "no point is noted"
	})
	return now
}

// hostDies ends a node's daemon and QEMU at once, as a power cut does.
func (p *livingPair) hostDies(node string) {
	p.t.Helper()
	p.procs[node].Process.Kill()
	ends(p.t, p.procs[node])
	p.killQEMU(node)
}

// resynced waits until the pair is whole again, and returns what was copied.
func (p *livingPair) resynced() string {
	p.t.Helper()
	p.covered()
	s := p.await("alpha", func(s *api.Status) bool { return len(s.Resyncs) == 1 })
	p.t.Log(s.Resyncs)
	return s.Resyncs[0]
}

// TestResyncOfChanges: the secondary's host dies in the middle of writes and comes back, and
// gets only what was written since its last point; nothing that was confirmed is missing when
// the primary dies then. An image that somebody touched meanwhile is copied whole, and so is
// that of a host which served alone (R28).
func TestResyncOfChanges(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		t.Skip("takes two minutes: set LOCKSTEP_SOAK=1")
	}
	p := newLivingPair(t, 1, "checkpoint: {period: 500ms}")
	p.start()
	w := p.writes(20 * time.Second)
	note := p.noted("beta", nil)
	note = p.noted("beta", note) // and a further one
	before := w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+10, "few writes" })
	p.hostDies("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	before = w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+10, "few writes" })
	p.run("beta", "secondary")
	if copied := p.resynced(); !strings.Contains(copied, "only what changed since") {
		t.Errorf("after a death: %s", copied)
	}

	// Somebody writes to the image while nobody has it.
	p.noted("beta", note)
	p.hostDies("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	image := filepath.Join(p.Dir, "beta0.qcow2")
	lt.Run(t, "cp", image, image+".copy")
	lt.Run(t, "mv", image+".copy", image)
	p.run("beta", "secondary")
	if copied := p.resynced(); strings.Contains(copied, "only what changed") {
		t.Errorf("of an image that somebody replaced: %s", copied)
	}
	if log := p.log("beta"); !strings.Contains(log, "is another file") {
		t.Error("beta's log does not say why")
	}

	// And the copy of the changes is what serves.
	note, _ = os.ReadFile(filepath.Join(p.Dir, "state/web1-beta.replica"))
	p.noted("beta", note)
	p.hostDies("beta")
	p.await("alpha", func(s *api.Status) bool { return s.State == "solo" })
	before = w.count()
	lt.Eventually(t, 30*time.Second, func() (bool, string) { return w.count() > before+10, "few writes" })
	p.run("beta", "secondary")
	if copied := p.resynced(); !strings.Contains(copied, "only what changed since") {
		t.Errorf("after another death: %s", copied)
	}
	p.hostDies("alpha")
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
	p.run("alpha", "secondary")
	p.covered()
	s := p.await("beta", func(s *api.Status) bool { return len(s.Resyncs) == 1 })
	if strings.Contains(s.Resyncs[0], "only what changed") {
		t.Errorf("of a host that served: %s", s.Resyncs[0])
	}
}
