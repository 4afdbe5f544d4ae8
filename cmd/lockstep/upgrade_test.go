// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/loader"
)

func TestUpgrade(t *testing.T) {
	c := newCLI(t)
	code, stdout, stderr := c.run(t.Context(), "upgrade -c @/pair.yaml --node alpha")
	if code != 0 || stderr != "" || !slices.Equal(c.calls, []string{"upgradable 0 tapP"}) {
		t.Errorf("exit %d, %s, calls %q", code, stderr, c.calls)
	}
	for _, want := range []string{"can take over web1 on alpha from lockstep v1.2", "Next: restart the daemon", "at most 7s"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q does not say %q", stdout, want)
		}
	}
	c.kernel.upgradable = func(loader.Options) (string, error) {
		return "", errors.New("pinned by v1.2 with ABI 1; this is v1.3 with ABI 2")
	}
	code, stdout, stderr = c.run(t.Context(), "upgrade -c @/pair.yaml --node beta")
	if code != 1 || stdout != "" || stderr != "lockstep: nic 0: pinned by v1.2 with ABI 1; this is v1.3 with ABI 2\n" {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
}
