// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
)

// mutationEnv names the rule that the programs of this process are loaded without.
const mutationEnv = "LOCKSTEP_BPF_MUTATION"

// mutations are the rules that have a switch, with the tests that see them broken.
var mutations = map[string]struct {
	value bpf.LockstepLsMutation
	tests []string
}{
	"R6":     {bpf.LockstepLsMutationLS_MUTATE_R6, []string{"TestNack", "TestEchoIn"}},
	"R20":    {bpf.LockstepLsMutationLS_MUTATE_R20, []string{"TestPriOutSamples", "TestPriOutReleased", "TestSoloSamples"}},
	"REPLAY": {bpf.LockstepLsMutationLS_MUTATE_REPLAY, []string{"TestWindow", "TestWindowRandom", "TestRotation", "TestEchoOut"}},
	"GUARD":  {bpf.LockstepLsMutationLS_MUTATE_GUARD, []string{"TestTakeover", "TestEdge"}},
	"EDGE":   {bpf.LockstepLsMutationLS_MUTATE_EDGE, []string{"TestTakeover", "TestEdge", "TestLiveEdgeMirrored"}},
	"FLOOD":  {bpf.LockstepLsMutationLS_MUTATE_FLOOD, []string{"TestFlood", "TestFloodOfSlots"}},
	"DRAIN":  {bpf.LockstepLsMutationLS_MUTATE_DRAIN, []string{"TestLiveGateCounts"}},
	"QUOTE":  {bpf.LockstepLsMutationLS_MUTATE_QUOTE, []string{"TestQuote", "TestQuoteHalfOpen"}},
	"MODE":   {bpf.LockstepLsMutationLS_MUTATE_MODE, []string{"TestPriOutReleased"}},
	"PARK":   {bpf.LockstepLsMutationLS_MUTATE_PARK, []string{"TestParked"}},
	"FAST1":  {bpf.LockstepLsMutationLS_MUTATE_FAST_R1, []string{"TestFastPathEquals", "TestFastDatagramsEqual"}},
	"FAST2":  {bpf.LockstepLsMutationLS_MUTATE_FAST_R2, []string{"TestFastPathEquals", "TestLiveFastPath"}},
	"FAST3":  {bpf.LockstepLsMutationLS_MUTATE_FAST_R3, []string{"TestFastPathEquals"}},
	"TAG":    {bpf.LockstepLsMutationLS_MUTATE_TAG, []string{"TestAuthentic", "TestRotation", "TestFuzz", "TestFuzzSigned"}},
}

// Without its rule each of these tests fails: it would see the rule broken.
func TestMutations(t *testing.T) {
	if os.Getenv(mutationEnv) != "" {
		return // this is the mutated run
	}
	for rule, m := range mutations {
		for _, name := range m.tests {
			t.Run(rule+"/"+name, func(t *testing.T) {
				cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$")
				cmd.Env = append(os.Environ(), mutationEnv+"="+rule)
				out, err := cmd.CombinedOutput()
				if err == nil || !strings.Contains(string(out), "--- FAIL: "+name) {
					t.Errorf("%s does not fail without %s (%v):\n%s", name, rule, err, out)
				}
			})
		}
	}
}
