// SPDX-License-Identifier: Apache-2.0

package scale

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
	"github.com/lockstep-ft/lockstep/compare"
)

// limits measures what happens where slots are few: what has no slot is dropped, and the guest sends it again.
func (b *bench) limits(ctx context.Context) error {
	bulk, exchanges := 256<<20, b.many
	slots, gso := []int{16, 64, 256, 16_384}, []int{16, 64, 256, 1024}
	if b.o.Quick {
		bulk, slots, gso = 4<<20, []int{16, 16_384}, []int{16, 1024}
	}
	job := workload.Job{Size: workload.Message, Stall: 3 * time.Second, Limit: 6 * time.Second}
	for _, l := range []struct {
		group, of, setting string
		sizes              []int
		rate               string
		unit               string
		job                workload.Job
		amount             func(done int) float64 // in units, of which there are so many a second
		per                float64                // done, for which losses are told
		perName            string
	}{
		{"exchanges on 64 connections with few slots", "slots", "compare: {timeout: 10s, slots: %d}", slots, "exchanges", "1/s",
			workload.Job{Do: workload.Echo, Conns: 64, N: exchanges}, func(done int) float64 { return float64(done) }, 1000, "1000 exchanges"},
		{"bulk to the client, GSO, with few slots for GSO", "slots", "compare: {timeout: 10s, gso_slots: %d}", gso, "throughput", "Gbit/s",
			workload.Job{Do: workload.Source, Conns: 1, N: bulk, Size: 128 << 10}, func(done int) float64 { return 8 * float64(done) / 1e9 }, 64 << 20, "64 MiB"},
	} {
		for _, size := range l.sizes {
			for round := range b.fewRounds() {
				b.progress(fmt.Sprintf("%s: %s, round %d of %d", l.group, count(size), round+1, b.fewRounds()))
				j := l.job
				j.Stall, j.Limit = job.Stall, job.Limit
				if j.Size == 0 {
					j.Size = job.Size
				}
				r, lost, asked, err := b.limited(ctx, fmt.Sprintf(l.setting, size), j)
				if err != nil {
					return fmt.Errorf("%s, %d slots: %w", l.group, size, err)
				}
				at := func(name, unit string, less bool) report.Case {
					return figure(l.group+": "+name, unit, less, size, l.of)
				}
				const others = "it has no slots"
				b.alone(at(l.rate, l.unit, false), l.amount(r.Done)/r.Wall.Seconds(), others)
				b.alone(at("arrived", "%", false), 100*float64(r.Done)/float64(j.N), others)
				b.alone(at("checkpoints that it asked for", "", true), float64(asked), others)
				if r.Done < j.N {
					what := r.Stalled
					if what == "" {
						what = "so far within " + j.Limit.String()
					}
					b.cases.Instead(at("arrived", "%", false), lockstep, what)
				}
				b.alone(at("frames dropped for want of a slot, of "+l.perName, "", true), float64(lost)*l.per/float64(max(1, r.Done)), others)
			}
		}
	}
	return nil
}

// limited does a job through a pair with these settings. lost are the frames that its primary dropped meanwhile, asked
// the checkpoints that it asked for.
func (b *bench) limited(ctx context.Context, settings string, j workload.Job) (r workload.Result, lost, asked uint64, err error) {
	// Not that of the round before: what did not get through there, its guests would go on sending.
	w, err := lab.NewWorld(false)
	if err != nil {
		return r, 0, 0, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Start(1); err != nil {
		return r, 0, 0, err
	}
	defer func() { err = errors.Join(err, w.Stop()) }()
	p, err := startPlain(ctx, w, b.o.Lockstep, settings)
	if err != nil {
		return r, 0, 0, err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	before, err := p.Status(ctx, "alpha")
	if err != nil {
		return r, 0, 0, err
	}
	if r, err = w.Clients[0].Do(ctx, &j, func() {}); err != nil {
		return r, 0, 0, err
	}
	after, err := p.Status(ctx, "alpha")
	if err != nil {
		return r, 0, 0, err
	}
	for _, reason := range []string{"no_slot", compare.ReasonNoRoom.String()} {
		lost += after.Dropped[reason] - before.Dropped[reason]
	}
	return r, lost, after.CheckpointsRequested - before.CheckpointsRequested, nil
}
