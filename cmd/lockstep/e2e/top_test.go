// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"regexp"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestTop: what top prints of a living pair, on either host.
func TestTop(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	c := p.mustDial(lt.Guest4, portEcho)
	if err := echo(c, 1); err != nil {
		t.Fatal(err)
	}
	for node, want := range map[string]string{
		"alpha": `^\S+ primary replicating covered=false lease=\d+ms released/s=- held=0 connections=1 checkpoints=0\n\S+ primary replicating .* released/s=\d+ `,
		"beta":  `^\S+ secondary replicating covered=false records/s=- held=\d+ connections=1 checkpoints=0\n\S+ secondary replicating .* records/s=\d+ `,
	} {
		out, err := p.lockstep("top", "-c", p.config, "--node", node, "--every", "200ms", "--count", "2").CombinedOutput()
		if err != nil || !regexp.MustCompile(want).Match(out) {
			t.Errorf("%s: %v\n%s", node, err, out)
		}
	}
}
