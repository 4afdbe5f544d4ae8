// SPDX-License-Identifier: Apache-2.0

package loadertest

import (
	"os"
	"testing"
)

// Missing skips a test that lacks something. With LOCKSTEP_REQUIRE_ALL=1, as CI sets
// it, nothing may be missing: then the test fails.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("LOCKSTEP_REQUIRE_ALL") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// NeedRoot is for tests that make namespaces, devices or load programs.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "needs root for namespaces, taps and programs")
	}
}
