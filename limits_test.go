// SPDX-License-Identifier: Apache-2.0

package lockstep

import (
	"cmp"
	"go/ast"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
)

const (
	maxMethods = 40  // of a type or an interface, its tests' methods too
	maxLines   = 500 // of a file that somebody wrote
)

// tooLarge are those above a limit with the number that they have, which may only go down.
// Who brings one below its limit removes it here.
var tooLarge = map[string]int{}

// TestLimits: what one has to have in mind at once stays small.
func TestLimits(t *testing.T) {
	sizes, limit := make(map[string]int), make(map[string]int)
	for file, f := range goFiles(t) {
		pkg := path.Dir(file)
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					sizes[pkg+"."+receiver(d)]++
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if s, ok := s.(*ast.TypeSpec); ok {
						if i, ok := s.Type.(*ast.InterfaceType); ok {
							sizes[pkg+"."+s.Name.Name] += i.Methods.NumFields()
						}
					}
				}
			}
		}
	}
	for name := range sizes {
		limit[name] = maxMethods
	}
	for _, f := range files(t) {
		if !slices.Contains([]string{".go", ".c", ".h"}, path.Ext(f)) {
			continue
		}
		if text := read(t, f); !generated.MatchString(text) {
			sizes[f], limit[f] = strings.Count(text, "\n"), maxLines
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sizes)) {
		if most := cmp.Or(tooLarge[name], limit[name]); sizes[name] > most {
			t.Errorf("%s: %d, and at most %d are wanted: split it", name, sizes[name], most)
		}
	}
	for name, n := range tooLarge {
		if limit[name] == 0 || sizes[name] <= limit[name] {
			t.Errorf("%s has %d and needs no exception any more: remove it from tooLarge", name, sizes[name])
		} else if sizes[name] < n {
			t.Errorf("%s has %d, and tooLarge grants it %d: lower that", name, sizes[name], n)
		}
	}
}

// receiver is the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	x := d.Recv.List[0].Type
	if p, ok := x.(*ast.StarExpr); ok {
		x = p.X
	}
	switch g := x.(type) {
	case *ast.IndexExpr:
		x = g.X
	case *ast.IndexListExpr:
		x = g.X
	}
	return x.(*ast.Ident).Name
}
