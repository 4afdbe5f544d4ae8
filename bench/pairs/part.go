// SPDX-License-Identifier: Apache-2.0

// Package pairs is part C of the benchmark: real guests under emulation (TCG), one alone, a pair behind
// QEMU's own proxy, and a pair of lockstep's. What a client sees of each, how long a checkpoint
// stops the guest, and how long a client waits when a host dies. They take turns, and no two run
// at the same time.
package pairs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
)

// variant is what is compared.
type variant struct {
	name   string
	stages []stage
	lacks  func(k key) string // why it has no figure of a case that is not among its steps
}

// stage is a guest or pair that is started anew, and what is done with it.
type stage struct {
	start func(context.Context, *world) (*pair, error)
	steps []step
}

func variants(o lab.Options) []variant {
	vs := []variant{
		{"no COLO", []stage{{alone, jobs(o)}}, func(key) string { return "has no second guest" }},
		{"QEMU's COLO", []stage{
			{colo(overTCP), slices.Concat(jobs(o), pauses(o, tcp), []step{gap(o, primaryQEMU)})},
			{colo(overUnix), slices.Concat(pauses(o, unixSocket), []step{gap(o, secondaryQEMU)})},
		}, func(k key) string {
			switch {
			case k.group == ratios:
				return "has no round with both"
			case k.group == target:
				return "has no such setting"
			case k.name == primaryHost:
				return "has nothing but its QEMU on a host: the same as when that dies"
			case strings.Contains(k.name, "output held"):
				return "does not report for how long"
			}
			return "was set up as its documentation has it, without TLS, and without a disk"
		}},
		{"lockstep", []stage{
			{lockstep(settings{}), slices.Concat(jobs(o), pauses(o, tcpTLS), []step{gap(o, primaryQEMU)})},
			{lockstep(settings{clear: true}), slices.Concat(pauses(o, tcp), []step{gap(o, secondaryQEMU)})},
			{lockstep(settings{clear: true, more: "migration: {unix: migration.sock}"}), slices.Concat(pauses(o, unixSocket), []step{gap(o, primaryHost)})},
			{lockstep(settings{more: fmt.Sprintf("checkpoint: {period: 1s, target_pause: %v}", targetPause)}), []step{targeted(o)}},
			{lockstep(settings{disk: true}), pauses(o, tcpTLSDisk)},
		}, func(key) string { return "was not measured" }},
	}
	for i := range vs {
		for j := range vs[i].stages {
			s := &vs[i].stages[j]
			s.steps = slices.DeleteFunc(s.steps, func(s step) bool { return !strings.Contains(s.what, o.Only) })
		}
		vs[i].stages = slices.DeleteFunc(vs[i].stages, func(s stage) bool { return len(s.steps) == 0 })
	}
	return vs
}

// Part measures.
func Part(ctx context.Context, o lab.Options, progress lab.Progress) (part report.Part, err error) {
	part = report.Part{Name: "C", Title: "real guests under emulation (TCG)", Notes: notes}
	vs := variants(o)
	total := 0
	for _, v := range vs {
		part.Variants = append(part.Variants, v.name)
		for _, s := range v.stages {
			total += o.Rounds * (len(s.steps) + 1)
		}
	}
	if total == 0 {
		return part, fmt.Errorf("%q: %w", o.Only, lab.ErrNoMatch)
	}
	g, err := newGuest(o)
	if err != nil {
		return part, err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	rs := newResults(vs)
	done := 0
	for round := range o.Rounds {
		for _, v := range vs {
			for _, s := range v.stages {
				before := done
				tell := func(what string) {
					progress(min(done, before+len(s.steps)), total, fmt.Sprintf("part C, round %d of %d, %s: %s", round+1, o.Rounds, v.name, what))
					done++
				}
				if err := s.turn(ctx, g, tell, rs.of(v.name)); err != nil {
					return part, fmt.Errorf("%s: %w", v.name, err)
				}
				done = before + len(s.steps) + 1
			}
		}
	}
	part.Cases = rs.finish(o.Rounds)
	return part, nil
}

// tries is how often a pair is started until it is given up: under emulation one now and then does not
// come up.
const tries = 2

// begin starts the stage's pair, in a world of its own.
func (s *stage) begin(ctx context.Context, g *guest) (p *pair, err error) {
	for range tries {
		w, e := g.world()
		if e != nil {
			return nil, e
		}
		if p, e = s.start(ctx, w); e == nil {
			if e = p.settle(ctx); e == nil {
				return p, nil
			}
			e = errors.Join(e, p.stop())
		}
		err = errors.Join(err, e, w.close())
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// settle makes a checkpoint: the first since the guest booted has all its memory to copy.
func (p *pair) settle(ctx context.Context) error {
	if p.checkpoint == nil {
		return nil
	}
	_, err := p.checkpoint(ctx)
	return err
}

func (p *pair) end() error { return errors.Join(p.stop(), p.close()) }

// turn does the stage's steps, and starts anew after one that went wrong: what is left of it would
// be in the way of the next.
func (s *stage) turn(ctx context.Context, g *guest, tell func(string), rs *series) (err error) {
	var p *pair
	defer func() {
		if p != nil {
			err = errors.Join(err, p.end())
		}
	}()
	for i := range s.steps {
		st := &s.steps[i]
		if p == nil {
			tell("start")
			p, err = s.begin(ctx, g)
			if ctx.Err() != nil {
				return errors.Join(err, ctx.Err())
			}
			if err != nil {
				for _, st := range s.steps[i:] {
					rs.instead(st.of, "did not start: "+lab.Short(err.Error()))
				}
				return nil
			}
		}
		tell(st.what)
		instead, err := st.run(ctx, p, rs.put)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			instead = lab.Short(err.Error()) + "; " + p.trouble()
		}
		if instead != "" {
			rs.instead(st.of, instead)
			ended := p.end()
			p = nil
			if ended != nil {
				return ended
			}
		}
	}
	return nil
}
