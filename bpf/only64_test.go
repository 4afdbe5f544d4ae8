// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"go/build"
	"slices"
	"testing"
)

// Hosts of 32 bits, or big-endian ones, are refused when lockstep is compiled.
func TestOnly64(t *testing.T) {
	for arch, refused := range map[string]bool{
		"amd64": false, "arm64": false, "riscv64": false, "loong64": false, "ppc64le": false,
		"386": true, "arm": true, "mipsle": true, "wasm": true, "s390x": true, "ppc64": true,
	} {
		c := build.Default
		c.GOARCH = arch
		p, err := c.ImportDir(".", 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(p.GoFiles, "only64.go"); got != refused {
			t.Errorf("%s: refused %v", arch, got)
		}
	}
}
