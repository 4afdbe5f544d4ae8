// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestDemo is what `make demo` shows: a pair of real guests through two failovers, with
// a client that does not notice. As a test it prints nothing and checks the same.
func TestDemo(t *testing.T) {
	say := func(format string, args ...any) { t.Logf(format, args...) }
	if os.Getenv("LOCKSTEP_DEMO") != "" {
		began := time.Now()
		say = func(format string, args ...any) {
			fmt.Printf("%6.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
		}
	}
	say("Two hosts (alpha, beta), a switch and a client, each a network namespace of its own.")
	p := newLivingPair(t, 1, "")
	say("Starting a daemon on each; they start QEMU (under TCG here), copy the guest's memory, and replicate.")
	p.run("beta", "secondary")
	p.run("alpha", "primary")
	p.covered()
	say("The pair is up: what the guest says leaves alpha once beta's copy has said the same.")
	say("The guest boots, in both QEMUs.")
	p.booted()
	p.lockstepped()

	session := p.openSession()
	web := openWebLoad(p.pair, portHTTP, "/20000", 20000, 2*time.Millisecond)
	lt.Eventually(t, 10*time.Second, func() (bool, string) { return session.answers.Load() > 100 && web.answers.Load() > 10, "no load" })
	say("A client has one long TCP session (%d answers so far), and loads pages (%d so far).", session.answers.Load(), web.answers.Load())

	clock := p.mustDial(lt.Guest4, portClock)
	before := p.status("alpha").CheckpointsDone
	const requests = 5
	for i := range requests {
		say("Asking for the guest's clock, which the two copies do not agree on: %q", p.ask(clock, fmt.Sprintf("request %d", i)))
	}
	s := p.status("alpha")
	c := s.Checkpoints[len(s.Checkpoints)-1]
	say("%d such answers cost %d checkpoints; the last, because of %q, held the guest's output for %.1f ms.", requests, s.CheckpointsDone-before, c.Cause, c.FrozenMS)

	primary := "alpha"
	for range 2 {
		session.longest.Store(0)
		pid, pages := p.qemu(primary), web.answers.Load()
		p.killQEMU(primary)
		say("kill -9 %d: the QEMU of %s, which clients talk to, is gone.", pid, primary)
		n := session.answers.Load()
		lt.Eventually(t, 20*time.Second, func() (bool, string) {
			return session.answers.Load() > n+50 && web.answers.Load() > pages+10, "the session does not go on"
		})
		survivor := other(primary)
		say("%s took over. The session goes on, as does the web load; the longest wait for an answer was %v.", survivor,
			time.Duration(session.longest.Load()).Round(time.Millisecond))
		p.await(survivor, func(s *api.Status) bool { return s.State == "solo" })
		say("%s transmits alone. Starting %s's daemon again, as the secondary: disk and memory are copied.", survivor, primary)
		began := time.Now()
		p.rejoin(primary)
		p.covered()
		say("In step again after %.1f s.", time.Since(began).Seconds())
		primary = survivor
	}
	answers, pages := session.end(t), web.end(t)
	out, err := p.order(primary, "status")
	if err != nil {
		t.Fatal(err)
	}
	say("`lockstep status` on %s:\n\n%s", primary, out)
	say("One TCP session got %d answers and %d pages were loaded, across two dead hosts: none was lost, none was wrong.", answers, pages)
}

// clientLoad asks until it is ended.
type clientLoad struct {
	answers, longest atomic.Int64
	pause            time.Duration // between an answer and the next request
	stop             chan struct{}
	done             chan error
}

func (l *clientLoad) run(ask func(i int) error) {
	for i := 0; ; i++ {
		began := time.Now()
		if err := ask(i); err != nil {
			l.done <- fmt.Errorf("request %d: %w", i, err)
			return
		}
		l.answers.Add(1)
		if took := int64(time.Since(began)); took > l.longest.Load() {
			l.longest.Store(took)
		}
		select {
		case <-l.stop:
			l.done <- nil
			return
		case <-time.After(l.pause):
		}
	}
}

// end returns how many answers there were.
func (l *clientLoad) end(t *testing.T) int64 {
	t.Helper()
	close(l.stop)
	if err := <-l.done; err != nil {
		t.Error(err)
	}
	return l.answers.Load()
}

// openSession keeps asking over one connection.
func (p *livingPair) openSession() *clientLoad {
	p.t.Helper()
	l := &clientLoad{pause: 2 * time.Millisecond, stop: make(chan struct{}), done: make(chan error, 1)}
	c := p.mustDial(lt.Guest4, portEcho)
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	go l.run(func(i int) error { return echo(c, i) })
	return l
}

// openWebLoad keeps loading a page of so many bytes, each time over a new connection.
func openWebLoad(p *pair, port, page string, size int, pause time.Duration) *clientLoad {
	l := &clientLoad{pause: pause, stop: make(chan struct{}), done: make(chan error, 1)}
	go l.run(func(int) error {
		c, err := p.dial(lt.Guest4, port, "")
		if err != nil {
			return err
		}
		defer c.Close()
		client := http.Client{Transport: &http.Transport{
			DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil },
		}}
		resp, err := client.Get("http://guest" + page)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK || len(body) != size {
			return fmt.Errorf("%s, %d bytes, %v", resp.Status, len(body), err)
		}
		return nil
	})
	return l
}
