// SPDX-License-Identifier: Apache-2.0

package control

import "github.com/lockstep-ft/lockstep/compare"

// The decision core looks at itself after every event of the simulated hosts.
func init() { compare.Assertions = true }
