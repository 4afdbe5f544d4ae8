// SPDX-License-Identifier: Apache-2.0

package report

// Collector collects a part's cases, in the order in which they first come.
type Collector struct {
	Cases []Case
	index map[[2]string]int // by group and name
}

// Change has f change a variant's series of a case, which is known by its group and name.
func (c *Collector) Change(of Case, variant string, f func(*Series)) {
	if c.index == nil {
		c.index = make(map[[2]string]int)
	}
	key := [2]string{of.Group, of.Name}
	i, ok := c.index[key]
	if !ok {
		i = len(c.Cases)
		c.index[key] = i
		of.Series = make(map[string]Series)
		c.Cases = append(c.Cases, of)
	}
	s := c.Cases[i].Series[variant]
	f(&s)
	c.Cases[i].Series[variant] = s
}

// Add adds a round's figure.
func (c *Collector) Add(of Case, variant string, v float64) {
	c.Change(of, variant, func(s *Series) { s.Rounds = append(s.Rounds, v) })
}

// Instead notes what a variant did in a round without a figure.
func (c *Collector) Instead(of Case, variant, what string) {
	c.Change(of, variant, func(s *Series) { s.Instead = what })
}
