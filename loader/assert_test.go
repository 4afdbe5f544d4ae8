// SPDX-License-Identifier: Apache-2.0

package loader

import "github.com/lockstep-ft/lockstep/compare"

// The decision core looks at itself after every event that the tests bring about.
func init() { compare.Assertions = true }
