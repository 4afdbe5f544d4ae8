// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// firstStart makes a pair whose secondary's disk is empty: nothing was copied.
func firstStart(t *testing.T) *livingPair {
	t.Helper()
	p := newLivingPair(t, 1, "")
	qemutest.Disk(t, filepath.Join(p.Dir, "beta0.qcow2"), 64<<20, false)
	return p
}

// setFirstStart changes the config, and has a node's daemon read it.
func (p *livingPair) setFirstStart(node, role, how string) {
	p.t.Helper()
	p.writeFirstStart(how)
	p.kill(node)
	p.run(node, role)
}

func (p *livingPair) writeFirstStart(how string) {
	p.t.Helper()
	b, err := os.ReadFile(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(b), "\nqemu:\n")
	if _, after, there := strings.Cut(rest, "  first_start: "); there {
		_, rest, _ = strings.Cut(after, "\n")
	}
	text := before + "\nqemu:\n  first_start: " + how + "\n" + rest
	if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// keepsFile checks that what is written now is on the survivor's disk.
func (p *livingPair) keepsFile() {
	p.t.Helper()
	disk := p.mustDial(lt.Guest4, portDisk)
	if got := p.ask(disk, "write kept text"); got != "wrote kept <nil>" {
		p.t.Fatal(got)
	}
	p.killQEMU("alpha")
	if got := p.ask(disk, "read kept"); got != "text <nil>" {
		p.t.Errorf("the survivor's disk has %q", got)
	}
}

// TestFirstStart: an empty image on the secondary's host is refused, by disk, host and
// place, on both hosts and without end; with first_start: copy it becomes the primary's,
// and a takeover keeps the guest's files.
func TestFirstStart(t *testing.T) {
	p := firstStart(t)
	p.run("beta", "secondary")
	p.run("alpha", "primary")
	// ext4's superblock, at 1024, is the first thing that an empty disk has not.
	const want = "disk colo-disk0: the images on alpha and beta are not the same: byte 1024 is the first that differs"
	var since time.Time
	for _, node := range []string{"alpha", "beta"} {
		s := p.await(node, func(s *api.Status) bool { return s.Covered || strings.Contains(s.Refused, want) })
		if s.Covered || s.State != "start" || !strings.Contains(s.Detail, want) || !strings.Contains(s.Refused, "first_start: copy") {
			t.Fatalf("%s: %+v", node, s)
		}
		since = s.Peer.Since
		if out, err := p.order(node, "events"); err != nil || strings.Count(out, want) != 1 {
			t.Errorf("events of %s: %v\n%s", node, err, out)
		}
	}
	// Nothing goes round: it is the session and the QEMU that there were.
	pid := p.qemu("beta")
	select {
	case <-time.After(2 * time.Second): // the time in which it would
	case <-t.Context().Done():
	}
	if s := p.status("beta"); !s.Peer.Since.Equal(since) || p.qemu("beta") != pid || strings.Count(p.log("alpha"), want) != 1 {
		t.Error("it is tried again and again")
	}
	p.setFirstStart("alpha", "primary", "copy")
	p.covered()
	if s := p.status("beta"); s.Refused != "" {
		t.Errorf("refused still: %s", s.Refused)
	}
	if log := p.log("alpha"); !strings.Contains(log, "what beta's image holds is lost") {
		t.Error("no log says whose image is lost")
	}
	p.booted()
	p.lockstepped()
	p.keepsFile()
}

// TestFirstStartTrusted is the mutation of TestFirstStart: where the images are not compared, an empty
// image counts as a replica. That is what trust means, and why it is not the default.
func TestFirstStartTrusted(t *testing.T) {
	p := firstStart(t)
	p.run("beta", "secondary")
	p.writeFirstStart("trust")
	p.run("alpha", "primary")
	p.covered()
}

// TestFirstStartAlone: the guest ran alone before it ever replicated, so its image goes on
// changing: also where the config accepts images that are the same, they have to be copied. Once it stands still, they
// are compared.
func TestFirstStartAlone(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // half a minute; TestFirstStart and control/qemu.TestCompareImages stay
	}
	p := firstStart(t)
	p.run("alpha", "primary")
	p.await("alpha", func(s *api.Status) bool { return s.QMP.Connected })
	if out, err := p.order("alpha", "failover"); err != nil {
		t.Fatal(out, err)
	}
	p.booted()
	p.setFirstStart("alpha", "primary", "trust")
	p.run("beta", "secondary")
	for _, node := range []string{"alpha", "beta"} {
		s := p.await(node, func(s *api.Status) bool { return s.Covered || s.Refused != "" })
		if s.Covered || !strings.Contains(s.Detail, "the guest runs already on alpha") {
			t.Fatalf("%s: %s: %s", node, s.State, fmt.Sprint(s.Detail))
		}
	}
	if s := p.status("alpha"); s.State != "solo" {
		t.Errorf("the guest is in state %s", s.State)
	}
	p.killQEMU("alpha")
	p.procs["alpha"].Wait()
	p.run("alpha", "primary")
	for _, node := range []string{"alpha", "beta"} {
		s := p.await(node, func(s *api.Status) bool { return s.Covered || strings.Contains(s.Refused, "are not the same") })
		if s.Covered {
			t.Fatalf("%s: a replica that missed what the guest wrote is covered", node)
		}
	}
	p.setFirstStart("alpha", "primary", "copy")
	p.covered()
	p.booted()
	p.lockstepped()
	p.keepsFile()
}
