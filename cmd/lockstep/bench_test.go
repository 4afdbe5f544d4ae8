// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/bench/report"
)

func TestBenchMistakes(t *testing.T) {
	for line, want := range map[string]string{
		"bench --parts Z":           "there is no part",
		"bench --rounds 0":          "--rounds",
		"bench something":           "unknown command",
		"bench --rounds nothing":    "invalid argument",
		"bench act juggler":         "there is no role",
		"bench --qemu no-such-qemu": "--qemu none",
	} {
		wantCode := exitUsage
		if strings.Contains(line, "qemu") || strings.Contains(line, "act") {
			wantCode = exitFailed
		}
		code, _, stderr := newCLI(t).run(t.Context(), line)
		if code != wantCode || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q; want %d and %q", line, code, stderr, wantCode, want)
		}
	}
}

func TestWriteReport(t *testing.T) {
	dir, out := t.TempDir(), new(strings.Builder)
	r := &report.Report{Parts: []report.Part{{Name: "A", Title: "a part"}}}
	jsonFile, page := filepath.Join(dir, "r.json"), filepath.Join(dir, "r.html")
	if err := writeReport(out, r, jsonFile, page); err != nil {
		t.Fatal(err)
	}
	var got report.Report
	if b, err := os.ReadFile(jsonFile); err != nil || json.Unmarshal(b, &got) != nil || len(got.Parts) != 1 {
		t.Errorf("JSON: %s, %v", b, err)
	}
	if b, err := os.ReadFile(page); err != nil || !strings.Contains(string(b), "a part") || !strings.Contains(out.String(), "a part") {
		t.Errorf("page: %s, %v; text: %s", b, err, out)
	}
	if err := writeReport(out, r, filepath.Join(dir, "none", "r.json"), ""); err == nil {
		t.Error("a file that cannot be made is no error")
	}
}
