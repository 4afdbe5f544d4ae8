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
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// guestAgent is QEMU's guest agent, in guests that have it.
const guestAgent = "/usr/sbin/qemu-ga"

// runAgent starts it, where it is, at the second serial port: the guest's kernel has no module for virtio's. It has
// the clock written to the RTC by hwclock, and refuses to set it without that.
func runAgent() {
	if _, err := os.Stat(guestAgent); err != nil {
		return
	}
	err := os.MkdirAll("/sbin", 0o755)
	if err == nil {
		err = os.Symlink("/bin/busybox", "/sbin/hwclock")
	}
	if err == nil {
		agent := exec.Command(guestAgent, "-m", "isa-serial", "-p", "/dev/ttyS1", "-t", "/tmp", "-f", "/tmp/agent.pid")
		agent.Stdout, agent.Stderr = os.Stderr, os.Stderr
		err = agent.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, guestAgent, err)
	}
}

// TestGuestClock: the guest's clock falls behind by the guest's pauses, of which the status has the sum; a real guest
// agent sets it, and a takeover goes on with that.
func TestGuestClock(t *testing.T) {
	p := newLivingPairOf(t, 0, "", qemutest.Guest{Env: []string{actAs + "=guest pvm"}, Files: libraries(t, guestAgent)}, qemutest.Memory+(32<<20))
	p.extra("-chardev", fmt.Sprintf("'socket,id=agent,server=on,wait=off,path=%s/{node}.agent'", p.Dir), "-device", "'isa-serial,chardev=agent'")
	p.start()
	clock := p.mustDial(lt.Guest4, portClock)
	n := 0
	// behind is how far behind the guest's clock is, at least and at most. To ask for it costs a checkpoint.
	behind := func() (least, most time.Duration) {
		t.Helper()
		n++
		asked := time.Now()
		var got int
		var at int64
		if answer := p.ask(clock, fmt.Sprint(n)); !sscan(answer, &got, &at) || got != n {
			t.Fatalf("%q", answer)
		}
		return asked.Sub(time.Unix(0, at)), time.Since(time.Unix(0, at))
	}
	paused := func(node string) time.Duration {
		s := p.status(node)
		if s == nil {
			t.Fatalf("no status of %s", node)
		}
		return time.Duration(s.GuestClock.PausedSeconds * float64(time.Second))
	}

	dirty := p.mustDial(lt.Guest4, portDirty)
	p.ask(dirty, "")
	before := paused("alpha")
	began, beganMost := behind()
	from := paused("alpha")
	for paused("alpha") < from+time.Second {
		behind()
	}
	sum := paused("alpha") - from
	least, most := behind()
	least, most = least-beganMost, most-began
	t.Logf("at first %v behind; then %d checkpoints, %v of pauses, and %v to %v more behind", began, n, sum, least, most)
	if all := paused("alpha") - before; most < sum*3/4 || least*3/4 > all { // an emulated clock is not that exact
		t.Errorf("the guest's clock lost %v to %v in pauses of %v to %v", least, most, sum, all)
	}

	// Daemons that know of the agent.
	b, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	b = []byte(strings.NewReplacer("alpha: {", "alpha: {guest_agent: alpha.agent, ", "beta:  {", "beta:  {guest_agent: beta.agent, ").Replace(string(b)))
	with := filepath.Join(p.Dir, "agent.yaml")
	if err := os.WriteFile(with, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"alpha", "beta"} {
		p.own[node] = with
		p.kill(node)
		p.run(node, "")
		p.covered()
	}
	s := p.await("alpha", func(s *api.Status) bool { return s.GuestClock.Sets > 0 && s.State == "replicating" })
	t.Logf("guest paused: %s", &s.GuestClock)
	if s.GuestClock.Error != "" || s.GuestClock.PausedSeconds < sum.Seconds() {
		t.Errorf("the guest agent answered, and the other host knew of pauses of %v: %s", sum, &s.GuestClock)
	}
	corrected := func() (bool, string) {
		now, _ := behind()
		return now < sum/2, fmt.Sprintf("%v behind, was %v", now, began+sum)
	}
	lt.Eventually(t, time.Minute, corrected)
	s = p.await("beta", func(s *api.Status) bool { return s.GuestClock.BehindSeconds != nil })
	t.Logf("the secondary's: %s", &s.GuestClock)
	if s.GuestClock.Sets > 0 {
		t.Errorf("the secondary's clock was set: %s", &s.GuestClock)
	}

	p.killQEMU("alpha")
	p.await("beta", func(s *api.Status) bool { return s.Role == "primary" }) // alpha's daemon follows by itself, and may be there already
	lt.Eventually(t, time.Minute, corrected)
	now, _ := behind()
	t.Logf("after a takeover %v behind", now)
}
