// SPDX-License-Identifier: Apache-2.0

package api

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/nicloop"
)

// Whatever has a name is explained, and nothing else is.
func TestReasons(t *testing.T) {
	explained := make(map[string]ReasonKind)
	for _, r := range Reasons() {
		if _, twice := explained[r.Name]; twice {
			t.Errorf("%q is explained twice", r.Name)
		}
		explained[r.Name] = r.Kind
		for _, text := range []string{r.Means, r.Do} {
			if !strings.HasSuffix(text, ".") && !strings.HasSuffix(text, "?") || len(text) > 250 {
				t.Errorf("%q: no sentence, or a long one: %q", r.Name, text)
			}
		}
	}
	given := make(map[string]bool)
	for r := compare.ReasonNone + 1; r < compare.ReasonCount; r++ {
		given[r.String()] = true
	}
	for _, why := range nicloop.WhyGivenBack {
		given["fast_back_"+why] = true
	}
	given["fast_back_other"] = true
	for file, pattern := range map[string]string{"../status.go": `Counters\["(\w+)"\]`, "../../loader/counters.go": `(?m)^\t\t"(\w+)": +c\.lost`} {
		names := regexp.MustCompile(pattern).FindAllStringSubmatch(read(t, file), -1)
		if names == nil {
			t.Errorf("%s: no counter found: does the test still look for the right thing?", file)
		}
		for _, m := range names {
			given[m[1]] = true
		}
	}
	dropped := kernelDropsOfABI(t)
	for _, name := range bpf.ReasonNames() {
		given[name] = true
		if drop, ok := dropped[name]; !ok || drop != IsDrop(name) {
			t.Errorf("%s: bpf/abi.h has it: %t, as a drop: %t; its explanation as a %s", name, ok, drop, explained[name])
		}
	}
	for _, name := range causesOfSources(t) {
		given[name] = true
		if explained[name] != KindCause {
			t.Errorf("%q is given as the cause of a checkpoint, and its explanation is of a %q", name, explained[name])
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(given)), slices.Sorted(maps.Keys(explained))); diff != "" {
		t.Errorf("names that are given (-), and names that reasons.go explains (+):\n%s", diff)
	}
}

// kernelDropsOfABI reports of the kernel's reasons whether they are drops, by the texts in bpf/abi.h.
func kernelDropsOfABI(t *testing.T) map[string]bool {
	t.Helper()
	found := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^\s+X\((\w+),[\s\\]+"(.*)"\)`).FindAllStringSubmatch(read(t, "../../bpf/abi.h"), -1) {
		found[m[1]] = strings.Contains(m[2], "dropped")
	}
	return found
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// causesOfSources finds the causes that the daemon gives itself: what the checkpoint machine calls suspect, want and
// fail with, constants, and what the daemon puts into requests and failed answers.
func causesOfSources(t *testing.T) []string {
	t.Helper()
	var found []string
	literals := func(n ast.Node) {
		ast.Inspect(n, func(n ast.Node) bool {
			if _, ok := n.(*ast.CompositeLit); ok {
				return false // words that a name is made of
			}
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			s, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			s = regexp.MustCompile(`%[a-z]`).ReplaceAllString(s, "…")
			if strings.HasSuffix(s, ": ") {
				s += "…"
			}
			found = append(found, s)
			return true
		})
	}
	for _, file := range []string{"checkpoint/event.go", "checkpoint/primary.go", "checkpoints.go", "clock.go", "guest.go", "operator.go", "overlay.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), "../"+file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		before := len(found)
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				return n.Name.Name != "drain" // of the secondary, whose causes get to the primary behind "secondary: "
			case *ast.ValueSpec:
				if strings.HasPrefix(strings.ToLower(n.Names[0].Name), "cause") {
					literals(n)
				}
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Reason" {
					literals(n.Value)
				}
			case *ast.AssignStmt:
				if sel, ok := n.Lhs[len(n.Lhs)-1].(*ast.SelectorExpr); ok && sel.Sel.Name == "Cause" {
					literals(n.Rhs[len(n.Rhs)-1])
				}
				if id, ok := n.Lhs[0].(*ast.Ident); ok && id.Name == "err" && file == "checkpoints.go" {
					if call, ok := n.Rhs[0].(*ast.CallExpr); ok {
						if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "New" {
							literals(call)
						}
					}
				}
			case *ast.CallExpr:
				if sel, ok := n.Fun.(*ast.SelectorExpr); ok && slices.Contains([]string{"suspect", "want", "fail"}, sel.Sel.Name) {
					for _, arg := range n.Args {
						literals(arg)
					}
				}
			}
			return true
		})
		if len(found) == before {
			t.Errorf("%s: no cause found: does the test still look at the right things?", file)
		}
	}
	return found
}

func TestExplain(t *testing.T) {
	for asked, want := range map[string]string{
		"payload differs": "payload differs", "Payload_Differs": "payload differs", "no slot": "no_slot", "NO-SLOT": "no_slot",
		"no READY of the secondary in time":        "no … in time",
		"beta's overlay_dir /o/x is filling up":    "…'s overlay_dir … is filling up",
		"secondary: no QMP connection":             "secondary: …",
		"no QMP connection":                        "no QMP connection",
		"…'s overlay_dir … is filling up":          "…'s overlay_dir … is filling up",
		"the secondary's image is no replica of d": "the secondary's image is no replica of …",
	} {
		if r, ok := Explain(asked); !ok || r.Name != want {
			t.Errorf("%q is explained as %q", asked, r.Name)
		}
	}
	for _, asked := range []string{"", "payload", "no  in time", "secondary:"} {
		if r, ok := Explain(asked); ok {
			t.Errorf("%q is explained as %q", asked, r.Name)
		}
	}
}

func TestNearest(t *testing.T) {
	for asked, want := range map[string]string{
		"payload": "payload differs", "no_slto": "no_slot", "mutde": "muted", "peer tagg": "peer_tag", "timeuot": "timeout", "overlay": "…'s overlay_dir … is filling up",
	} {
		if got := Nearest(asked); len(got) != nearest || got[0] != want {
			t.Errorf("nearest to %q: %q", asked, got)
		}
	}
}
