// SPDX-License-Identifier: Apache-2.0

package failover

// Mutate switches a rule off. Only tests may; TestMutate of the repository looks after that.
func (c *Config) Mutate(rule string) {
	off, ok := map[string]*bool{
		"R18": &c.noR18, "R21 wait": &c.noWait, "R21 living": &c.noLiving, "R21 dismissed": &c.noClaimCounts, "R21 claim": &c.noClaim, "R24": &c.noR24, "R25": &c.noR25,
		"R26 uncovered": &c.noR26Uncovered, "R26 lease": &c.noR26Lease, "R26 entry": &c.NoR26Entry,
	}[rule]
	if ok {
		*off = true
	}
}
