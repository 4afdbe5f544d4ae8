// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// guestLock is a lock that a client has across several requests, as a database's transaction has a row. Who of those that
// wait gets it is each guest's own choice.
type guestLock struct {
	mu      sync.Mutex
	held    bool
	waiting []chan struct{}
}

func (l *guestLock) lock() {
	l.mu.Lock()
	if !l.held {
		l.held = true
		l.mu.Unlock()
		return
	}
	mine := make(chan struct{})
	l.waiting = append(l.waiting, mine)
	l.mu.Unlock()
	<-mine
}

func (l *guestLock) unlock() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held = len(l.waiting) > 0; !l.held {
		return
	}
	i := int(time.Now().UnixMicro()) % len(l.waiting)
	close(l.waiting[i])
	l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
}

// serveLock is the guest's side: each line locks, the next one unlocks.
func serveLock() func(*net.TCPConn) {
	l := new(guestLock)
	return func(c *net.TCPConn) {
		for r := bufio.NewScanner(c); r.Scan(); {
			l.lock()
			fmt.Fprintln(c, "locked")
			more := r.Scan()
			l.unlock()
			if !more {
				return
			}
			fmt.Fprintln(c, "unlocked")
		}
	}
}

// TestLockOrder: clients compete for a lock, and the guests give it to another one. Each waits for a checkpoint, which
// comes sooner than compare.timeout.
func TestLockOrder(t *testing.T) {
	if os.Getenv("LOCKSTEP_SOAK") == "" {
		return // compare's transcript r7_order stays
	}
	const clients, times = 3, 40
	p := newLivingPair(t, 0, "")
	p.start()
	count := func(s *api.Status) map[string]uint64 {
		n := make(map[string]uint64)
		for _, c := range s.CheckpointCounts {
			n[c.Cause+" "+c.Result] += c.Count
		}
		return n
	}
	before := count(p.status("alpha"))
	var conns []*net.TCPConn
	for range clients {
		conns = append(conns, p.mustDial(lt.Guest4, portLock))
	}
	began := time.Now()
	var work sync.WaitGroup
	for i, c := range conns {
		work.Go(func() {
			in := bufio.NewReader(c)
			for n := range times {
				for _, want := range []string{"locked\n", "unlocked\n"} {
					c.SetDeadline(time.Now().Add(time.Minute))
					if _, err := fmt.Fprintln(c, "next"); err != nil {
						t.Errorf("client %d: %v", i, err)
						return
					}
					if got, err := in.ReadString('\n'); err != nil || got != want {
						t.Errorf("client %d, time %d: %q, %v, want %q", i, n, got, err, want)
						return
					}
				}
			}
		})
	}
	work.Wait()
	took := time.Since(began)
	after := count(p.status("alpha"))
	for cause, n := range after {
		if n -= before[cause]; n > 0 {
			t.Logf("checkpoints: %3d %s", n, cause)
		}
	}
	t.Logf("%d clients had the lock %d times each, %.1f times a second", clients, times, clients*times/took.Seconds())
	if after["another order committed"] == before["another order committed"] {
		t.Error("no checkpoint was for another order")
	}
}
