// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"testing"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/doctor"
	"github.com/lockstep-ft/lockstep/control/config"
)

func TestDoctorUsage(t *testing.T) {
	c := newCLI(t)
	for line, want := range map[string]string{
		"doctor --node alpha":                   "lockstep: --node names a host of a config file; name the file with -c\n",
		"doctor -c @/pair.yaml --node gamma":    "lockstep: @/pair.yaml has no node \"gamma\"; it has \"alpha\" and \"beta\"\n",
		"doctor -c @/none.yaml":                 "lockstep: read config: open @/none.yaml: no such file or directory\n",
		"doctor all":                            "lockstep: unknown command \"all\" for \"lockstep doctor\"; `lockstep doctor --help` shows the usage\n",
		"doctor -c @/pair.yaml --node a --jsno": "lockstep: unknown flag: --jsno; `lockstep doctor --help` lists the flags\n",
	} {
		if code, stdout, stderr := c.run(t.Context(), line); code != 2 || stderr != want || stdout != "" {
			t.Errorf("%s: exit %d, %q, %q, want 2, %q", line, code, stdout, stderr, want)
		}
	}
}

func TestDoctor(t *testing.T) {
	c := newCLI(t)
	report := doctor.Report{Checks: []doctor.Check{{Name: "kernel", State: doctor.Missing, Found: "Linux 2.2", Fix: "a newer one"}}}
	c.examine = func(_ context.Context, c *config.Config, node string) doctor.Report {
		if c == nil || c.VM != "web1" || node != "beta" {
			t.Errorf("asked for node %q of %+v", node, c)
		}
		return report
	}
	for line, want := range map[string]string{
		"":        "missing  kernel  Linux 2.2\n                 to fix it: a newer one\n",
		" --json": "{\n  \"can_run\": false,\n  \"checks\": [\n    {\n      \"name\": \"kernel\",\n      \"state\": \"missing\",\n      \"found\": \"Linux 2.2\",\n      \"fix\": \"a newer one\"\n    }\n  ]\n}\n",
	} {
		code, stdout, stderr := c.run(t.Context(), "doctor -c @/pair.yaml --node beta"+line)
		if code != 1 || stdout != want || stderr != "lockstep: cannot run here: 1 thing is missing\n" {
			t.Errorf("exit %d, %q, %q, want 1, %q", code, stdout, stderr, want)
		}
	}
	report = doctor.Report{CanRun: true}
	if code, _, stderr := c.run(t.Context(), "doctor -c @/pair.yaml --node beta"); code != 0 || stderr != "" {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
