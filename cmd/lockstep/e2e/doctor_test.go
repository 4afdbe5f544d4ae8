// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"strings"
	"testing"

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
