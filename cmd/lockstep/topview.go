// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
)

type topStyle int

const (
	topPlain topStyle = iota
	topHead
	topAlarm // somebody should look
)

type topText struct {
	text  string
	style topStyle
}

// How many of the newest checkpoints, and of the reasons for drops, top lists.
const (
	topCheckpoints = 5
	topDrops       = 5
)

// topView is the screen, at most height lines of it. The connections take what the rest leaves.
func topView(s *sample, height int) []topText {
	var lines []topText
	add := func(style topStyle, format string, a ...any) {
		lines = append(lines, topText{fmt.Sprintf(format, a...), style})
	}
	st := &s.status
	add(topHead, "%s on %s: %s, %s, epoch %d%s   %s", st.VM, st.Node, st.Role, st.State, st.Epoch, detail(st.Detail), s.at.Format(time.TimeOnly))
	if s.err != nil {
		add(topAlarm, "NO ANSWER: %v", s.err)
	}
	spare := st.State == "spare" // nothing is wrong
	switch {
	case st.Peer.Connected:
		add(topPlain, "peer        %s, connected", st.Peer.Node)
	case spare:
		add(topPlain, "peer        %s, which has its secondary", st.Peer.Node)
	default:
		add(topAlarm, "peer        %s, NOT CONNECTED%s", st.Peer.Node, detail(st.Peer.Error))
	}
	switch {
	case st.Covered:
		add(topPlain, "failover    the secondary can take over")
	case st.ArbiterTerm > 0 && !spare:
		add(topAlarm, "failover    the secondary can NOT take over")
	}
	if left := st.LeaseMS; left != nil && *left > 0 {
		add(topPlain, "lease       %.0f ms left", *left)
	} else if left != nil {
		add(topAlarm, "lease       over: the guest is MUTED")
	}
	switch g := &st.GuestClock; {
	case g.Error != "":
		add(topAlarm, "paused      %s", g)
	case g.PausedSeconds > 0:
		add(topPlain, "paused      %s", g)
	}
	if r := st.Replication; r != nil && r.Total > 0 {
		add(topPlain, "copy        %s: %d of %d MiB, %d MiB/s", r.What, r.Done>>20, r.Total>>20, r.Rate>>20)
	}
	name, sent := sentFrames(st)
	add(topPlain, "%-11s %s/s%s", name, perSecond(s, sent), kernelShare(s))
	add(topPlain, "held        %d packets, %d bytes, on %d connections", st.HeldPackets, st.HeldBytes, st.Connections)
	if p := st.Periodic; p != nil && p.On {
		add(topAlarm, "periodic    %s", p)
	}
	lines = append(lines, checkpointLines(st)...)
	drops := dropLines(s)
	lines = append(lines, connectionLines(s, height-len(lines)-len(drops))...)
	lines = append(lines, drops...)
	return lines[:min(len(lines), max(height, 0))]
}

// sentFrames is what of the guest left its host: of the primary frames, of the secondary records.
func sentFrames(s *api.Status) (name string, count func(*api.Status) uint64) {
	if s.Role == "secondary" {
		return "records", func(s *api.Status) uint64 { return s.Counters["record_out"] }
	}
	return "released", func(s *api.Status) uint64 { return s.Counters["released_out"] + s.Counters["fast_passed"] }
}

// perSecond is how fast a counter grew, "-" while that is not known.
func perSecond(s *sample, count func(*api.Status) uint64) string {
	if grew, seconds, ok := growth(s, count); ok {
		return fmt.Sprintf("%.0f", float64(grew)/seconds)
	}
	return "-"
}

func growth(s *sample, count func(*api.Status) uint64) (grew uint64, seconds float64, ok bool) {
	if s.before == nil {
		return 0, 0, false
	}
	now, then := count(&s.status), count(&s.before.status)
	seconds = s.at.Sub(s.before.at).Seconds()
	return now - then, seconds, now >= then && seconds > 0 // a counter of another daemon may be lower
}

func kernelShare(s *sample) string {
	_, sent := sentFrames(&s.status)
	all, _, ok := growth(s, sent)
	kernel, _, _ := growth(s, func(s *api.Status) uint64 { return s.Counters["fast_out"] + s.Counters["fast_passed"] })
	if !ok || all == 0 || s.status.Role == "secondary" {
		return ""
	}
	return fmt.Sprintf(", %.0f %% of them by the kernel", 100*float64(min(kernel, all))/float64(all))
}

var bars = []rune("▁▂▃▄▅▆▇█")

// sparkline draws values from 0 to the largest.
func sparkline(values []float64) string {
	top := slices.Max(append(slices.Clone(values), 0))
	line := make([]rune, len(values))
	for i, v := range values {
		line[i] = bars[0]
		if top > 0 {
			line[i] = bars[min(max(int(v/top*float64(len(bars))), 0), len(bars)-1)]
		}
	}
	return string(line)
}

// pauses are those of this host's guest, in ms.
func pauses(s *api.Status) (ms []float64) {
	for _, c := range s.Checkpoints {
		if c.Result != "running" {
			ms = append(ms, pauseOf(s, &c))
		}
	}
	return ms
}

func pauseOf(s *api.Status, c *api.Checkpoint) float64 {
	if s.Role == "secondary" {
		return c.SVMPauseMS
	}
	return c.PVMPauseMS
}

func checkpointLines(s *api.Status) []topText {
	text := fmt.Sprintf("checkpoints %d done", s.CheckpointsDone)
	if ms := pauses(s); len(ms) > 0 {
		text += fmt.Sprintf(", pauses of the last %d: %s up to %.1f ms", len(ms), sparkline(ms), slices.Max(ms))
	}
	lines := []topText{{text, topPlain}}
	for _, c := range s.Checkpoints[max(0, len(s.Checkpoints)-topCheckpoints):] {
		style := topPlain
		if c.Result != "committed" && c.Result != "running" {
			style = topAlarm
		}
		lines = append(lines, topText{strings.TrimRight(fmt.Sprintf("  %s  pause %6.1f ms, frozen %6.1f ms  %s: %s  %s",
			c.At.Format(time.TimeOnly), pauseOf(s, &c), c.FrozenMS, c.Cause, c.Result, c.Flow), " "), style})
	}
	return lines
}

// flowRate is a connection and how many bytes of it were compared in a second.
type flowRate struct {
	api.Flow
	rate float64
}

// busiest are the connections, those with the most bytes first, then those that hold most, then the newest.
func busiest(s *sample) []flowRate {
	type key struct {
		nic           int
		guest, remote string
	}
	then := make(map[key]uint32)
	var seconds float64
	if s.before != nil {
		seconds = s.at.Sub(s.before.at).Seconds()
		for _, f := range s.before.flows {
			if f.Compared != nil {
				then[key{f.NIC, f.Guest, f.Remote}] = *f.Compared
			}
		}
	}
	var all []flowRate
	for _, f := range s.flows {
		r := flowRate{Flow: f}
		if before, ok := then[key{f.NIC, f.Guest, f.Remote}]; ok && f.Compared != nil && seconds > 0 {
			if n := int32(*f.Compared - before); n > 0 { // lower: another connection between the same ports
				r.rate = float64(n) / seconds
			}
		}
		all = append(all, r)
	}
	slices.SortStableFunc(all, func(a, b flowRate) int {
		return cmp.Or(cmp.Compare(b.rate, a.rate), cmp.Compare(b.HeldBytes, a.HeldBytes), cmp.Compare(a.Age, b.Age))
	})
	return all
}

func connectionLines(s *sample, room int) []topText {
	if s.status.Connections > maxListed {
		return []topText{{fmt.Sprintf("more than %d connections: `lockstep flows` lists them", maxListed), topHead}}
	}
	lines := []topText{{fmt.Sprintf("%-47s %10s %8s  %-7s %s", "CONNECTION", "BYTES/s", "HELD", "OWNER", "STATE"), topHead}}
	for _, f := range busiest(s) {
		if len(lines) >= room {
			break
		}
		lines = append(lines, topText{fmt.Sprintf("%-47s %10.0f %8d  %-7s %s", f.Guest+" > "+f.Remote, f.rate, f.HeldBytes, cmp.Or(f.Owner, "-"), f.State), topPlain})
	}
	return lines
}

// reasonRate is a reason for drops.
type reasonRate struct {
	name string
	rate float64
	all  uint64
}

// dropRates are the reasons, those that grow fastest first.
func dropRates(s *sample) []reasonRate {
	var all []reasonRate
	for _, name := range slices.Sorted(maps.Keys(s.status.Dropped)) {
		if s.status.Dropped[name] == 0 {
			continue
		}
		r := reasonRate{name: name, all: s.status.Dropped[name]}
		if grew, seconds, ok := growth(s, func(s *api.Status) uint64 { return s.Dropped[name] }); ok {
			r.rate = float64(grew) / seconds
		}
		all = append(all, r)
	}
	slices.SortStableFunc(all, func(a, b reasonRate) int {
		return cmp.Or(cmp.Compare(b.rate, a.rate), cmp.Compare(b.all, a.all))
	})
	return all
}

func dropLines(s *sample) []topText {
	lines := []topText{{fmt.Sprintf("%-47s %10s %8s", "DROPPED (lockstep explain REASON)", "FRAMES/s", "ALL"), topHead}}
	for _, r := range dropRates(s) {
		if len(lines) > topDrops {
			break
		}
		lines = append(lines, topText{fmt.Sprintf("%-47s %10.0f %8d", r.name, r.rate, r.all), topPlain})
	}
	return lines
}

// topLine is a sample in one line.
func topLine(s *sample) string {
	at := s.at.Format(time.TimeOnly)
	if s.err != nil {
		return fmt.Sprintf("%s no answer: %v", at, s.err)
	}
	st := &s.status
	name, sent := sentFrames(st)
	words := []string{at, st.Role, st.State, fmt.Sprintf("covered=%t", st.Covered)}
	if st.LeaseMS != nil {
		words = append(words, fmt.Sprintf("lease=%.0fms", *st.LeaseMS))
	}
	words = append(words, fmt.Sprintf("%s/s=%s", name, perSecond(s, sent)), fmt.Sprintf("held=%d", st.HeldPackets), fmt.Sprintf("connections=%d", st.Connections),
		fmt.Sprintf("checkpoints=%d", st.CheckpointsDone))
	if n := len(st.Checkpoints); n > 0 {
		c := &st.Checkpoints[n-1]
		words = append(words, fmt.Sprintf("last=%q pause=%.1fms", c.Cause, pauseOf(st, c)))
	}
	for _, r := range dropRates(s) {
		if r.rate > 0 {
			words = append(words, fmt.Sprintf("dropped/s=%.0f(%s)", r.rate, strings.ReplaceAll(r.name, " ", "_")))
		}
	}
	return strings.Join(words, " ")
}
