// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qmptest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// capture is every frame that reached the client.
type capture struct {
	mu     sync.Mutex
	frames [][]byte
}

func (p *pair) capture() *capture {
	p.t.Helper()
	const ethAll = 0x0003
	var fd int
	lt.In(p.t, p.Client, func() {
		var err error
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, ethAll<<8); err != nil {
			p.t.Fatal(err)
		}
	})
	c := new(capture)
	done := make(chan struct{})
	tv := unix.Timeval{Usec: 50_000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		p.t.Fatal(err)
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		buf := make([]byte, 1<<17)
		for {
			select {
			case <-done:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				continue // the time-out, which lets done be seen
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING {
				c.mu.Lock()
				c.frames = append(c.frames, bytes.Clone(buf[:n]))
				c.mu.Unlock()
			}
		}
	})
	p.t.Cleanup(func() {
		close(done)
		reader.Wait()
		unix.Close(fd)
	})
	return c
}

// count is the number of frames that hold text.
func (c *capture) count(text string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		if bytes.Contains(f, []byte(text)) {
			n++
		}
	}
	return n
}

func qemuPair(t *testing.T) *qmptest.Pair {
	t.Helper()
	q, err := qmptest.NewPair(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

func ready(s *api.Status) bool { return s.State == "replicating" && s.QMP.Connected }

// TestDivergence: answers that differ reach no client before the checkpoint that
// the divergence asks for; then the PVM's leaves, and new connections work.
func TestDivergence(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}")
	p.await("alpha", ready)
	seen := p.capture()
	for round := range 3 {
		held := make(chan struct{})
		release := sync.OnceFunc(func() { close(held) })
		t.Cleanup(release) // the pair does not close while a hook waits
		q.SetHook(func(s qmptest.Stage) bool {
			if s == qmptest.SecondaryStop {
				<-held
			}
			return true
		})
		before := p.status("alpha")
		c := p.mustDial(lt.Guest4, portDiffer)
		fmt.Fprintln(c, "who are you?")
		s := p.await("alpha", func(s *api.Status) bool {
			return s.State == "checkpointing" && s.CheckpointsRequested > before.CheckpointsRequested
		})
		if cause := s.Causes[len(s.Causes)-1]; !strings.Contains(cause.Flow, portDiffer) {
			t.Errorf("round %d: the request's cause is %+v, want the diverged connection", round, cause)
		}
		if n := seen.count("answer of"); n != round {
			t.Errorf("round %d: %d answers reached the client before the checkpoint", round, n-round)
		}
		q.SetHook(nil)
		release()
		want := "answer of guest pvm\n"
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Fatalf("round %d: after the checkpoint the client read %q, %v; want %q", round, got, err, want)
		}
		p.await("alpha", func(s *api.Status) bool {
			return s.State == "replicating" && s.CheckpointsDone > before.CheckpointsDone
		})
		p.keepAlive(lt.Guest4, 100)
	}
	if n := seen.count("answer of guest svm"); n != 0 {
		t.Errorf("%d frames of the SVM reached the client", n)
	}
}

// TestUnaskedStop: STOP and RESUME that lockstep did not ask for release nothing.
func TestUnaskedStop(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}")
	p.await("alpha", ready)
	goOn := make(chan struct{})
	q.SetHook(func(qmptest.Stage) bool { <-goOn; return true }) // no checkpoint comes to pass
	goOnce := sync.OnceFunc(func() { close(goOn) })
	defer goOnce()
	seen := p.capture()
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	q.Primary.Stop()
	p.await("alpha", func(s *api.Status) bool { return s.State != "replicating" })
	fmt.Fprintln(c, "stopped and muted")
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets > 0 })
	q.Primary.Resume()
	// Lockstep wants a checkpoint of its own now, which does not come.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := q.Primary.Await(ctx, "migrate-set-parameters", 1); err != nil {
		t.Fatal(err)
	}
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets > 0 })
	if n := seen.count("stopped and muted"); n != 0 {
		t.Errorf("%d frames left after a STOP that was not asked for", n)
	}
	// The same bytes leave once a checkpoint commits.
	goOnce()
	want := "stopped and muted\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Errorf("after the checkpoint: %q, %v; want %q", got, err, want)
	}
}

// TestSecondaryDead: without the SVM nothing leaves, the time-out asks for a
// checkpoint, held memory stays bounded, and a lost daemon is reported.
func TestSecondaryDead(t *testing.T) {
	const slots, gsoSlots = 256, 32
	p := newPair(t, lt.Veth, "", "", fmt.Sprintf("compare: {timeout: 200ms, slots: %d, gso_slots: %d}", slots, gsoSlots))
	flood := p.mustDial(lt.Guest4, portSource)
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	lt.Run(t, "ip", "-n", p.HostS, "link", "set", "tapS", "down")
	seen := p.capture()
	fmt.Fprintln(c, "nobody confirms this")
	s := p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > 0 && s.HeldPackets > 0 })
	if cause := s.Causes[0]; !strings.Contains(cause.Flow, portEcho) {
		t.Errorf("cause %+v, want the waiting connection", cause)
	}
	fmt.Fprintln(flood, 100_000_000)
	s = p.await("alpha", func(s *api.Status) bool { return s.HeldPackets > 1 })
	if limit := slots*2048 + gsoSlots*69632; s.HeldBytes > limit || s.HeldPackets > slots+gsoSlots {
		t.Errorf("%d packets, %d bytes held, more than all slots (%d)", s.HeldPackets, s.HeldBytes, limit)
	}
	if n := seen.count("nobody confirms this"); n != 0 {
		t.Errorf("%d unconfirmed frames left", n)
	}
	p.kill("beta")
	p.await("alpha", func(s *api.Status) bool { return !s.Peer.Connected })
}

// TestActiveOpen: the guests connect out. From the same port it is one
// connection; from differing ports a divergence at once.
func TestActiveOpen(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 30s}") // not the time-out's doing
	var l net.Listener
	lt.In(t, p.Client, func() {
		var err error
		if l, err = net.Listen("tcp", net.JoinHostPort(lt.Client4, "8000")); err != nil {
			t.Fatal(err)
		}
	})
	defer l.Close()
	go acceptAll(l, func(c *net.TCPConn) { io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, 2_000_000)) })
	dial := func(ns, port string) func() ([]byte, error) {
		cmd := lt.Command(ns, p.self())
		cmd.Env = append(os.Environ(), actAs+"=dial "+port)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill() })
		return func() ([]byte, error) {
			err := cmd.Wait()
			return out.Bytes(), err
		}
	}
	for _, port := range []string{"5001", "5002", "5003"} {
		pvm, svm := dial(p.PVM, port), dial(p.SVM, port)
		for who, wait := range map[string]func() ([]byte, error){"pvm": pvm, "svm": svm} {
			if out, err := wait(); err != nil || string(out) != "2000000 right\n" {
				t.Fatalf("%s fetched %q, %v", who, out, err)
			}
		}
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Fatalf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
	dial(p.PVM, "5101")
	dial(p.SVM, "5102")
	p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > 0 })
}

// fetch is the guest's side of TestActiveOpen.
func fetch(port string) {
	local, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(lt.Guest4, port))
	if err == nil {
		var c net.Conn
		d := net.Dialer{LocalAddr: local, Timeout: 60 * time.Second}
		if c, err = d.Dial("tcp", net.JoinHostPort(lt.Client4, "8000")); err == nil {
			var got []byte
			if got, err = io.ReadAll(c); err == nil {
				want := make([]byte, 2_000_000)
				(&pattern{}).Read(want)
				if bytes.Equal(got, want) {
					fmt.Println(len(got), "right")
					return
				}
				err = fmt.Errorf("%d bytes, wrong", len(got))
			}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// TestCommitPoint: what the PVM sent behind the commit point does not leave with
// what it sent before, but waits for the checkpoint that follows (R14).
func TestCommitPoint(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}")
	p.await("alpha", ready)
	seen := p.capture()
	early, late := p.mustDial(lt.Guest4, portDiffer), p.mustDial(lt.Guest4, portDiffer)
	p.await("alpha", func(s *api.Status) bool { return s.Connections == 2 && s.HeldPackets == 0 })

	// Long before RESUME, so that its last moments lie behind the middle.
	q.SetDelay(qmptest.PrimaryResume, time.Second)
	var (
		resuming, resume = make(chan struct{}), make(chan struct{})
		again, goOn      = make(chan struct{}), make(chan struct{})
		stops, resumes   int
	)
	letResume, letGoOn := sync.OnceFunc(func() { close(resume) }), sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(letResume) // the pair does not close while a hook waits
	t.Cleanup(letGoOn)
	q.SetHook(func(s qmptest.Stage) bool {
		switch s {
		case qmptest.SecondaryStop:
			if stops++; stops == 2 {
				close(again)
				<-goOn
			}
		case qmptest.PrimaryResume:
			if resumes++; resumes == 1 {
				close(resuming)
				<-resume
			}
		}
		return true
	})
	await := func(c chan struct{}, what string) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(20 * time.Second):
			t.Fatal(what)
		}
	}
	fmt.Fprintln(early, "early")
	await(resuming, "the checkpoint did not come to the primary's RESUME")
	held := p.status("alpha").HeldPackets
	fmt.Fprintln(late, "late")
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets > held })
	letResume()

	answer := make([]byte, len("answer of guest pvm\n"))
	if _, err := io.ReadFull(early, answer); err != nil {
		t.Fatalf("the early answer: %v", err)
	}
	await(again, "no second checkpoint followed")
	if n := seen.count("answer of"); n != 1 {
		t.Errorf("%d answers left with the first commit, want the early one", n)
	}
	letGoOn()
	if _, err := io.ReadFull(late, answer); err != nil || string(answer) != "answer of guest pvm\n" {
		t.Errorf("the late answer: %q, %v", answer, err)
	}
}
