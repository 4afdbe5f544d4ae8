// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"

	"github.com/lockstep-ft/lockstep/control/qemu"
)

// Settings are of four kinds (docs/CONFIG.md, "Changing a setting"):
//
//   - a daemon's own: it takes them up when it is started again, on either host, in any
//     order. They are in no hash;
//   - those that the pinned tables were made with: their sizes, which the loader compares;
//   - those that both daemons must agree on while the guests replicate;
//   - those that hold as long as the guest runs.
//
// The hash is over the last two, four bytes for each section, so that a difference has a
// name. It finds mistakes; TLS protects against a forged one.

// sections are the hash's, in order.
var sections = []struct {
	name  string
	fixed bool // as long as the guest runs
	write func(io.Writer, *Config)
}{
	{"vm", true, func(w io.Writer, c *Config) { fmt.Fprintf(w, "lockstep config 4 %s", c.VM) }},
	{"arbiter", true, func(w io.Writer, c *Config) {
		a := &c.Arbiter
		fmt.Fprintf(w, "%s %q %v %q %q", a.Type, slices.Sorted(slices.Values(a.Endpoints)), a.TLS != nil, a.Path, a.Command)
	}},
	{"qemu", true, func(w io.Writer, c *Config) {
		fmt.Fprintf(w, "nics %d\n", len(c.Nodes[0].NICs))
		if q := c.QEMU; q != nil {
			fmt.Fprintf(w, "%q %q %q %d %d %q %s", q.Machine, q.Accel, q.CPU, q.Memory, q.SMP, q.NICModel, q.MACs)
			for _, d := range q.Disks {
				fmt.Fprintf(w, "\ndisk %s", d.ID)
				if d.Cache == qemu.CacheWritethrough || d.Cache == qemu.CacheDirectsync { // which the guest sees
					fmt.Fprint(w, " write-through")
				}
			}
			// Nothing is added for the defaults: a release that did not know the keys had those.
			for i, nic := range c.Nodes[0].NICs {
				if nic.Queues > 1 {
					fmt.Fprintf(w, "\nqueues %d %d", i, nic.Queues)
				}
			}
			if len(q.Offloads) > 0 {
				fmt.Fprintf(w, "\noffloads %v", q.Offloads) // fmt sorts a map's keys
			}
		}
	}},
	{"nodes", false, func(w io.Writer, c *Config) {
		for _, n := range slices.SortedFunc(slices.Values(c.Nodes), func(a, b Node) int { return cmp.Compare(a.Name, b.Name) }) { // the file's order means nothing
			fmt.Fprintf(w, "node %s %s\n", n.Name, n.Control)
			for i, nic := range n.NICs {
				if v := nic.PeerVXLAN; v != nil {
					fmt.Fprintf(w, "vxlan %d %d %d %s %s\n", i, v.ID, v.Port, v.Local, v.Remote)
				}
			}
		}
	}},
	{"tls.insecure or tls.qemu", false, func(w io.Writer, c *Config) {
		fmt.Fprint(w, c.TLS.Insecure)
		if !c.TLS.QEMU && !c.TLS.Insecure { // the default is what a release had that did not know the key
			fmt.Fprint(w, " clear")
		}
	}},
	{"heartbeat", false, func(w io.Writer, c *Config) {
		fmt.Fprint(w, int64(c.Heartbeat.Interval), int64(c.Heartbeat.Timeout), int64(c.Heartbeat.Lease), int64(c.Heartbeat.Restart))
	}},
	{"compare.primary_only or compare.mptcp", false, func(w io.Writer, c *Config) { fmt.Fprint(w, c.Compare.PrimaryOnly, c.Compare.MPTCP) }},
	// Where the paths of two copies of the file lead is each host's own.
	{"migration", false, func(w io.Writer, c *Config) {
		fmt.Fprint(w, c.Migration.Port, c.Migration.Unix != "", c.Migration.NBDPort)
	}},
}

// part is a section's share of the hash.
const part = 4

// Hash is over what both daemons must agree on.
func (c *Config) Hash() (sum [32]byte) {
	for i := range sections {
		h := sha256.New()
		sections[i].write(h, c)
		copy(sum[i*part:(i+1)*part], h.Sum(nil))
	}
	return sum
}

// Differ names the sections in which the configs that a and b are of differ.
func Differ(a, b [32]byte) []string { return differ(a, b, true) }

// DifferFixed names those of them that hold as long as the guest runs.
func DifferFixed(a, b [32]byte) []string { return differ(a, b, false) }

func differ(a, b [32]byte, all bool) (names []string) {
	for i := range sections {
		if at := i * part; (all || sections[i].fixed) && [part]byte(a[at:]) != [part]byte(b[at:]) {
			names = append(names, sections[i].name)
		}
	}
	return names
}

// DifferHex is Differ for hashes in hex, as the daemons exchange them. A string that is no
// hash differs in no section that has a name.
func DifferHex(a, b string) []string {
	var sums [2][32]byte
	for i, s := range []string{a, b} {
		raw, err := hex.DecodeString(s)
		if err != nil || len(raw) != len(sums[i]) {
			return nil
		}
		copy(sums[i][:], raw)
	}
	return Differ(sums[0], sums[1])
}
