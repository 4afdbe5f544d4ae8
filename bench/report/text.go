// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/json"
	"fmt"
	"io"
)

// JSON writes a report for programs.
func JSON(w io.Writer, r *Report) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(r)
}
// Text tmp
func Text(w io.Writer, r *Report) error { for _, p := range r.Parts { for _, c := range p.Cases { fmt.Fprintln(w, c.Group,"|", c.Name); for _, v := range p.Variants { s := c.Series[v]; fmt.Fprintf(w, "    %-20s %10.3g %s  %s\n", v, s.Median(), c.Unit, s.Instead)}}}; return nil }
func HTML(w io.Writer, r *Report) error { return nil }
