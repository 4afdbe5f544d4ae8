// SPDX-License-Identifier: Apache-2.0

package pairs

import (
	"fmt"
	"os"
	"testing"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

// The test binary is also the service of the guests and the client.
func TestMain(m *testing.M) {
	if len(os.Args) < 3 || os.Args[1] != "bench" || os.Args[2] != "act" {
		os.Exit(m.Run())
	}
	if err := lab.Act(os.Stdin, os.Stdout, os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
