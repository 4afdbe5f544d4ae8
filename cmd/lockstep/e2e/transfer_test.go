// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestTransfer: deterministic services through lockstep are right byte for byte,
// ask for no checkpoint and leave nothing behind. The SVM's numbers are skewed;
// over VXLAN it segments differently as well.
func TestTransfer(t *testing.T) {
	for name, peer := range map[string]lt.Peer{"veth": lt.Veth, "vxlan": lt.VXLAN} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, peer, "", "", "")
			if peer == lt.VXLAN {
				p.SegmentDifferently(t)
			}
			for family, host := range map[string]string{"v4": lt.Guest4, "v6": lt.Guest6} {
				t.Run(family+"/source", func(t *testing.T) { p.with(t).source(host, 10_000_000) })
				t.Run(family+"/sink", func(t *testing.T) { p.with(t).sink(host, 10_000_000) })
				t.Run(family+"/both-ways", func(t *testing.T) { p.with(t).bothWays(host, 10_000_000) })
				t.Run(family+"/keepalive", func(t *testing.T) { p.with(t).keepAlive(host, 10_000) })
				t.Run(family+"/cut", func(t *testing.T) { p.with(t).cuts(host) })
			}
			t.Run("ahead", func(t *testing.T) { p.with(t).ahead(lt.Guest4) })
			t.Run("connections", func(t *testing.T) { p.with(t).connections(10_000, 8) })
			t.Run("at-once", func(t *testing.T) { p.with(t).atOnce(1000) })
			s := p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 && s.HeldPackets == 0 })
			if s.CheckpointsRequested != 0 {
				t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
			}
			p.await("beta", func(s *api.Status) bool { return s.Connections == 0 })
			if out, in, wrapping := p.Skew.Counts(t); out == 0 || in == 0 || wrapping == 0 {
				t.Errorf("the skew did nothing: %d out, %d in, %d wrapping", out, in, wrapping)
			}
		})
	}
}

// with is the pair for a sub-test.
func (p *pair) with(t *testing.T) *pair {
	q := *p
	q.t = t
	return &q
}

func (p *pair) source(host string, n int64) {
	p.t.Helper()
	c := p.mustDial(host, portSource)
	fmt.Fprintln(c, n)
	p.expectPattern(c, n)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		p.t.Fatalf("after the last byte: %v, want EOF", err)
	}
}

// expectPattern reads n bytes of a fresh pattern.
func (p *pair) expectPattern(r io.Reader, n int64) {
	p.t.Helper()
	if err := readPattern(r, n); err != nil {
		p.t.Fatal(err)
	}
}

func readPattern(r io.Reader, n int64) error {
	var (
		want = &pattern{}
		a    = make([]byte, 1<<16)
		b    = make([]byte, 1<<16)
	)
	for left := n; left > 0; {
		k := min(left, int64(len(a)))
		m, err := io.ReadFull(r, a[:k])
		if err != nil {
			return fmt.Errorf("%d of %d bytes missing: %w", left-int64(m), n, err)
		}
		want.Read(b[:k])
		if !bytes.Equal(a[:k], b[:k]) {
			return fmt.Errorf("bytes differ in the block at %d", n-left)
		}
		left -= k
	}
	return nil
}

func (p *pair) sink(host string, n int64) {
	p.t.Helper()
	c := p.mustDial(host, portSink)
	if _, err := io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n)); err != nil {
		p.t.Fatal(err)
	}
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if want := fmt.Sprintf("OK %d\n", n); err != nil || string(got) != want {
		p.t.Fatalf("%q, %v; want %q", got, err, want)
	}
}

// bothWays sends and receives n bytes at the same time.
func (p *pair) bothWays(host string, n int64) {
	p.t.Helper()
	c := p.mustDial(host, portEcho)
	var sender sync.WaitGroup
	sender.Go(func() {
		if _, err := io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, n)); err != nil {
			p.t.Error(err)
		}
	})
	defer sender.Wait()
	p.expectPattern(c, n)
}

// echo sends one request and reads its echo.
func echo(c net.Conn, i int) error {
	req := fmt.Appendf(nil, "request %d\n", i)
	if _, err := c.Write(req); err != nil {
		return err
	}
	got := make([]byte, len(req))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, req) {
		return fmt.Errorf("%q came back as %q", req, got)
	}
	return nil
}

func (p *pair) keepAlive(host string, n int) {
	p.t.Helper()
	c := p.mustDial(host, portEcho)
	for i := range n {
		if err := echo(c, i); err != nil {
			p.t.Fatalf("request %d: %v", i, err)
		}
	}
}

// cuts: the guests cut the same bytes in different places.
func (p *pair) cuts(host string) {
	p.t.Helper()
	c := p.mustDial(host, portCut)
	for _, x := range []struct{ pvm, svm, n int }{
		{200, 1200, 1200}, {1200, 200, 1200}, {100, 65536, 300_000}, {65536, 100, 300_000}, {1, 65536, 5000}, {65536, 1, 5000},
	} {
		fmt.Fprintf(c, "%d,%d %d\n", x.pvm, x.svm, x.n)
		p.expectPattern(c, int64(x.n))
	}
}

// ahead: one guest is ahead of the other by as much as the window lets it.
func (p *pair) ahead(host string) {
	p.t.Helper()
	c := p.mustDial(host, portAhead)
	for _, first := range []string{"pvm", "svm"} {
		for _, n := range []int64{200, 60_000, 1_000_000} {
			fmt.Fprintln(c, first, n)
			p.expectPattern(c, n)
		}
	}
}

// dialNth takes the client's addresses in turn, one in five of IPv6.
func (p *pair) dialNth(i int) (*net.TCPConn, error) {
	if i %= len(lt.ClientAddrs4) + 1; i < len(lt.ClientAddrs4) {
		return p.dial(lt.Guest4, portEcho, lt.ClientAddrs4[i])
	}
	return p.dial(lt.Guest6, portEcho, lt.Client6)
}

// connections makes n connections one after the other, side by side in lanes.
func (p *pair) connections(n, lanes int) {
	p.t.Helper()
	var wg sync.WaitGroup
	for lane := range lanes {
		wg.Go(func() {
			for i := range n / lanes {
				c, err := p.dialNth(i)
				if err == nil {
					err = echo(c, i)
					c.Close()
				}
				if err != nil {
					p.t.Errorf("lane %d, connection %d: %v", lane, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (p *pair) atOnce(n int) {
	p.t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := p.dialNth(i)
		if err != nil {
			p.t.Fatalf("connection %d: %v", i, err)
		}
		defer c.Close()
		conns[i] = c
	}
	for round := range 3 {
		for i, c := range conns {
			if err := echo(c, round*n+i); err != nil {
				p.t.Fatalf("connection %d: %v", i, err)
			}
		}
	}
}
