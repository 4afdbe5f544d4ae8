// SPDX-License-Identifier: Apache-2.0

// Package demo shows lockstep at work: a pair of real guests under emulation on two hosts, which are
// network namespaces, through two failovers, with a client that does not notice.
package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/control/api"
)

// ServeCommand is the argument of "lockstep demo" with which the guest starts [Serve].
const ServeCommand = "serve"

// Options are what a demo needs of the machine.
type Options struct {
	Lockstep string // path of the binary
	QEMU     string // path of qemu-system-x86_64
	Guest    string // folder of the guest's kernel, as guestimage.Missing wants it
	Keep     bool   // leave the pair running until the context ends

	Say  func(format string, args ...any) // is told each step, as a sentence
	Show func(text string)                // is given longer texts
}

// ErrInterrupted is returned when the context ended before the demo did.
var ErrInterrupted = errors.New("interrupted; what the demo had made is gone")

// Run shows it. It needs root, and leaves nothing behind, however it ends.
func Run(ctx context.Context, o Options) error {
	o.Say("Making two hosts (alpha, beta) and a client, each a network namespace of its own.")
	p, err := newPair(o)
	if err != nil {
		return err
	}
	err = p.show(ctx)
	if err == nil && o.Keep {
		err = p.keep(ctx)
	} else if ctx.Err() != nil {
		err = ErrInterrupted
	}
	return errors.Join(err, p.close())
}

// show is the demo's story.
func (p *pair) show(ctx context.Context) error {
	say := p.o.Say
	say("Starting a daemon on each; they start QEMU (under TCG here), copy the guest's memory, and replicate.")
	if err := errors.Join(p.run("beta", "secondary"), p.run("alpha", "primary")); err != nil {
		return err
	}
	if err := p.covered(ctx); err != nil {
		return err
	}
	say("The pair is up: what the guest says leaves alpha once beta's copy has said the same.")
	say("The guest boots, in both QEMUs.")
	if err := p.answers(ctx); err != nil {
		return err
	}

	c, err := p.dial(ctx, portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	session := StartLoad(2*time.Millisecond, func(i int) error {
		_ = c.SetDeadline(time.Now().Add(goOn)) // or the demo would wait for ever
		return echo(c, i)
	})
	const page = 20000
	web := StartLoad(2*time.Millisecond, func(int) error {
		c, err := p.dial(ctx, portHTTP)
		if err != nil {
			return err
		}
		_ = c.SetDeadline(time.Now().Add(goOn))
		return fetch(c, page)
	})
	err = p.trouble(ctx, session, web)
	answers, sessionErr := session.End()
	pages, webErr := web.End()
	if err = errors.Join(err, sessionErr, webErr); err != nil {
		return err
	}
	say("One TCP session got %d answers and %d pages were loaded, across two dead hosts: none was lost, none was wrong.", answers, pages)
	return nil
}

// trouble is what the two clients do not notice.
func (p *pair) trouble(ctx context.Context, session, web *Load) error {
	say := p.o.Say
	if err := p.goesOn(ctx, session, 100, web, 10); err != nil {
		return err
	}
	say("A client has one long TCP session (%d answers so far), and loads pages (%d so far).", session.Answers.Load(), web.Answers.Load())
	if err := p.differ(ctx); err != nil {
		return err
	}
	primary := "alpha"
	for range 2 {
		survivor := other(primary)
		session.Longest.Store(0)
		q, err := p.qemu(primary)
		if err != nil {
			return err
		}
		pid := q.Pid()
		q.Release()
		if err := p.killQEMU(primary); err != nil {
			return err
		}
		say("kill -9 %d: the QEMU of %s, which clients talk to, is gone.", pid, primary)
		if err := p.goesOn(ctx, session, 50, web, 10); err != nil {
			return err
		}
		say("%s took over. The session goes on, as does the web load; the longest wait for an answer was %v.", survivor,
			time.Duration(session.Longest.Load()).Round(time.Millisecond))
		if err := p.await(ctx, survivor, startUp, func(s *api.Status) bool { return s.State == "solo" }); err != nil {
			return err
		}
		say("%s transmits alone. Starting %s's daemon again, as the secondary: disk and memory are copied.", survivor, primary)
		began := time.Now()
		if err := p.rejoin(ctx, primary); err != nil {
			return err
		}
		if err := p.covered(ctx); err != nil {
			return err
		}
		say("In step again after %.1f s.", time.Since(began).Seconds())
		primary = survivor
	}
	out, err := p.host(primary).Output(p.o.Lockstep, "status", "-c", p.file, "--node", primary)
	if err != nil {
		return err
	}
	say("`lockstep status` on %s:", primary)
	p.o.Show(out)
	return nil
}

// goesOn waits for so many answers more to both clients.
func (p *pair) goesOn(ctx context.Context, session *Load, answers int64, web *Load, pages int64) error {
	answers, pages = answers+session.Answers.Load(), pages+web.Answers.Load()
	deadline, tick := time.NewTimer(goOn), time.NewTicker(20*time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for session.Answers.Load() < answers || web.Answers.Load() < pages {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			return fmt.Errorf("the guest has not answered for %v: %d answers of %d, %d pages of %d", goOn, session.Answers.Load(), answers, web.Answers.Load(), pages)
		}
	}
	return nil
}

// differ asks for what the two guests do not agree on.
func (p *pair) differ(ctx context.Context) error {
	clock, err := p.dial(ctx, portClock)
	if err != nil {
		return err
	}
	defer clock.Close()
	before, err := p.status(ctx, "alpha")
	if err != nil {
		return err
	}
	const requests = 5
	for i := range requests {
		answer, err := ask(clock, fmt.Sprintf("request %d", i))
		if err != nil {
			return err
		}
		p.o.Say("Asking for the guest's clock, which the two copies do not agree on: %q", answer)
	}
	s, err := p.status(ctx, "alpha")
	if err != nil {
		return err
	}
	if len(s.Checkpoints) == 0 {
		return errors.New("answers that differ have cost no checkpoint")
	}
	c := s.Checkpoints[len(s.Checkpoints)-1]
	p.o.Say("%d such answers cost %d checkpoints; the last, because of %q, held the guest's output for %.1f ms.", requests, s.CheckpointsDone-before.CheckpointsDone, c.Cause, c.FrozenMS)
	return nil
}

// ask sends a line and returns the answer's.
func ask(c net.Conn, line string) (string, error) {
	_ = c.SetDeadline(time.Now().Add(goOn))
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	b := make([]byte, 200)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), err
}

// rejoin has a node follow the other one, once its daemon has ended.
func (p *pair) rejoin(ctx context.Context, node string) error {
	select {
	case <-p.daemons[node].Ended():
	case <-time.After(startUp):
		return fmt.Errorf("the daemon of %s does not end, though its QEMU is gone; its log:\n%s", node, p.daemons[node].Log())
	case <-ctx.Done():
		return ctx.Err()
	}
	return p.run(node, "secondary")
}

// keep leaves the pair running until the context ends, and has a node whose daemon ends follow
// the other one again.
func (p *pair) keep(ctx context.Context) error {
	p.o.Say("The pair goes on. To look, from another terminal, as root:")
	p.o.Show(fmt.Sprintf(`    %[1]s top -c %[2]s --node alpha

The other node is beta; status, flows and events go the same way. To be the client:

    nsenter --net=%[3]s curl http://%[4]s/100

To have a guest die; the other host takes over, and the demo starts the dead one again:

    kill -9 $(cat %[5]s)
    kill -9 $(cat %[6]s)

^C here ends it, and leaves nothing behind.
`, p.o.Lockstep, p.file, p.Client.Path(), lab.GuestIP, p.in("run/"+vm+"-alpha.pid"), p.in("run/"+vm+"-beta.pid")))
	for {
		var node string
		select {
		case <-ctx.Done():
			p.o.Say("Ending both guests and daemons.")
			return nil
		case <-p.daemons["alpha"].Ended():
			node = "alpha"
		case <-p.daemons["beta"].Ended():
			node = "beta"
		}
		p.o.Say("The daemon of %s has ended. Starting it again, as the secondary.", node)
		if err := p.run(node, "secondary"); err != nil {
			return err
		}
		select { // one that fails at once is not started a hundred times a second
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}
