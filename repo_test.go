// SPDX-License-Identifier: Apache-2.0

// Package lockstep holds the checks on the repository itself, which `make lint`
// runs: who imports whom, what the pure packages may do, licences, paths.
package lockstep

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

const module = "github.com/lockstep-ft/lockstep"

// files lists what is committed or could be.
func files(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	list := strings.Split(strings.TrimRight(string(out), "\x00"), "\x00")
	return slices.DeleteFunc(list, func(f string) bool {
		_, err := os.Stat(f)
		return err != nil // deleted, not yet committed
	})
}

func goFiles(t *testing.T) map[string]*ast.File {
	t.Helper()
	fset := token.NewFileSet()
	parsed := make(map[string]*ast.File)
	for _, f := range files(t) {
		if filepath.Ext(f) != ".go" {
			continue
		}
		p, err := parser.ParseFile(fset, f, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		parsed[f] = p
	}
	return parsed
}

// under: pkg is dir or below it.
func under(pkg, dir string) bool { return pkg == dir || strings.HasPrefix(pkg, dir+"/") }

// mayImport is the direction of imports: cmd → control, loader; control → compare,
// rewriter; loader → bpf, the cores and control/datapath, which it serves; the cores → nothing;
// sim, the simulator, → anything.
func mayImport(from, to string, test bool) bool {
	switch {
	case under(to, "cmd"):
		return under(from, "cmd")
	case under(to, "bench"):
	case under(to, "bench"):
		return under(from, "bench") || from == "sim/oracle" || from == "cmd/lockstep" || from == "cmd/lockstep/demo" // the commands bench and demo
	case under(to, "sim"):
		return under(from, "sim") || test && from == "bpf" && to == "sim/kernel" // the model of the programs, beside them
	case test || under(from, "bench") || isTestKit(from):
		return true
	case from == "sim/kernel": // what the simulator puts in the kernel's place
		return to == "compare" || to == "rewriter" || under(to, "bpf") || to == "control/datapath" || to == "loader/core"
	case under(from, "sim"):
		return true
	case isTestKit(to):
		return false
	case under(to, "bpf"):
		return under(from, "loader") || under(from, "bpf")
	case under(to, "loader"):
		return under(from, "loader") || under(from, "cmd")
	case under(from, "compare"), under(from, "rewriter"), under(from, "bpf"), under(from, "sim/tcp"):
		return under(to, from)
	case under(from, "loader"):
		return to == "compare" || to == "rewriter" || to == "control/datapath"
	case under(from, "control/datapath"):
		return to == "compare"
	}
	return true
}

// isTestKit: a package for tests, beside its owner, like control/qmptest.
func isTestKit(pkg string) bool {
	return pkg == "bpf/bpfmodel" || strings.HasSuffix(pkg, "test") || strings.HasSuffix(pkg, "/labtest") || under(pkg, "cmd/lockstep/labtest")
}

func TestImportDirection(t *testing.T) {
	for file, f := range goFiles(t) {
		from, test := path.Dir(file), strings.HasSuffix(file, "_test.go")
		for _, i := range f.Imports {
			to, ours := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), module+"/")
			if ours && !mayImport(from, to, test) {
				t.Errorf("%s: %s must not import %s", file, from, to)
			}
		}
	}
}

// TestImportable: another module can use the packages that have an API.
func TestImportable(t *testing.T) {
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":  "module example.org/user\n\ngo 1.26\n\nrequire " + module + " v0.0.0\n\nreplace " + module + " => " + root + "\n",
		"main.go": "package main\n\nimport (\n\t_ \"" + module + "/compare\"\n\t_ \"" + module + "/rewriter\"\n)\n\nfunc main() {}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-mod=mod", "-o", os.DevNull, ".")
	build.Dir, build.Env = dir, append(os.Environ(), "GOPROXY=off", "GOFLAGS=", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// Compare, rewriter, the kernel's model and that of a guest's TCP are pure: the standard library, without its clock, its
// I/O and goroutines.
func TestPureCores(t *testing.T) {
	for file, f := range goFiles(t) {
		pkg := path.Dir(file)
		if !slices.Contains([]string{"compare", "rewriter", "control/checkpoint", "control/failover", "sim/tcp"}, pkg) && pkg != "bpf/bpfmodel" || strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, i := range f.Imports {
			imp := strings.Trim(i.Path.Value, `"`)
			first, _, _ := strings.Cut(imp, "/")
			if strings.Contains(first, ".") && !strings.HasPrefix(imp, module+"/") || slices.Contains([]string{"os", "net", "syscall", "unsafe", "log", "context"}, first) && imp != "net/netip" {
				t.Errorf("%s: a pure package must not import %s", file, imp)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s: a pure package must not start a goroutine", file)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" &&
					slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, n.Sel.Name) {
					t.Errorf("%s: a pure package must not use time.%s", file, n.Sel.Name)
				}
			}
			return true
		})
	}
}

// With LOCKSTEP_REQUIRE_ALL=1, as CI sets, a skip is a failure: whoever skips looks.
func TestSkipsCount(t *testing.T) {
	for file, f := range goFiles(t) {
		for _, d := range f.Decls {
			skips, looks := false, false
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.SelectorExpr:
					skips = skips || slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, n.Sel.Name)
				case *ast.BasicLit:
					looks = looks || n.Value == `"LOCKSTEP_REQUIRE_ALL"`
				}
				return true
			})
			if fn, ok := d.(*ast.FuncDecl); ok && skips && !looks && strings.HasSuffix(file, "_test.go") {
				t.Errorf("%s: %s skips without looking at LOCKSTEP_REQUIRE_ALL", file, fn.Name.Name)
			}
		}
	}
}

var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func TestLicenceHeaders(t *testing.T) {
	for _, f := range files(t) {
		switch ext := filepath.Ext(f); {
		case strings.Contains(f, "testdata/"):
			continue
		case ext == ".go", ext == ".c", ext == ".h", ext == ".sh", ext == ".service",
			strings.HasPrefix(f, ".ci/"), path.Base(f) == "Makefile":
		default:
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if generated.Match(b) {
			continue
		}
		want := "Apache-2.0"
		if ext := filepath.Ext(f); ext == ".c" || ext == ".h" {
			want = "GPL-2.0-only OR BSD-2-Clause"
		}
		// In the first lines: a build constraint or #! may come before it.
		head := bytes.Join(bytes.SplitN(b, []byte("\n"), 6)[:min(5, bytes.Count(b, []byte("\n")))], []byte("\n"))
		if !bytes.Contains(head, []byte("SPDX-License-Identifier: "+want)) {
			t.Errorf("%s: the first lines lack SPDX-License-Identifier: %s", f, want)
		}
	}
}

// A path of the machine that it was written on means nothing elsewhere.
func TestNoMachinePaths(t *testing.T) {
	machine := regexp.MustCompile(`(^|[^\w.*-])/(work|root|home)/[a-z]`)
	for _, f := range files(t) {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if m := machine.Find(b); m != nil && f != "repo_test.go" {
			t.Errorf("%s: holds the path %q of somebody's machine", f, bytes.TrimSpace(m))
		}
	}
}

// Whoever reads the journal, the log or the counters looks for what is declared there:
// every kind and every reason is given by something.
func TestKindsAndReasonsAreGiven(t *testing.T) {
	declared := make(map[string]bool) // by name: is given
	kernel := regexp.MustCompile(`(?m)^\s+X\((\w+), "`)
	for _, m := range kernel.FindAllStringSubmatch(read(t, "bpf/abi.h"), -1) {
		declared["LS_R_"+m[1]] = false
	}
	files := goFiles(t)
	for file, kind := range map[string]string{"control/journal/journal.go": "Kind", "compare/reason.go": "Reason"} {
		before := len(declared)
		for _, d := range files[file].Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			of := ""
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				if id, ok := v.Type.(*ast.Ident); ok {
					of = id.Name
				}
				if of == kind && v.Names[0].Name != "ReasonCount" {
					declared[v.Names[0].Name] = false
				}
			}
		}
		if len(declared) < before+5 {
			t.Errorf("%s declares %d constants of type %s: does the test still find them?", file, len(declared)-before, kind)
		}
	}
	for file, f := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		inKinds := file == "control/journal/journal.go"
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				return n.Type == nil || file != "compare/reason.go" && !inKinds // not the declarations
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && (x.Name == "journal" || x.Name == "compare") {
					declared[n.Sel.Name] = true
				}
			case *ast.Ident:
				if file != "compare/reason.go" && (inKinds || path.Dir(file) == "compare") {
					declared[n.Name] = true
				}
			}
			return true
		})
	}
	for _, pattern := range []string{"bpf/*.c", "bpf/*.h"} {
		sources, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range sources {
			for _, name := range regexp.MustCompile(`\bLS_R_\w+`).FindAllString(read(t, file), -1) {
				declared[name] = true
			}
		}
	}
	for name, given := range declared {
		if !given {
			t.Errorf("nothing gives %s: remove it, or give it", name)
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestGuarantees: every test that docs/GUARANTEES.md names is there.
func TestGuarantees(t *testing.T) {
	doc, err := os.ReadFile("docs/GUARANTEES.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(?:([a-z/]+)\\.)?(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(doc), -1)
	if len(named) < 40 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, n := range named {
		dir := n[1]
		if dir == "" {
			dir = "cmd/lockstep/e2e"
		}
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: no tests in %s, %v", n[2], dir, err)
		}
		found := false
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || strings.Contains(string(b), "\nfunc "+n[2]+"(")
		}
		if !found {
			t.Errorf("%s has no %s", dir, n[2])
		}
	}
}

// TestRules: every rule that code or a document cites is in docs/RULES.md, every rule there
// is cited by code, and the files, functions, tests and mutations that it names are there;
// so are those of an event's and a setting's way in ARCHITECTURE.md, and the paths in all documents.
func TestRules(t *testing.T) {
	texts := make(map[string]string)
	for _, f := range files(t) {
		if info, err := os.Lstat(f); err != nil || !info.Mode().IsRegular() {
			continue
		}
		if b := read(t, f); utf8.ValidString(b) && !generated.MatchString(b) { // no objects and images
			texts[f] = b
		}
	}
	// This test's own table of faults cites rules that there are not.
	delete(texts, "rules_test.go")
	checkRules(texts, t.Errorf)
	checkWay(texts, "From the ring to the release", t.Errorf)
	checkWay(texts, "From the config file to a map", t.Errorf)
	checkPaths(texts, t.Errorf)
}

// TestMutate: only tests, and the simulator that they drive, switch rules off.
func TestMutate(t *testing.T) {
	for file, f := range goFiles(t) {
		if strings.HasSuffix(file, "_test.go") || path.Dir(file) == "sim" {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if s, ok := call.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "Mutate" {
					t.Errorf("%s switches a rule off", file)
				}
			}
			return true
		})
	}
}

// TestSoakList: what runs whole, or longer, in the soak alone is on its list.
func TestSoakList(t *testing.T) {
	b, err := os.ReadFile(".ci/soak")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`TESTS:-"([A-Za-z0-9|]+)"`).FindSubmatch(b)
	if list == nil {
		t.Fatal("no list of tests in .ci/soak")
	}
	names, found := strings.Split(string(list[1]), "|"), 0
	for file, f := range goFiles(t) {
		if path.Dir(file) != "cmd/lockstep/e2e" {
			continue
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			name, test := strings.CutPrefix(fn.Name.Name, "Test")
			if !test || name == "Main" {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Value == `"LOCKSTEP_SOAK"` {
					found++
					if !slices.Contains(names, name) {
						t.Errorf("%s has a form for the soak, and .ci/soak does not list %s", file, name)
					}
					return false
				}
				return true
			})
		}
	}
	if found == 0 {
		t.Error("no test has a form for the soak: this test looks for the wrong thing")
	}
}
