// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const differencesDoc = "../../docs/DIFFERENCES.md"

var (
	heading  = regexp.MustCompile(`(?m)^## (.+)$`)
	named    = regexp.MustCompile(`(?m)^# Difference: (.+)$`)
	differs  = regexp.MustCompile(`(?m)^(qemu|lockstep) \d+: `)
	listed   = regexp.MustCompile(`(?m)^Scenarios: (.+)\.$`)
	inQuotes = regexp.MustCompile("`([^`]+)`")
	rule     = regexp.MustCompile(`\*\*Why \(R\d+(, R\d+)*\)\.\*\* `)
)

// TestDifferences: docs/DIFFERENCES.md has a heading for each scenario in which the engines differ,
// and each heading there says what both do and why, and lists its scenarios.
func TestDifferences(t *testing.T) {
	doc, err := os.ReadFile(differencesDoc)
	if err != nil {
		t.Fatal(err)
	}
	of := make(map[string][]string) // scenarios, by heading
	sections := heading.Split(string(doc), -1)[1:]
	for i, h := range heading.FindAllStringSubmatch(string(doc), -1) {
		title, body := h[1], sections[i]
		of[title] = nil
		list := listed.FindStringSubmatch(body)
		if list == nil || !strings.Contains(body, "**QEMU:**") || !strings.Contains(body, "**lockstep:**") || !rule.MatchString(body) {
			t.Errorf("%q lacks QEMU, lockstep, Why with a rule, or Scenarios", title)
			continue
		}
		for _, q := range inQuotes.FindAllStringSubmatch(list[1], -1) {
			of[title] = append(of[title], q[1])
		}
	}
	found := make(map[string][]string)
	for _, file := range scenarios(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		if !strings.HasPrefix(string(b), "# ") {
			t.Errorf("%s does not say why it is there", name)
		}
		names := named.FindAllStringSubmatch(string(b), -1)
		if differs.Match(b) != (len(names) > 0) {
			t.Errorf("%s: the engines differ in it: %t; it names %d differences", name, differs.Match(b), len(names))
		}
		for _, n := range names {
			if _, ok := of[n[1]]; !ok {
				t.Errorf("%s names a difference %q, which docs/DIFFERENCES.md does not have", name, n[1])
			}
			found[n[1]] = append(found[n[1]], name)
		}
	}
	for title, list := range of {
		slices.Sort(list)
		slices.Sort(found[title])
		if !slices.Equal(list, found[title]) {
			t.Errorf("%q lists %q; the scenarios that name it are %q", title, list, found[title])
		}
	}
}
