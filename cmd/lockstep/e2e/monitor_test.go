// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestUnreachableMonitor: the primary's daemon cannot reach QEMU's monitor, once because
// it is out of descriptors, once because another client is served. QEMU lives, so no host
// takes over, and the pair goes on by itself. A QEMU that dies meanwhile is found at once.
func TestUnreachableMonitor(t *testing.T) {
	p := newLivingPair(t, 0, "")
	p.start()
	watch := lt.WatchTransmitters(t, p.Switch, "portP", "portS")
	c := p.open()
	whole := func(what string) {
		t.Helper()
		s := p.await("alpha", func(s *api.Status) bool { return s.QMP.Connected && s.State == "replicating" && s.Covered })
		if s.ArbiterTerm != p.record {
			t.Fatalf("%s: the record is of term %d, not %d", what, s.ArbiterTerm, p.record)
		}
		c.ask(1)
	}

	// The connection there is breaks because QEMU stands still for a moment. Meanwhile
	// another client gets in front in its queue.
	var other net.Conn
	broken := 0
	lose := func(log ...string) {
		t.Helper()
		p.signal("alpha", syscall.SIGSTOP)
		broken++
		lt.Eventually(t, 30*time.Second, func() (bool, string) {
			got := p.log("alpha")
			for _, l := range append(log, "no answer in time") {
				if strings.Count(got, l) < broken {
					return false, got
				}
			}
			return true, ""
		})
		p.signal("alpha", syscall.SIGCONT)
	}
	held := func(log ...string) {
		t.Helper()
		var err error
		if other, err = net.Dial("unix", filepath.Join(p.Dir, "run/web1-alpha.qmp")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { other.Close() })
		lose(log...)
	}
	isHeld := func() {
		t.Helper()
		want := fmt.Sprintf("another client on its monitor, process %d (", os.Getpid())
		p.await("alpha", func(s *api.Status) bool { return strings.Contains(s.QMP.Error, want) })
	}

	// The daemon is out of descriptors, too.
	daemon := p.procs["alpha"].Process.Pid
	var before unix.Rlimit
	if err := unix.Prlimit(daemon, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	none := unix.Rlimit{Cur: 8, Max: before.Max} // poll takes no more either
	if err := unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &none, nil); err != nil {
		t.Fatal(err)
	}
	held("lives, but its monitor cannot be reached", syscall.EMFILE.Error())
	if err := unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &before, nil); err != nil {
		t.Fatal(err)
	}
	isHeld()
	answered := c.askLater() // nothing leaves meanwhile: a STOP could pass unseen
	// Longer than two attempts to connect, after which a QEMU that hangs is dead.
	later := time.Now().Add(6 * time.Second)
	p.await("alpha", func(s *api.Status) bool {
		if s.ArbiterTerm != p.record || s.State == "failover" || s.State == "solo" || !s.Peer.Connected {
			t.Fatalf("with another client: %+v", s)
		}
		return time.Now().After(later)
	})
	other.Close()
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	c.n++
	whole("after another client")

	held()
	isHeld()
	began := time.Now()
	p.killQEMU("alpha")
	c.ask(1)
	t.Logf("QEMU died while another client was served: the first answer took %v", time.Since(began))
	if b := p.await("beta", func(s *api.Status) bool { return s.State == "solo" }); b.ArbiterTerm != p.record+1 {
		t.Errorf("the record is of term %d, want %d", b.ArbiterTerm, p.record+1)
	}
	twoTurns(t, watch)
}
