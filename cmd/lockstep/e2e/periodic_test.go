// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// serveRandom is the guest's service over UDP whose answers never agree: the question, and something random.
func serveRandom() {
	c, err := net.ListenPacket("udp", ":"+portRandom)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go func() {
		for b := make([]byte, 1500); ; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(fmt.Appendf(b[:n], " %d %s", time.Now().UnixNano(), rand.Text()), from)
		}
	}()
}

// TestPeriodicMode: where no answer agrees each waits for compare.timeout, until periodic mode begins by itself. In it none
// does, it ends when nobody asks any more, and a host's death in it costs nobody anything (R28).
func TestPeriodicMode(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // it takes a minute; control's test of this name, and the simulated world, stay
	}
	p := newLivingPair(t, 0, "checkpoint: {periodic_above: 20, epoch: 50ms}")
	p.start()
	var udp net.Conn
	lt.In(t, p.Client, func() {
		var err error
		if udp, err = net.Dial("udp", net.JoinHostPort(lt.Guest4, portRandom)); err != nil {
			t.Fatal(err)
		}
	})
	defer udp.Close()
	n := 0
	answer := func() time.Duration {
		t.Helper()
		n++
		question, b, began := fmt.Sprintf("question %d", n), make([]byte, 1500), time.Now()
		for try := 0; ; try++ {
			fmt.Fprint(udp, question)
			udp.SetReadDeadline(time.Now().Add(10 * time.Second))
			got, err := udp.Read(b)
			for err == nil && !strings.HasPrefix(string(b[:got]), question+" ") { // of an earlier try
				got, err = udp.Read(b)
			}
			if err == nil {
				return time.Since(began)
			}
			if try == 3 || !errors.Is(err, os.ErrDeadlineExceeded) { // a network may lose it
				t.Fatalf("%s: %v", question, err)
			}
		}
	}
	on := func(s *api.Status) bool { return s.Periodic != nil && s.Periodic.On }
	begins := func() {
		t.Helper()
		var waits []time.Duration
		for !on(p.status("alpha")) {
			if waits = append(waits, answer()); len(waits) > 40 {
				t.Fatalf("periodic mode does not begin; answers came after %v", waits)
			}
		}
		t.Logf("the mode begins; before, answers came after %v", waits)
	}
	timeouts := func() (sum uint64) {
		for _, c := range p.status("alpha").CheckpointCounts {
			if c.Cause != "periodic mode" && c.Cause != "period" {
				sum += c.Count
			}
		}
		return sum
	}

	c := p.open()
	begins()
	before := timeouts()
	var waits, echoes []time.Duration
	for range 40 {
		waits = append(waits, answer())
		began := time.Now()
		c.ask(1)
		echoes = append(echoes, time.Since(began))
	}
	slices.Sort(waits)
	slices.Sort(echoes)
	s := p.status("alpha")
	if !on(s) || timeouts() != before {
		t.Errorf("the mode is on: %t; besides its own there were %d checkpoints", on(s), timeouts()-before)
	}
	t.Logf("in the mode answers came after %v (median), %v at most; what agrees after %v and %v", waits[20], waits[39], echoes[20], echoes[39])
	for _, a := range s.Checkpoints[max(0, len(s.Checkpoints)-5):] {
		t.Logf("%s at %s: frozen for %.0f ms, of these the PVM stood still for %.0f, the SVM for %.0f", a.Result, a.At.Format("05.000"), a.FrozenMS, a.PVMPauseMS, a.SVMPauseMS)
	}
	p.await("alpha", func(s *api.Status) bool { return s.Periodic != nil && !s.Periodic.On })

	begins()
	// TCP that never agrees, through the host's death: each line is answered once.
	clock := p.mustDial(lt.Guest4, portClock)
	in := bufio.NewReader(clock)
	line := func(i int) {
		t.Helper()
		clock.SetDeadline(time.Now().Add(30 * time.Second))
		fmt.Fprintf(clock, "line %d\n", i)
		if got, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(got, fmt.Sprintf("line %d ", i)) {
			t.Fatalf("line %d: %q, %v", i, got, err)
		}
	}
	for i := range 5 {
		answer()
		line(i)
	}
	if !on(p.status("alpha")) {
		t.Error("the mode is not on any more")
	}
	p.endQEMU("alpha", syscall.SIGKILL)
	c.ask(1)
	line(5)
	answer()
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
	c.ask(3)
	events, err := p.lockstep("events", "-c", p.config, "--node", "alpha").CombinedOutput()
	if err != nil || strings.Count(string(events), "state=begins") != 2 || strings.Count(string(events), "state=ends") < 1 {
		t.Errorf("events: %v\n%s", err, events)
	}
}
