// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
)

func printStatus(out io.Writer, s api.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s on %s:\t%s, %s, epoch %d%s\n", s.VM, s.Node, s.Role, s.State, s.Epoch, detail(s.Detail))
	spare := s.State == "spare" // nothing is wrong
	if spare {
		fmt.Fprintf(w, "peer:\t%s, which has its secondary\n", s.Peer.Node)
	} else {
		fmt.Fprintf(w, "peer:\t%s, %s%s\n", s.Peer.Node, connected(s.Peer.Connected, s.Peer.Since), detail(s.Peer.Error))
	}
	if s.Peer.Insecure {
		fmt.Fprintf(w, "INSECURE:\tthe control link is not protected (tls: {insecure: true}); `lockstep keys` makes certificates\n")
	}
	if s.QMP.Insecure {
		fmt.Fprintf(w, "INSECURE:\tmemory and disks go between the two QEMUs in the clear (tls.qemu, tls.insecure, or a pair that began so)\n")
	}
	if s.QMP.Configured {
		fmt.Fprintf(w, "qemu:\t%s%s%s\n", connected(s.QMP.Connected, s.QMP.Since), detail(s.QMP.State), detail(s.QMP.Error))
	} else {
		fmt.Fprintf(w, "qemu:\tno qmp socket in the config\n")
	}
	if s.GuestClock.PausedSeconds > 0 || s.GuestClock.Agent {
		fmt.Fprintf(w, "guest paused:\t%s\n", &s.GuestClock)
	}
	if s.ArbiterTerm > 0 && !spare {
		word := "the secondary can NOT take over yet"
		if s.Covered {
			word = "the secondary can take over"
		}
		fmt.Fprintf(w, "failover:\t%s, arbiter's term %d\n", word, s.ArbiterTerm)
	}
	label := "disk faults:"
	for _, f := range s.DiskFaults {
		fmt.Fprintf(w, "%s\t%s on %s: %s: %s (%d times, last at %s)\n", label, f.Disk, f.Host, f.Operation, f.Error, f.Count, f.At.Format(time.DateTime))
		label = ""
	}
	if s.Unmerged {
		fmt.Fprintf(w, "overlays:\tnot merged into the images yet: overlay_dir must not be lost\n")
	}
	if len(s.MaskedDisks) > 0 {
		fmt.Fprintf(w, "MASKED:\tfaults of one replica of %s are hidden from the guest: start QEMU with vote-threshold=2\n", strings.Join(s.MaskedDisks, ", "))
	}
	for _, copied := range s.Resyncs {
		fmt.Fprintf(w, "copied:\t%s\n", copied)
	}
	label = "overlays:"
	for i := range s.Overlays {
		fmt.Fprintf(w, "%s\t%s\n", label, &s.Overlays[i])
		if why := s.Overlays[i].Trouble; why != "" {
			fmt.Fprintf(w, "OVERLAYS FULL:\t%s\n", why)
		}
		label = ""
	}
	fmt.Fprintf(w, "connections:\t%d\n", s.Connections)
	fmt.Fprintf(w, "held:\t%d packets, %d bytes\n", s.HeldPackets, s.HeldBytes)
	fmt.Fprintf(w, "released:\t%d packets\n", s.ReleasedPackets)
	printFastPath(w, s.Counters)
	fmt.Fprintf(w, "checkpoints:\t%d requested, %d done\n", s.CheckpointsRequested, s.CheckpointsDone)
	if s.Periodic != nil {
		fmt.Fprintf(w, "periodic mode:\t%s\n", s.Periodic)
	}
	label = "last causes:"
	for _, c := range s.Causes[max(0, len(s.Causes)-3):] {
		where := ""
		if c.Where != "" {
			where = " (" + c.Where + ")"
		}
		fmt.Fprintf(w, "%s\t%s %s %s%s\n", label, c.At.Format(time.TimeOnly), c.Reason, c.Flow, where)
		label = ""
	}
	printCounts(w, "dropped:", s.Dropped)
	label = "programs:"
	for _, name := range slices.Sorted(maps.Keys(s.Programs)) {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", label, name, s.Programs[name].Device, s.Programs[name].Attach)
		label = ""
	}
	return w.Flush()
}

// printFastPath tells what the kernel decided itself, and why the daemon took connections back (R27).
func printFastPath(w io.Writer, n map[string]uint64) {
	kernel := n["fast_out"] + n["fast_passed"]
	if kernel == 0 {
		return
	}
	var why []string
	for _, k := range slices.Sorted(maps.Keys(n)) {
		if cause, ok := strings.CutPrefix(k, "fast_back_"); ok && n[k] > 0 {
			why = append(why, fmt.Sprintf("%s %d", cause, n[k]))
		}
	}
	fmt.Fprintf(w, "fast path:\t%.1f%% of the frames sent; connections given back: %s\n",
		100*float64(kernel)/float64(n["released_out"]+n["fast_passed"]), cmp.Or(strings.Join(why, ", "), "none"))
}

func connected(is bool, since time.Time) string {
	word := "connected"
	if !is {
		word = "NOT CONNECTED"
	}
	if !since.IsZero() {
		word += " since " + since.Format(time.DateTime)
	}
	return word
}

func detail(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}

// printCounts lists what is not zero, the largest first.
func printCounts(w io.Writer, label string, counts map[string]uint64) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	names = slices.DeleteFunc(names, func(n string) bool { return counts[n] == 0 })
	if len(names) == 0 {
		fmt.Fprintf(w, "%s\tnothing\n", label)
	}
	for _, name := range names {
		fmt.Fprintf(w, "%s\t%d %s\n", label, counts[name], name)
		label = ""
	}
}

func newStatus(e env) *cobra.Command {
	return newAsk(e, "status", "Show what this host's daemon is doing", api.FetchStatus, printStatus)
}
