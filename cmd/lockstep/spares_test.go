// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/state"
)

// spareYAML is a config with a spare.
func spareYAML(dir string) string {
	s := "vm: web1\nnodes:\n"
	for i, node := range []string{"alpha", "beta", "gamma"} {
		s += fmt.Sprintf("  %s: {control: '192.0.2.%d:7700', nics: [{tap: tapP, peer: {vxlan: {id: 7, local: 192.0.2.%[2]d, underlay: eth1}}}], qmp: q}\n", node, i+1)
	}
	return s + "tls: {insecure: true}\nrun_dir: run\nstate_dir: state\narbiter: {type: file, path: " + dir + "}\n"
}

// TestSpareNodes: a node's peer is the node that the arbiter names; as the primary it begins with the last one, and takes
// any. The peer link leads there.
func TestSpareNodes(t *testing.T) {
	c, dir := newCLI(t), t.TempDir()
	c.write(t, "spare.yaml", spareYAML(dir))
	conf, err := config.Load(filepath.Join(c.dir, "spare.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	swap := swapEntry(t, conf)
	remote := ""
	c.kernel.ensureVXLAN = func(v *config.VXLAN, _ int) (string, error) {
		remote = v.Remote.String()
		return v.Device(), nil
	}
	c.kernel.directVXLAN = func(v *config.VXLAN) error {
		remote = v.Remote.String()
		return nil
	}
	var parts []string
	ends := []func() error{
		func() error { swap(1, "beta", "gamma"); return control.ErrAfresh },
		func() error { swap(2, "gamma", "alpha"); return control.ErrPromoted },
		func() error { return control.ErrPoweredOff },
	}
	c.control = func(_ context.Context, o control.Options) error {
		parts = append(parts, fmt.Sprintf("%s with %s at %s, %s, to %s", o.Role, o.Peer, o.PeerAddr, o.Failover.Peers.Migration, remote))
		for _, p := range o.Spares {
			if err := p.Direct(); err != nil {
				t.Error(err)
			}
			if p.Addr.String() != remote || p.QEMU.Migration != "tcp:"+remote+":9998" {
				t.Errorf("%s: the address %s, QEMU at %s, the peer link to %s", p.Name, p.Addr, p.QEMU.Migration, remote)
			}
		}
		if err := o.Failover.Store.Save(state.State{Role: string(o.Role), Term: o.Failover.Begin.Record.Term, Peer: o.Peer}); err != nil {
			t.Error(err)
		}
		for _, n := range o.NICs {
			n.Close()
		}
		end := ends[0]
		ends = ends[1:]
		return end()
	}
	swap(0, "", "beta")
	code, _, stderr := c.run(t.Context(), "run -c @/spare.yaml --node alpha")
	want := []string{
		"secondary with beta at 192.0.2.2, tcp:192.0.2.2:9998, to 192.0.2.2",
		"secondary with gamma at 192.0.2.3, tcp:192.0.2.3:9998, to 192.0.2.3",
		"primary with gamma at 192.0.2.3, tcp:192.0.2.3:9998, to 192.0.2.3",
	}
	if code != exitOK || !slices.Equal(parts, want) {
		t.Errorf("exit %d, %q\nwant %q\n%s", code, parts, want, stderr)
	}
	for _, role := range []string{"primary", "secondary"} {
		code, _, stderr := c.run(t.Context(), "run -c @/spare.yaml --node alpha --role "+role)
		if code != exitUsage || !strings.Contains(stderr, "has spare nodes, and which of its nodes are the pair the arbiter and the nodes decide: leave out --role") {
			t.Errorf("--role %s: exit %d, %s", role, code, stderr)
		}
	}
}

// An entry of another node than the first two, too, is taken from it only where it is lost.
func TestSpareStartHere(t *testing.T) {
	noticed = 0
	t.Cleanup(func() { noticed = control.EntryNoticed })
	c, dir := newCLI(t), t.TempDir()
	c.write(t, "spare.yaml", spareYAML(dir))
	if code, _, stderr := c.run(t.Context(), "start -c @/spare.yaml --node gamma --here"); code != exitOK {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	if code, _, stderr := c.run(t.Context(), "start -c @/spare.yaml --node alpha --here"); code != exitFailed || !strings.Contains(stderr, "says that gamma served last") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	code, stdout, stderr := c.run(t.Context(), "start -c @/spare.yaml --node alpha --here --force")
	if code != exitOK || !strings.Contains(stdout, "Start the daemons of all nodes: alpha is the primary, and the first of the others that is there follows.") {
		t.Errorf("exit %d, %s%s", code, stdout, stderr)
	}
}

// That a spare follows nobody is nothing to look at.
func TestSpareShown(t *testing.T) {
	st := api.Status{VM: "web1", Node: "gamma", Role: "secondary", State: "spare", Detail: "this node is a spare: alpha's secondary is beta", ArbiterTerm: 2, Peer: api.PeerStatus{Node: "alpha"}}
	var out strings.Builder
	if err := printStatus(&out, st); err != nil {
		t.Fatal(err)
	}
	got := out.String()
	if !strings.Contains(got, "web1 on gamma:  secondary, spare, epoch 0: this node is a spare: alpha's secondary is beta\n") ||
		!strings.Contains(got, " alpha, which has its secondary\n") || strings.Contains(got, "NOT") {
		t.Errorf("status:\n%s", got)
	}
	s := sample{at: time.Now(), status: st}
	for _, l := range topView(&s, 40) {
		if l.style == topAlarm {
			t.Errorf("top alarms: %s", l.text)
		}
	}
}
