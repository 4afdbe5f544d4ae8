// SPDX-License-Identifier: Apache-2.0

package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
)

//go:embed page.html
var page string

var pageTemplate = template.Must(template.New("page").Parse(page))

// pagePart is a part as the template sees it.
type pagePart struct {
	*Part
	Rounds   int
	Others   []string
	Groups   []pageGroup
	Charts   []chart
	Insteads []string
}

type pageGroup struct {
	Name string
	Rows []pageRow
}

type pageRow struct {
	Name, Unit, Direction string
	Cells                 []pageCell
	Ratios                []string
}

type pageCell struct {
	Value, Spread string
	Note          int
}

// Columns is how many the part's table has.
func (p pagePart) Columns() int { return 2 + len(p.Variants) + len(p.Others) }

// Number is that of a remark.
func (pagePart) Number(index int) int { return index + 1 }

// classes are the colours of the page's style: lockstep, other variants, stacked parts.
var classes = []string{"subject", "v0", "v1", "v2", "v3", "v4", "p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"}

// HTML writes a report as one page that needs nothing else.
func HTML(w io.Writer, r *Report) error {
	view := struct {
		Facts   [][2]string
		Classes []string
		Parts   []pagePart
		LabelX  float64
	}{Facts: facts(r), Classes: classes, LabelX: labels - 8}
	for i := range r.Parts {
		t := newTable(&r.Parts[i])
		p := pagePart{Part: t.part, Rounds: rounds(t.part), Others: t.others, Insteads: t.notes}
		for _, g := range t.groups {
			shown := pageGroup{Name: g.name}
			for _, r := range g.rows {
				row := pageRow{Name: r.Name, Unit: r.Unit, Direction: arrow(r.Less), Ratios: r.ratios}
				for _, c := range r.cells {
					row.Cells = append(row.Cells, pageCell{c.value, c.spread, c.note})
				}
				shown.Rows = append(shown.Rows, row)
			}
			p.Groups = append(p.Groups, shown)
			p.Charts = append(p.Charts, t.charts(&g)...)
		}
		view.Parts = append(view.Parts, p)
	}
	if err := pageTemplate.Execute(w, view); err != nil {
		return fmt.Errorf("write the report's page: %w", err)
	}
	return nil
}
