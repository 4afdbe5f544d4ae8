// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// check is one thing that `doctor --json` looked at.
type check struct{ Name, State, Found, Fix string }

// TestDoctorHere: this kernel, a World and the QEMU that the tests install.
func TestDoctorHere(t *testing.T) {
	for name, peer := range map[string]lt.Peer{"veth": lt.Veth, "vxlan": lt.VXLAN} {
		t.Run(name, func(t *testing.T) {
			p := newWorldPair(t, peer, "", "", "")
			doctor := func(wantCode int) map[string]check {
				t.Helper()
				cmd := p.lockstepIn(p.HostP, "doctor", "-c", p.config, "--json")
				out, _ := cmd.Output()
				var got struct{ Checks []check }
				if err := json.Unmarshal(out, &got); err != nil || cmd.ProcessState.ExitCode() != wantCode {
					t.Fatalf("%v, exit %d, want %d\n%s", err, cmd.ProcessState.ExitCode(), wantCode, out)
				}
				by := make(map[string]check)
				for _, c := range got.Checks {
					by[c.Name] = c
				}
				return by
			}
			by := doctor(0)
			want := strings.Fields("privileges kernel tcx btf programs compiler bpffs qemu colo control peer run_dir nics[0].tap")
			if peer == lt.VXLAN {
				want = append(want, "vxlan", "nics[0].underlay", "nics[0].route")
			} else {
				want = append(want, "nics[0].peer", "nics[0].xdp")
			}
			for _, name := range want {
				if by[name].State != "ok" {
					t.Errorf("%s: %+v, want ok", name, by[name])
				}
			}
			// The peer's host gone, its device's MTU too small.
			lt.Run(t, "ip", "-n", p.HostS, "link", "set", "ctl", "down")
			small := "peerP"
			if peer == lt.VXLAN {
				small = "underP"
			}
			lt.Run(t, "ip", "-n", p.HostP, "link", "set", small, "mtu", "1400")
			by = doctor(1)
			for _, name := range []string{"peer", map[lt.Peer]string{lt.Veth: "nics[0].peer", lt.VXLAN: "nics[0].underlay"}[peer]} {
				if by[name].State != "missing" {
					t.Errorf("%s: %+v, want missing", name, by[name])
				}
			}
		})
	}
}

// TestDoctorAgrees: what keeps `run` from starting is what `doctor` finds, in the same words and with the same remedy; where
// doctor finds nothing, run starts.
func TestDoctorAgrees(t *testing.T) {
	for _, tc := range []struct {
		name  string
		peer  lt.Peer
		spoil func(p *pair)
		check string // that finds it; "": nothing is missing
		says  string // a part of what both say
	}{
		{name: "nothing", peer: lt.VXLAN, spoil: func(*pair) {}},
		{name: "a tap to be made", peer: lt.VXLAN, spoil: func(p *pair) {
			p.replace("tap: tapP,", "tap: tapNew, bridge: brNew,")
			lt.Run(t, "ip", "-n", p.HostP, "link", "add", "brNew", "type", "bridge")
		}},
		{name: "no tap", peer: lt.Veth, spoil: func(p *pair) { p.replace("tap: tapP,", "tap: tapNew,") }, check: "nics[0].tap", says: "ip tuntap add dev tapNew mode tap"},
		{name: "no bridge", peer: lt.Veth, spoil: func(p *pair) { p.replace("tap: tapP,", "tap: tapNew, bridge: brNew,") }, check: "nics[0].bridge", says: "ip link add brNew type bridge"},
		{name: "no peer device", peer: lt.Veth, spoil: func(p *pair) { p.replace("device: peerP", "device: peerNew") }, check: "nics[0].peer", says: `there is no device "peerNew"`},
		{name: "small peer device", peer: lt.Veth, spoil: func(p *pair) { lt.Run(t, "ip", "-n", p.HostP, "link", "set", "peerP", "mtu", "1400") },
			check: "nics[0].peer", says: "ip link set peerP mtu "},
		{name: "small underlay", peer: lt.VXLAN, spoil: func(p *pair) { lt.Run(t, "ip", "-n", p.HostP, "link", "set", "underP", "mtu", "1400") },
			check: "nics[0].underlay", says: "ip link set underP mtu "},
		{name: "small underlay of a tap to be made", peer: lt.VXLAN, spoil: func(p *pair) {
			p.replace("tap: tapP,", "tap: tapNew, bridge: brNew,")
			lt.Run(t, "ip", "-n", p.HostP, "link", "add", "brNew", "type", "bridge")
			lt.Run(t, "ip", "-n", p.HostP, "link", "set", "underP", "mtu", "1500")
		}, check: "nics[0].underlay", says: "ip link set underP mtu 1550"},
		{name: "another device of the VXLAN's name", peer: lt.VXLAN, spoil: func(p *pair) { lt.Run(t, "ip", "-n", p.HostP, "link", "add", "lsx77", "type", "bridge") },
			check: "nics[0].underlay", says: "ip link del lsx77"},
		{name: "no bpffs", peer: lt.Veth, spoil: func(p *pair) { p.replace("pin_dir: bpf/lockstep", "pin_dir: pins/lockstep") }, check: "bpffs", says: "/pins && mount -t bpf bpf "},
		{name: "sections that do not go together", peer: lt.Veth, spoil: func(p *pair) { p.replace("run_dir: run", "run_dir: run\narbiter: {type: file, path: "+p.Dir+"}") },
			check: "config", says: "without QEMU's socket no node can take over"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newWorldPair(t, tc.peer, "", "", "")
			p.t = t
			tc.spoil(p)
			out, _ := p.lockstepIn(p.HostP, "doctor", "-c", p.config, "--node", "alpha", "--json").Output()
			var got struct {
				CanRun bool `json:"can_run"`
				Checks []check
			}
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if tc.check == "" {
				if !got.CanRun {
					t.Errorf("doctor:\n%s", out)
				}
				p.daemon("alpha", p.HostP, "primary")
				lt.Eventually(t, 30*time.Second, func() (bool, string) { return p.status("alpha") != nil, p.log("alpha") })
				return
			}
			run := p.lockstepIn(p.HostP, "run", "-c", p.config, "--node", "alpha", "--role", "primary")
			limit := time.AfterFunc(30*time.Second, func() { run.Process.Kill() }) // it started, and should not have
			said, err := run.CombinedOutput()
			if !limit.Stop() || err == nil {
				t.Errorf("run: %v", err)
			}
			if strings.HasPrefix(tc.check, "nics") { // it came as far as to its lock
				if strings.Contains(tc.says, "link del") {
					lt.Run(t, "ip", "-n", p.HostP, "link", "del", "lsx77")
				}
				if out, err := p.lockstepIn(p.HostP, "unload", "-c", p.config, "--node", "alpha").CombinedOutput(); err != nil {
					t.Errorf("unload: %v\n%s", err, out)
				}
			}
			found := false
			for _, c := range got.Checks {
				if c.State != "missing" {
					continue
				}
				if c.Name != tc.check || !strings.Contains(c.Found+"; "+c.Fix, tc.says) {
					t.Errorf("doctor finds %+v, want %s: %s", c, tc.check, tc.says)
				}
				found = true
				if !strings.Contains(string(said), strings.TrimSpace(c.Found)) || !strings.Contains(string(said), c.Fix) {
					t.Errorf("doctor finds %q, to fix: %q; run says\n%s", c.Found, c.Fix, said)
				}
			}
			if !found || got.CanRun {
				t.Errorf("doctor finds nothing; run says\n%s", said)
			}
		})
	}
}

// replace changes the pair's config.
func (p *pair) replace(old, text string) {
	p.t.Helper()
	b, err := os.ReadFile(p.config)
	if err != nil || !strings.Contains(string(b), old) {
		p.t.Fatalf("no %q in %s: %v", old, filepath.Base(p.config), err)
	}
	if err := os.WriteFile(p.config, []byte(strings.Replace(string(b), old, text, 1)), 0o600); err != nil {
		p.t.Fatal(err)
	}
}
