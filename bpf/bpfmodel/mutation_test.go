// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// mutationEnv names the rule that the tests of this process switch off.
const mutationEnv = "LOCKSTEP_MODEL_MUTATION"

// Without its rule each of these tests fails: it would see the rule broken.
func TestMutations(t *testing.T) {
	if os.Getenv(mutationEnv) != "" {
		return // this is the mutated run
	}
	for rule, tests := range map[string][]string{
		"R9": {
			"TestExchange", "TestPassiveOpen", "TestActiveOpen", "TestSimultaneousOpen",
			"TestOvertakingAck", "TestTupleReuse", "TestKernel", "TestKernelExchange",
		},
		"QUOTE": {"TestKernel"},
	} {
		for _, name := range tests {
			t.Run(rule+"/"+name, func(t *testing.T) {
				if strings.HasPrefix(name, "TestKernel") {
					lt.NeedRoot(t)
				}
				cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$", "-rapid.nofailfile", "-rapid.shrinktime=1ms")
				cmd.Env = append(os.Environ(), mutationEnv+"="+rule)
				out, err := cmd.CombinedOutput()
				if err == nil || !strings.Contains(string(out), "--- FAIL: "+name) {
					t.Errorf("%s does not fail without %s (%v):\n%s", name, rule, err, out)
				}
			})
		}
	}
}
