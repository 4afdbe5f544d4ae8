// SPDX-License-Identifier: Apache-2.0

package checkpoint

// Mutate switches a rule off. Only tests may; TestMutate of the repository looks after that.
func (c *Config) Mutate(rule string) {
	switch rule {
	case "R14 events":
		c.noR14 = true
	case "R15 stop":
		c.noR15 = true
	case "R13 late":
		c.noLate = true
	case "R22 doubt":
		c.noDoubt = true
	}
}
