// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// unmoved answers every change with the record that there was.
type unmoved struct {
	arbiter.Arbiter // nil: nothing else is called
	now             arbiter.Entry
	asked           int
}

func (u *unmoved) Settle(context.Context) (arbiter.Entry, error) { return u.now, nil }

func (u *unmoved) Swap(context.Context, arbiter.Entry, arbiter.Entry) (arbiter.Entry, bool, error) {
	u.asked++
	return u.now, false, nil
}

// TestSwapUnmoved: an arbiter that answers with the old record is asked again, at a
// growing distance, and each time that is said: asking may fence a host.
func TestSwapUnmoved(t *testing.T) {
	from, to := arbiter.Entry{Term: 4, Speaker: "alpha"}, arbiter.Entry{Term: 5, Speaker: "beta"}
	const watched = time.Second
	told := filepath.Join(t.TempDir(), "told")
	fence, err := arbiter.Open(&config.Config{
		VM: "web1", Nodes: []config.Node{{Name: "alpha"}, {Name: "beta"}},
		Arbiter: config.Arbiter{Type: config.ArbiterExec, Timeout: 10 * time.Second, Command: []string{"/bin/sh", "-c", `echo "$1" >>"$0"; echo 4 alpha`, told}},
	}, "beta")
	if err != nil {
		t.Fatal(err)
	}
	u := &unmoved{now: from}
	for name, x := range map[string]struct {
		arbiter.Arbiter
		swaps func() int
	}{
		"any": {u, func() int { return u.asked }},
		"exec": {fence, func() int {
			b, _ := os.ReadFile(told)
			return strings.Count(string(b), "swap")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), watched)
			defer cancel()
			said := 0
			_, won, err := Swap(ctx, x, from, to, func(err error) {
				said++
				if ctx.Err() == nil && !strings.Contains(err.Error(), "neither won nor lost") {
					t.Error(err)
				}
			})
			if won || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("won: %v, %v", won, err)
			}
			// 50, 100, 200, 400 ms lie between them.
			if n := x.swaps(); n < 1 || n > 6 || said < n-1 {
				t.Errorf("asked %d times in %v, %d errors", n, watched, said)
			}
		})
	}
}

// TestSwapUnmovedThenWon: it goes on as soon as the arbiter does.
func TestSwapUnmovedThenWon(t *testing.T) {
	from, to := arbiter.Entry{Term: 4, Speaker: "alpha"}, arbiter.Entry{Term: 5, Speaker: "beta"}
	for _, now := range []arbiter.Entry{to, {Term: 5, Speaker: "alpha"}} {
		u := &unmoved{now: from}
		got, won, err := Swap(t.Context(), u, from, to, func(error) { u.now = now })
		if got != now || won != (now == to) || err != nil {
			t.Errorf("%v", fmt.Sprint(got, won, err))
		}
	}
}

// TestStillSystemd: a systemd that reads nothing holds up neither start nor stop.
func TestStillSystemd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	still, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer still.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	var out strings.Builder
	log := slog.New(slog.NewTextHandler(&out, nil))
	for i := 0; !strings.Contains(out.String(), "systemd does not listen"); i++ {
		if i == 10_000 {
			t.Fatal("its queue has no end")
		}
		Notify(log, "READY=1")
	}
	began := time.Now()
	Notify(log, "STOPPING=1")
	if took := time.Since(began); took > patience {
		t.Errorf("the second took %v", took)
	}
}

// TestStillDaemon: the socket of a daemon that stands still is not taken away from it.
func TestStillDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	// Its backlog is full.
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if l, err := api.Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "stands still") {
		t.Errorf("%v, %v", l, err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// TestTakes: who takes a daemon's place alone must be one that its peer will have.
func TestTakes(t *testing.T) {
	hash := strings.Repeat("00", 32)
	other := strings.Repeat("00", 5*4) + "01" + hash[5*4*2+2:] // the heartbeat's share
	for _, x := range []struct {
		s    api.Status
		want string
	}{
		{api.Status{Protocol: peerlink.Version, Config: hash}, ""},
		{api.Status{Protocol: peerlink.Version, Config: other}, "another config (heartbeat)"},
		{api.Status{Protocol: peerlink.Version, Config: other, State: "solo"}, ""},
		{api.Status{Protocol: peerlink.Version, Config: "short"}, "does not report in what"},
		{api.Status{Protocol: peerlink.Version - 1, Config: hash, Peer: api.PeerStatus{Node: "beta"}}, fmt.Sprintf("protocol %d with beta, and this lockstep %d", peerlink.Version-1, peerlink.Version)},
		{api.Status{}, "too old"},
	} {
		if err := x.s.Takes(peerlink.Version, hash); (err != nil) != (x.want != "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v: %v, want %q", x.s, err, x.want)
		}
	}
}
