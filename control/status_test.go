// SPDX-License-Identifier: Apache-2.0

package control

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// Each of the kernel's reasons is a drop where its description says so, and only there.
func TestDropsAreDrops(t *testing.T) {
	abi, err := os.ReadFile("../bpf/abi.h")
	if err != nil {
		t.Fatal(err)
	}
	reasons := regexp.MustCompile(`(?m)^\tX\((\w+), "([^"]+)"\)`).FindAllStringSubmatch(string(abi), -1)
	if len(reasons) < 40 {
		t.Fatalf("%d reasons found in abi.h", len(reasons))
	}
	known := make(map[string]bool)
	for _, r := range reasons {
		known[r[1]] = true
		if says := strings.Contains(r[2], "dropped"); says == notDrops[r[1]] {
			t.Errorf("%s: %q, but counted as a drop: %v", r[1], r[2], !notDrops[r[1]])
		}
	}
	for name := range notDrops {
		if !known[name] {
			t.Errorf("no such reason: %s", name)
		}
	}
}
