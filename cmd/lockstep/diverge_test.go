// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/journal"
)

func TestDiverge(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", pairYAML+"state_dir: state\n")
	j, err := journal.Open(filepath.Join(c.dir, "state"), "web1", "alpha", journal.DefaultLimit, discard)
	if err != nil {
		t.Fatal(err)
	}
	made := func(ago time.Duration, cause, flow string, ms float64) {
		fields := map[string]any{"epoch": 3, "result": "committed", "frozen_ms": ms}
		if flow != "" {
			fields["flow"] = flow
		}
		if cause == "payload differs" {
			fields["where"] = fmt.Sprintf("in bytes %v to 99", ms/50)
		}
		j.Add(journal.Event{Time: time.Now().Add(-ago), Kind: journal.Checkpoint, Cause: cause, Fields: fields})
	}
	made(3*time.Hour, "timeout", "10.0.0.2:5432>10.0.0.9:41000", 5000)
	made(30*time.Minute, "period", "", 10)
	made(20*time.Minute, "payload differs", "10.0.0.2:443>10.0.0.9:40000", 100)
	made(10*time.Minute, "payload differs", "10.0.0.2:50123>[2001:db8::1]:53", 700.5)
	made(5*time.Minute, "payload differs", "10.0.0.2:443>10.0.0.9:40002", 150)
	j.Close()
	for since, want := range map[string]string{
		"": `^SERVICE +CAUSE +CHECKPOINTS +OUTPUT HELD +LAST +CONNECTION +WHERE
port 5432 +timeout +1 +5\.0 s +\S+ \S+ +10\.0\.0\.2:5432>10\.0\.0\.9:41000 *
client of \[2001:db8::1\]:53 +payload differs +1 +0\.7 s .*
port 443 +payload differs +2 +0\.2 s +\S+ \S+ +10\.0\.0\.2:443>10\.0\.0\.9:40002 +in bytes 3 to 99

Checkpoints for other causes: 1\.

timeout: .*
  To do: .*

payload differs: .*
  To do: .*
$`,
		" --since 15m": `^SERVICE .*
client of .*
port 443 +payload differs +1 .*

Checkpoints for other causes: 0\.
(.|\n)*$`,
		" --since 1m": `^No connection asked for a checkpoint\. Checkpoints for other causes: 0\.\n$`,
	} {
		code, stdout, stderr := c.run(t.Context(), "diverge -c @/pair.yaml --node alpha"+since)
		if code != 0 || !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("%q: exit %d, %s\n%s", since, code, stderr, stdout)
		}
	}
}
