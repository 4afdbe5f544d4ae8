// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"fmt"
	"os"
	"regexp"
	"testing"
)

// buildDir is for the lockstep that is tested.
var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "lockstep-oracle-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

var setBy = regexp.MustCompile(`(?m)^engines (\S+)$`)

// settingOf names the settings that a scenario wants.
func settingOf(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if m := setBy.FindSubmatch(b); m != nil {
		return string(m[1])
	}
	return "patient"
}
