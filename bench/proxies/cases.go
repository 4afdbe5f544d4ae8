// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	"github.com/lockstep-ft/lockstep/bench/workload"
)

// measure is a job, and what is read from it.
type measure struct {
	what    string
	job     workload.Job
	figures []figure
}

// figure becomes a case of the report.
type figure struct {
	report.Case
	cdf     bool // has the latencies too
	counted bool // is taken while the kernel counts its programs' run time, which costs time itself
	// of is the figure in the case's unit, or why there is none.
	of func(v *variant, r *run) (value float64, instead string)
}

// Units of the figures.
const (
	µs        = "µs"
	perSecond = "1/s"
	gbits     = "Gbit/s"
	octets    = "B"
	percent   = "%"
)

const (
	block = 64 << 10 // bytes of which CPU is told
	mega  = 1e6      // bytes of which wake-ups are told
)

// through is what a case is about: how much more there is of it in a bulk job.
func through(r *run) float64 { return float64(r.result.Done) }

func per(size float64) func(r *run) float64 {
	return func(r *run) float64 { return through(r) / size }
}

func measures(o lab.Options, slow bool) []measure {
	// A whole round takes some seconds on each variant.
	n := func(quick, whole int) int {
		if o.Quick {
			return quick
		}
		return whole
	}
	bulk := n(4<<20, 1<<30)
	if slow && !o.Quick {
		bulk /= 8
	}
	job := func(do workload.Do, conns, count, size int) workload.Job {
		j := workload.Job{Do: do, Conns: conns, N: count, Size: size, Stall: 5 * time.Second, Limit: 20 * time.Second}
		switch {
		case o.Quick && slow: // what stalls is reported
			j.Stall, j.Limit = time.Second, 2*time.Second
		case o.Quick:
			j.Stall, j.Limit = 5*time.Second, 4*time.Second
		}
		return j
	}
	one, many := "request/response, 1 connection", "request/response, 64 connections"
	conns, small, fetch := "new connections: connect, exchange, close", "small packets", "transfers of 1 MiB to the client, a connection each"
	out, in := "guest to client", "client to guest"
	// Short requests with several of them under way. Each response is a write of its own, which the
	// guests' TCP puts together as the remote's ACKs come: seldom both in the same way.
	pipelined := func(name string, under, piece int, nagle bool) measure {
		j := job(workload.Pipeline, 1, n(500, 20_000), 32)
		j.Under, j.Nagle, j.Piece = under, nagle, piece
		return measure{"pipelined, " + name, j, []figure{rate("pipelined requests, 1 connection, service without TCP_NODELAY", name)}}
	}
	all := []measure{
		{one, job(workload.Echo, 1, n(200, 10_000), workload.Message), slices.Concat(
			latencies(one), []figure{rate(one, "exchanges")}, cpu("CPU per exchange, 1 connection", through), peerLink("peer link, per exchange", through), waits("wake-ups, per exchange, 1 connection", through))},
		{many, job(workload.Echo, 64, n(1000, 50_000), workload.Message), slices.Concat(
			latencies(many), []figure{rate(many, "exchanges")}, cpu("CPU per exchange, 64 connections", through), waits("wake-ups, per exchange, 64 connections", through))},
		{conns, job(workload.Connect, 1, n(20, 1000), workload.Message), append(latencies(conns), rate(conns, "connections"))},
		{"bulk, " + out, job(workload.Source, 1, bulk, 128<<10), slices.Concat(
			[]figure{bandwidth(out)}, cpu("CPU per 64 KiB, "+out, per(block)), peerLink("peer link, per byte "+out, through), frameSizes("frames, bulk "+out), waits("wake-ups, per MB "+out, per(mega)))},
		{"bulk, " + in, job(workload.Sink, 1, bulk, 128<<10), slices.Concat(
			[]figure{bandwidth(in)}, cpu("CPU per 64 KiB, "+in, per(block)), peerLink("peer link, per byte "+in, through), waits("wake-ups, per MB "+in, per(mega)))},
		{fetch, job(workload.Fetch, 1, n(10, 200), 128<<10), append(latencies(fetch), figure{
			Case: report.Case{Group: fetch, Name: "throughput", Unit: gbits}, of: func(_ *variant, r *run) (float64, string) {
				return 8 * workload.FetchSize * through(r) / r.result.Wall.Seconds() / 1e9, ""
			}})},
		{"small writes", job(workload.Source, 1, n(500, 200_000)*workload.Message, workload.Message), []figure{
			{Case: report.Case{Group: small, Name: "TCP, guest to client, writes of 100 B", Unit: perSecond}, of: func(_ *variant, r *run) (float64, string) {
				return through(r) / workload.Message / r.result.Wall.Seconds(), ""
			}}}},
		pipelined("1 under way", 1, 0, false),
		pipelined("3 under way", 3, 0, false),
		pipelined("10 under way", 10, 0, false),
		pipelined("50 under way", 50, 0, false),
		pipelined("10 under way, client without TCP_NODELAY", 10, 0, true),
		pipelined("50 under way, client without TCP_NODELAY", 50, 0, true),
		pipelined("10 under way, writes of 1 byte", 10, 1, false),
		{"datagrams", job(workload.UDP, 32, n(200, 50_000), workload.Message), []figure{
			rate(small, "UDP, 100 B there and back, 32 under way"),
			{Case: report.Case{Group: small, Name: "UDP, lost", Unit: percent, Less: true}, of: func(_ *variant, r *run) (float64, string) {
				return 100 * float64(r.result.Lost) / float64(r.result.Lost+r.result.Done), ""
			}}}},
	}
	return slices.DeleteFunc(all, func(m measure) bool { return !strings.Contains(m.what, o.Only) })
}

// latencies are those of exchanges.
func latencies(group string) []figure {
	var fs []figure
	for _, q := range []struct {
		name  string
		share float64
	}{{"p50", 0.5}, {"p99", 0.99}, {"p99.9", 0.999}} {
		fs = append(fs, figure{Case: report.Case{Group: group, Name: q.name, Unit: µs, Less: true}, cdf: q.share == 0.5,
			of: func(_ *variant, r *run) (float64, string) {
				return float64(r.result.Took[int(q.share*float64(len(r.result.Took)-1))]) / 1e3, ""
			}})
	}
	return fs
}

func rate(group, name string) figure {
	return figure{Case: report.Case{Group: group, Name: name, Unit: perSecond}, of: func(_ *variant, r *run) (float64, string) {
		return through(r) / r.result.Wall.Seconds(), ""
	}}
}

func bandwidth(name string) figure {
	return figure{Case: report.Case{Group: "bulk, one connection, GSO", Name: name, Unit: gbits}, of: func(_ *variant, r *run) (float64, string) {
		return 8 * through(r) / r.result.Wall.Seconds() / 1e9, ""
	}}
}

// cpu is the CPU time of each party for one of what of counts.
func cpu(group string, of func(*run) float64) []figure {
	c := func(name string, stack bool) report.Case {
		return report.Case{Group: group, Name: name, Unit: µs, Less: true, Stack: stack}
	}
	each := func(t func(r *run) time.Duration) func(*variant, *run) (float64, string) {
		return func(_ *variant, r *run) (float64, string) { return float64(t(r)) / 1e3 / of(r), "" }
	}
	fs := []figure{{Case: c("all parties", false), of: each(func(r *run) time.Duration { return r.all() })}}
	for _, party := range parties {
		fs = append(fs, figure{Case: c(party, true), of: each(func(r *run) time.Duration { return r.cpu[party] })})
	}
	return append(fs,
		figure{Case: c("kernel programs, part of the above", false), counted: true, of: func(v *variant, r *run) (float64, string) {
			if v.taps {
				return 0, "has no kernel programs"
			}
			return float64(r.programs) / 1e3 / of(r), ""
		}},
		figure{Case: c("softirq by ticks, mostly part of the above", false), of: each(func(r *run) time.Duration { return r.softirq })},
		figure{Case: c("the rest of the machine, by ticks", false), of: each(func(r *run) time.Duration { return max(0, r.busy-r.all()) })},
		figure{Case: c("idle, by ticks", false), of: each(func(r *run) time.Duration { return r.idle })},
	)
}

// peerLink is what crosses the link between the hosts for one of what of counts.
func peerLink(group string, of func(*run) float64) []figure {
	c := func(name string, n func(*run) uint64) figure {
		return figure{Case: report.Case{Group: group, Name: name, Unit: octets, Less: true}, of: func(v *variant, r *run) (float64, string) {
			if v.alone {
				return 0, "has no second guest"
			}
			return float64(n(r)) / of(r), ""
		}}
	}
	return []figure{
		c("P to S", func(r *run) uint64 { return r.toS }),
		c("S to P", func(r *run) uint64 { return r.toP }),
	}
}

// frameSizes are those of what the client receives.
func frameSizes(group string) []figure {
	return []figure{
		{Case: report.Case{Group: group, Name: "mean size at the client", Unit: octets}, of: func(_ *variant, r *run) (float64, string) {
			return float64(r.rx) / float64(max(1, r.packets)), ""
		}},
		{Case: report.Case{Group: group, Name: "more frames by cutting", Unit: percent, Less: true}, of: func(v *variant, r *run) (float64, string) {
			if v.proxy.frames == nil {
				return 0, "does not count what it cuts"
			}
			// Frames that were dropped, or that left after the last look, make it less than it was.
			cut := max(0, float64(r.frames.released)-float64(r.frames.held))
			return 100 * cut / max(1, float64(r.frames.held)), ""
		}},
	}
}

// waits are wake-ups and context switches for one of what of counts.
func waits(group string, of func(*run) float64) []figure {
	return []figure{
		{Case: report.Case{Group: group, Name: "wake-ups of the proxies", Less: true}, of: func(v *variant, r *run) (float64, string) {
			if v.proxy.OnP == nil {
				return 0, "has no process of its own"
			}
			return float64(r.waits) / of(r), ""
		}},
		{Case: report.Case{Group: group, Name: "context switches of the machine", Less: true}, of: func(_ *variant, r *run) (float64, string) {
			return float64(r.switches) / of(r), ""
		}},
	}
}
