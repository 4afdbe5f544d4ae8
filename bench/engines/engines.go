// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
)

// The variants, as the report names them.
const (
	ColoCompare = "QEMU's colo-compare"
	Lockstep    = "lockstep"
)

// Options say what is measured and how long. The zero values of all but Lockstep will do.
type Options struct {
	QEMU     string // the binary; "": qemu-system-x86_64 of the PATH
	Lockstep string // the binary whose daemons are measured
	Rounds   int    // 0: 5
	Quick    bool   // one short round, whose figures mean little
}

// Frames per second at which latencies are measured.
var rates = []int{1000, 10_000, 50_000}

var flowCounts = []int{1, 64}

// plan is what Options come to.
type plan struct {
	rounds int
	span   time.Duration // of each load
	quiet  time.Duration // an engine is taken for stuck after so long without a release
}

func (o *Options) plan() plan {
	if o.Quick {
		return plan{rounds: 1, span: 50 * time.Millisecond, quiet: time.Second}
	}
	p := plan{rounds: 5, span: time.Second, quiet: 3 * time.Second}
	if o.Rounds > 0 {
		p.rounds = o.Rounds
	}
	return p
}

// Run measures both engines in turn. It needs root, a QEMU with colo-compare and a kernel
// that lockstep runs on; what else it needs it makes, in a network namespace of its own. progress
// is told what is being measured. Where an engine does not carry a load the part says so;
// an error means that there is no part.
func Run(ctx context.Context, o Options, progress func(string)) (report.Part, error) {
	if o.QEMU == "" {
		o.QEMU = "qemu-system-x86_64"
	}
	qemu, err := exec.LookPath(o.QEMU)
	if err != nil {
		return report.Part{}, fmt.Errorf("QEMU: %w: install it, or name another with colo-compare", err)
	}
	if o.Lockstep == "" {
		return report.Part{}, errors.New("no lockstep binary to measure: name one")
	}
	dir, err := os.MkdirTemp("", "lockstep-engines-")
	if err != nil {
		return report.Part{}, err
	}
	b := &bench{plan: o.plan(), progress: progress, table: newTable()}
	err = apart(func(ns *lab.NS) (err error) {
		b.streams = synthetic()
		recorded, err := record()
		if err != nil {
			return err
		}
		b.streams = append(b.streams, newStream("recorded transfer", recorded, window/8))
		l, err := newLockstep(ctx, ns, o.Lockstep, dir)
		if err != nil {
			return fmt.Errorf("lockstep: %w", err)
		}
		defer func() { err = errors.Join(err, l.close()) }()
		c, err := newColo(ctx, qemu, dir)
		if err != nil {
			return fmt.Errorf("colo-compare: %w", err)
		}
		defer func() { err = errors.Join(err, c.close()) }()
		b.engines = []variant{{ColoCompare, c}, {Lockstep, l}}
		err = apart(func(*lab.NS) (err error) { // its devices have the names of lockstep's
			f, err := newFloor()
			if err != nil {
				return fmt.Errorf("taps without lockstep: %w", err)
			}
			defer func() { err = errors.Join(err, f.close()) }()
			b.floor = f
			return b.run(ctx)
		})
		if err != nil {
			return err
		}
		b.lost, err = l.lost(ctx)
		return err
	})
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		return report.Part{}, fmt.Errorf("compare engines alone: %w", err)
	}
	b.table.finish()
	return report.Part{
		Name: "B", Title: "compare engines alone",
		Variants: []string{ColoCompare, Lockstep},
		Cases:    b.table.Cases,
		Notes:    b.notes(),
	}, nil
}

// apart runs f in a network namespace of its own, which is gone with everything in it
// when f and the processes that it started have ended, or when this process has. f must
// make what belongs there itself: other goroutines are elsewhere.
func apart(f func(*lab.NS) error) error {
	ns, err := lab.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error { return f(ns) })
}

type variant struct {
	name string
	engine
}

// bench is one run of the part.
type bench struct {
	plan
	progress func(string)
	streams  []*stream
	engines  []variant
	floor    engine
	table    *table
	lost     string // what lockstep had no room for
	frames   int    // that each guest sent through lockstep
}

func (b *bench) run(ctx context.Context) error {
	for _, v := range b.engines {
		if err := b.differing(ctx, v); err != nil {
			return err
		}
	}
	for round := range b.rounds {
		for _, s := range b.streams {
			for _, flows := range flowCounts {
				what := title(s, flows)
				b.progress(fmt.Sprintf("round %d of %d: %s", round+1, b.rounds, what))
				bare, err := drive(ctx, b.floor, load{stream: s, flows: flows, span: b.span, quiet: b.quiet})
				if err == nil && bare.released < bare.fed {
					err = fmt.Errorf("only %d of %d frames came", bare.released, bare.fed)
				}
				if err != nil {
					return fmt.Errorf("%s, taps without lockstep: %w", what, err)
				}
				for _, rate := range append([]int{0}, rates...) {
					for _, v := range b.engines { // in turn, so that disturbances hit both alike
						if err := b.measure(ctx, v, s, flows, rate, bare); err != nil {
							return fmt.Errorf("%s, %s: %w", what, v.name, err)
						}
					}
				}
			}
		}
	}
	return b.countPrograms(ctx)
}

func title(s *stream, flows int) string {
	if flows == 1 {
		return s.name + ", 1 connection"
	}
	return fmt.Sprintf("%s, %d connections", s.name, flows)
}

// differing has an engine show that it compares.
func (b *bench) differing(ctx context.Context, v variant) error {
	b.progress("one differing byte: " + v.name)
	for _, s := range b.streams {
		const same = 5
		out, err := drive(ctx, v.engine, load{stream: s, flows: 1, span: patience, most: 2 * same, wrong: same + 1, quiet: 2 * repeat})
		if err != nil {
			return err
		}
		if out.released != same {
			return fmt.Errorf("%s, %s: released %d of %d frames, of which the one behind the first %d differs: it does not compare, and its figures would mean nothing",
				v.name, s.name, out.released, out.fed, same)
		}
		b.table.add(differGroup, s.name+", released of the frames before it", "", false, v.name, float64(out.released))
		b.table.add(differGroup, s.name+", released of it and those behind it", "", true, v.name, float64(out.released-same))
		if err := v.renew(); err != nil {
			return err
		}
	}
	return nil
}

const differGroup = "one byte of the secondary's copy differs"

// measure drives one load and notes the figures. bare is what became of the stream
// on the taps without lockstep, at saturation.
func (b *bench) measure(ctx context.Context, v variant, s *stream, flows, rate int, bare *outcome) error {
	group, figures := title(s, flows)+", at saturation", saturation
	if rate > 0 {
		group, figures = fmt.Sprintf("%s, %d packets/s", title(s, flows), rate), atRate
	}
	out, err := drive(ctx, v.engine, load{stream: s, flows: flows, rate: rate, span: b.span, quiet: b.quiet})
	if err != nil && !errors.Is(err, errStuck) {
		return err
	}
	if v.name == Lockstep && out != nil {
		b.frames += out.fed
	}
	instead, stuck := b.instead(out, err, rate)
	if instead != "" {
		for _, f := range figures {
			b.table.instead(group, f.name, f.unit, f.less, v.name, instead)
		}
		if stuck {
			return v.renew()
		}
		return nil
	}
	if v.name == Lockstep {
		// What its programs, and the kernel behind them, cost in this process's system calls.
		out.kernel = time.Duration((each(out.harness+out.softirq, out) - each(bare.harness+bare.softirq, bare)) * float64(out.released))
	}
	for _, f := range figures {
		b.table.add(group, f.name, f.unit, f.less, v.name, f.of(out))
	}
	if rate > 0 {
		b.table.latencies(group, atRate[0].name, v.name, out.latencies)
	}
	return nil
}

// instead is what an engine did with a load that it did not carry; "": it did.
func (b *bench) instead(out *outcome, err error, rate int) (what string, stuck bool) {
	switch {
	case err != nil:
		return err.Error(), true
	case out.released < out.fed:
		return fmt.Sprintf("released %d of %d frames, and then none for %v", out.released, out.fed, b.quiet), true
	case rate > 0 && float64(out.fed) < 0.95*float64(rate)*b.span.Seconds():
		return fmt.Sprintf("carried %.0f packets/s", float64(out.released)/max(b.span, out.took).Seconds()), false
	}
	return "", false
}

// countPrograms drives each load once more with the kernel counting its programs' run
// time, which costs time too.
func (b *bench) countPrograms(ctx context.Context) error {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return fmt.Errorf("have the kernel count programs' run time: %w", err)
	}
	defer stats.Close()
	for _, s := range b.streams {
		for _, flows := range flowCounts {
			b.progress("kernel programs: " + title(s, flows))
			group := title(s, flows) + ", at saturation"
			for _, v := range b.engines {
				if v.name == ColoCompare {
					b.table.instead(group, programsName, "ns", true, v.name, "it has none")
					continue
				}
				out, err := drive(ctx, v.engine, load{stream: s, flows: flows, span: b.span, quiet: b.quiet})
				if err != nil && !errors.Is(err, errStuck) {
					return fmt.Errorf("%s, %s: %w", group, v.name, err)
				}
				if instead, _ := b.instead(out, err, 0); instead != "" {
					b.table.instead(group, programsName, "ns", true, v.name, instead)
				} else {
					b.table.add(group, programsName, "ns", true, v.name, each(out.programs, out))
				}
			}
		}
	}
	return nil
}
