// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// hosted is how a node's daemon is started.
type hosted struct{ node, ns, role string }

func (p *pair) alpha() hosted { return hosted{"alpha", p.HostP, "primary"} }
func (p *pair) beta() hosted  { return hosted{"beta", p.HostS, "secondary"} }

// restart kills daemons and starts them again over their pins.
func (p *pair) restart(nodes ...hosted) {
	p.t.Helper()
	for _, x := range nodes {
		p.kill(x.node)
	}
	if len(nodes) == 1 && nodes[0].node == "beta" {
		p.await("alpha", func(s *api.Status) bool { return !s.Peer.Connected })
	}
	for _, x := range nodes {
		p.daemon(x.node, x.ns, x.role)
	}
	p.await("alpha", func(s *api.Status) bool { return ready(s) && s.Peer.Connected })
	p.await("beta", func(s *api.Status) bool { return s.State == "replicating" && s.Peer.Connected })
}

// TestRestart: a daemon that was killed and started again goes on from its own
// tables, in the same epoch: connections live on and no checkpoint is asked for.
func TestRestart(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}")
	p.await("alpha", ready)
	c := p.mustDial(lt.Guest4, portEcho)
	for i, nodes := range [][]hosted{{p.alpha()}, {p.beta()}, {p.beta(), p.alpha()}} {
		if err := echo(c, i); err != nil {
			t.Fatal(err)
		}
		p.restart(nodes...)
		if err := echo(c, i); err != nil {
			t.Fatalf("after %v died: %v", nodes, err)
		}
		p.keepAlive(lt.Guest4, 100)
		p.keepAlive(lt.Guest6, 100)
		if s := p.status("alpha"); s.Term != uint32(i+2) || s.Epoch != 1 {
			t.Errorf("after %v died: term %d, epoch %d", nodes, s.Term, s.Epoch)
		}
	}
	if n := q.Checkpoints(); n != 0 {
		t.Errorf("%d checkpoints, though all tables were whole", n)
	}
}

// gate lets a stream through up to half, where it waits until it is opened.
type gate struct {
	beginsAt, half int64
	begun          func() // called at beginsAt
	open           chan struct{}
	pos            int64
}

// pass counts n bytes.
func (g *gate) pass(n int) {
	before := g.pos
	g.pos += int64(n)
	if before < g.beginsAt && g.pos >= g.beginsAt {
		g.begun()
	}
	if before < g.half && g.pos >= g.half {
		<-g.open
	}
}

type gatedReader struct {
	io.Reader
	*gate
}

func (r gatedReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	r.pass(n)
	return n, err
}

// TestRestartInTransfer: daemons die with kill -9 in the middle of transfers both
// ways; all bytes arrive, right, and whole tables need no checkpoint.
// The timeout is long: while a daemon is away the guests' retransmission timers grow,
// beyond the default one's second, and the checkpoint that R7 then asks for would be
// one of these QEMUs, which copy no state.
func TestRestartInTransfer(t *testing.T) {
	const size = 20_000_000
	for _, who := range []string{"primary", "secondary", "both"} {
		t.Run(who, func(t *testing.T) {
			q := qemuPair(t)
			p := newPair(t, lt.Veth, q.Primary.Path(), q.Secondary.Path(), "checkpoint: {period: 1h}\ncompare: {timeout: 10s}")
			p.await("alpha", ready)
			nodes := map[string][]hosted{"primary": {p.alpha()}, "secondary": {p.beta()}, "both": {p.alpha(), p.beta()}}[who]

			var begun, transfers sync.WaitGroup
			back := make(chan struct{}) // closed when the daemons are
			open := sync.OnceFunc(func() { close(back) })
			defer transfers.Wait()
			defer open()
			newGate := func() *gate {
				begun.Add(1)
				return &gate{beginsAt: size / 4, half: size / 2, open: back, begun: begun.Done}
			}
			down, up, alive := p.mustDial(lt.Guest4, portSource), p.mustDial(lt.Guest6, portSink), p.mustDial(lt.Guest4, portEcho)
			in, out := newGate(), newGate()
			transfers.Go(func() {
				fmt.Fprintln(down, size)
				got := make([]byte, size)
				want := make([]byte, size)
				(&pattern{}).Read(want)
				if n, err := io.ReadFull(gatedReader{down, in}, got); err != nil {
					t.Errorf("%d bytes from the guest, then %v", n, err)
				} else if !bytes.Equal(got, want) {
					t.Error("bytes from the guest are wrong")
				}
			})
			transfers.Go(func() {
				if n, err := io.Copy(onlyWriter{up}, gatedReader{io.LimitReader(&pattern{}, size), out}); err != nil {
					t.Errorf("%d bytes to the guest, then %v", n, err)
					return
				}
				up.CloseWrite()
				if got, err := io.ReadAll(up); err != nil || string(got) != fmt.Sprintf("OK %d\n", size) {
					t.Errorf("the guest answered %q, %v", got, err)
				}
			})
			transfers.Go(func() {
				for i := 0; ; i++ {
					if err := echo(alive, i); err != nil {
						t.Errorf("keep-alive session, request %d: %v", i, err)
						return
					}
					select {
					case <-back:
						return
					default:
					}
				}
			})
			begun.Wait()
			p.restart(nodes...)
			open()
			transfers.Wait()
			if err := echo(alive, -1); err != nil {
				t.Error(err)
			}
			if n := q.Checkpoints(); n != 0 {
				t.Errorf("%d checkpoints, though all tables were whole: %+v", n, p.status("alpha").Causes)
			}
		})
	}
}

// TestUpgradeCheck: whether a running daemon's tables can be taken over is reported, with
// both sides named, and nothing changes.
func TestUpgradeCheck(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	upgrade := func() (string, error) {
		out, err := p.lockstepIn(p.HostP, "upgrade", "-c", p.config, "--node", "alpha").CombinedOutput()
		return string(out), err
	}
	if out, err := upgrade(); err != nil || !strings.Contains(out, "can take over web1 on alpha") {
		t.Errorf("%v\n%s", err, out)
	}
	p.keepAlive(lt.Guest4, 10)
	yaml, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.config, append(yaml, "compare: {slots: 4096}\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := upgrade(); err == nil || !strings.Contains(out, "with slots 16384") || !strings.Contains(out, "with slots 4096") {
		t.Errorf("%v\n%s", err, out)
	}
	p.keepAlive(lt.Guest4, 10)
}

// foreign attaches another program to the primary's tap.
func (p *pair) foreign(where link.Anchor, verdict int32) link.Link {
	p.t.Helper()
	return attach(p, p.HostP, "tapP", ebpf.AttachTCXIngress, where, asm.Mov.Imm(asm.R0, verdict), asm.Return())
}

// attach attaches a program of these instructions to a device of namespace ns.
func attach(p *pair, ns, device string, at ebpf.AttachType, where link.Anchor, instructions ...asm.Instruction) link.Link {
	p.t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "foreign", Type: ebpf.SchedCLS, License: "GPL", Instructions: instructions})
	if err != nil {
		p.t.Fatal(err)
	}
	defer prog.Close()
	var l link.Link
	index := lt.Index(p.t, ns, device)
	lt.In(p.t, ns, func() {
		if l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: at, Anchor: where}); err != nil {
			p.t.Fatal(err)
		}
	})
	p.t.Cleanup(func() { l.Close() })
	return l
}

// TestForeignProgram: what is behind lockstep's programs works on; what gets in front
// could let frames out, so the guest is muted until it is gone.
func TestForeignProgram(t *testing.T) {
	const pass, drop = 0, 2
	p := newPair(t, lt.Veth, "", "", "")
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 0); err != nil {
		t.Fatal(err)
	}
	seen := p.capture()
	firewall := p.foreign(link.Tail(), drop)
	fmt.Fprintln(c, "behind")
	p.await("alpha", func(s *api.Status) bool { return s.Counters["released_out"] > 2 && s.Detail == "" })
	if n := seen.count("behind"); n != 0 {
		t.Errorf("%d frames passed the firewall behind", n)
	}
	firewall.Close()
	if got, err := io.ReadAll(io.LimitReader(c, 7)); err != nil || string(got) != "behind\n" {
		t.Fatalf("without the firewall: %q, %v", got, err)
	}

	front := p.foreign(link.Head(), pass)
	s := p.await("alpha", func(s *api.Status) bool { return strings.Contains(s.Detail, "program foreign") })
	if !strings.Contains(s.Detail, "in front of ls_pri_out on tapP") || s.Counters["intruded"] != 1 {
		t.Errorf("status %+v", s)
	}
	fmt.Fprintln(c, "in front")
	shut := s.Counters["shut"]
	p.await("alpha", func(s *api.Status) bool { return s.Counters["shut"] > shut || s.Detail != "" })
	if n := seen.count("in front"); n != 0 {
		t.Errorf("%d frames left past lockstep", n)
	}
	front.Close()
	p.await("alpha", func(s *api.Status) bool { return s.Detail == "" })
	if got, err := io.ReadAll(io.LimitReader(c, 9)); err != nil || string(got) != "in front\n" {
		t.Errorf("after it was gone: %q, %v", got, err)
	}
}
