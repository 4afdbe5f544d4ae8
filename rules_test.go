// SPDX-License-Identifier: Apache-2.0

package lockstep

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The check of docs/RULES.md, of the way of an event in ARCHITECTURE.md and of the paths in
// all documents: what they name has to exist, under the name and at the place that they give.

// rule is a section of docs/RULES.md.
type rule struct {
	name  string              // "R1"
	lists map[string][]string // the words in backquotes of its lines "- Enforced: …", by "Enforced"
}

var (
	ruleHead  = regexp.MustCompile(`(?m)^## (R\d+)\b.*$`)
	ruleList  = regexp.MustCompile(`(?m)^- (Enforced|Tests|Mutations): (.*)$`)
	quoted    = regexp.MustCompile("`([^`\\n]+)`")             // and no block of code
	citation  = regexp.MustCompile(`(?:\basm\.)?\bR\d{1,2}\b`) // asm.R0 is a register of the kernel's machine
	testName  = regexp.MustCompile(`^(?:([a-z0-9/]+)\.)?(Test\w+)$`)
	sourceExt = regexp.MustCompile(`\.(go|c|h)$`)
	mutation  = regexp.MustCompile(`\b(?:mut[A-Z]\w*|LS_MUTATE_\w+)\b`)
	anyList   = []string{"Enforced", "Tests", "Mutations"}
)

// parseRules reads docs/RULES.md. What is not in order is told to fault.
func parseRules(doc string, fault func(format string, args ...any)) (rules []rule) {
	heads := ruleHead.FindAllStringSubmatchIndex(doc, -1)
	for i, h := range heads {
		end := len(doc)
		if next := strings.Index(doc[h[1]:], "\n## "); next >= 0 {
			end = h[1] + next
		}
		r := rule{name: doc[h[2]:h[3]], lists: make(map[string][]string)}
		if want := fmt.Sprintf("R%d", i); r.name != want {
			fault("the rule at place %d is %s, want %s", i, r.name, want)
		}
		body := doc[h[1]:end]
		for _, part := range []string{"**What.** ", "**Why.** "} {
			if !strings.Contains(body, part) {
				fault("%s has no paragraph %q", r.name, strings.TrimSpace(part))
			}
		}
		for _, l := range ruleList.FindAllStringSubmatch(body, -1) {
			for _, q := range quoted.FindAllStringSubmatch(l[2], -1) {
				r.lists[l[1]] = append(r.lists[l[1]], q[1])
			}
		}
		for _, list := range anyList {
			if len(r.lists[list]) == 0 {
				fault("%s: the line \"- %s:\" is missing or names nothing", r.name, list)
			}
		}
		rules = append(rules, r)
	}
	return rules
}

// checkRules tells fault what is wrong with docs/RULES.md. files are the repository's
// texts, by path.
func checkRules(files map[string]string, fault func(format string, args ...any)) {
	const doc = "docs/RULES.md"
	rules := parseRules(files[doc], fault)
	known, cited, listed := make(map[string]bool), make(map[string]bool), make(map[string]bool)
	for _, r := range rules {
		known[r.name] = true
		for _, word := range r.lists["Mutations"] {
			listed[word] = true
		}
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		for _, c := range citation.FindAllString(files[file], -1) {
			if strings.HasPrefix(c, "asm.") {
				continue
			}
			if !known[c] {
				fault("%s cites %s, which %s does not have", file, c, doc)
			}
			if isCode(file) {
				cited[c] = true
			}
		}
		for _, m := range mutation.FindAllString(files[file], -1) {
			if isCode(file) && !listed[m] {
				fault("%s has the mutation %s, which no rule in %s lists", file, m, doc)
				listed[m] = true // once
			}
		}
	}
	for _, r := range rules {
		if !cited[r.name] {
			fault("no code cites %s", r.name)
		}
		checkPlaces(files, r.name, r.lists["Enforced"], fault)
		for _, word := range r.lists["Tests"] {
			if !testName.MatchString(word) {
				fault("%s: %q is no test", r.name, word)
				continue
			}
			checkTest(files, r.name, word, fault)
		}
		checkMutations(files, &r, fault)
	}
}

// isCode reports whether a file is source and no test.
func isCode(file string) bool {
	return sourceExt.MatchString(file) && !strings.HasSuffix(file, "_test.go")
}

// checkPlaces checks words that name, by turns, a file and functions in it.
func checkPlaces(files map[string]string, where string, words []string, fault func(format string, args ...any)) {
	file, none := "", false
	for _, word := range words {
		if sourceExt.MatchString(word) {
			if none {
				fault("%s: no function is named of %s", where, file)
			}
			file, none = word, true
			if files[file] == "" {
				fault("%s: there is no file %s", where, file)
			}
			continue
		}
		none = false
		if defines(file, files[file], word) {
			continue
		}
		var instead []string
		for other, text := range files {
			if isCode(other) && defines(other, text, word) {
				instead = append(instead, other)
			}
		}
		slices.Sort(instead)
		fault("%s: %s defines no %s; it is defined in %v", where, file, word, instead)
	}
	if none {
		fault("%s: no function is named of %s", where, file)
	}
}

// defines reports whether a file of Go or C defines a function.
func defines(file, text, name string) bool {
	if !strings.Contains(text, name) {
		return false
	}
	switch path.Ext(file) {
	case ".c", ".h":
		return regexp.MustCompile(`(?m)^\w[^;=\n]*\b` + regexp.QuoteMeta(name) + `\(`).MatchString(text)
	case ".go":
		f, err := parser.ParseFile(token.NewFileSet(), file, text, parser.SkipObjectResolution)
		return err == nil && slices.ContainsFunc(f.Decls, func(d ast.Decl) bool {
			fn, ok := d.(*ast.FuncDecl)
			return ok && fn.Name.Name == name
		})
	}
	return false
}

// checkTest checks that there is a test, named as in docs/GUARANTEES.md, and returns the
// texts of its package's tests.
func checkTest(files map[string]string, where, word string, fault func(format string, args ...any)) (tests string) {
	m := testName.FindStringSubmatch(word)
	dir := m[1]
	if dir == "" {
		dir = "cmd/lockstep/e2e"
	}
	head, instead := "\nfunc "+m[2]+"(", []string{}
	for file, text := range files {
		switch {
		case !strings.HasSuffix(file, "_test.go"):
		case path.Dir(file) == dir:
			tests += text
		case strings.Contains(text, head):
			instead = append(instead, path.Dir(file))
		}
	}
	if !strings.Contains(tests, head) {
		slices.Sort(instead)
		fault("%s: %s has no %s; it is in %v", where, dir, m[2], instead)
	}
	return tests
}

// checkMutations checks a rule's switches, which come before the tests that turn them: the
// tests of that package set them, and code that is no test goes by them.
func checkMutations(files map[string]string, r *rule, fault func(format string, args ...any)) {
	var switches []string
	tests := 0
	for _, word := range r.lists["Mutations"] {
		if !testName.MatchString(word) {
			if tests > 0 {
				switches, tests = nil, 0
			}
			switches = append(switches, word)
			found := false
			for file, text := range files {
				found = found || isCode(file) && names(file, text, word)
			}
			if !found {
				fault("%s: no code goes by the switch %s", r.name, word)
			}
			continue
		}
		if len(switches) == 0 {
			fault("%s: the test %s stands behind no switch", r.name, word)
		}
		tests++
		text := checkTest(files, r.name, word, fault)
		for _, s := range switches {
			if !names("_test.go", text, s) {
				fault("%s: the tests beside %s do not turn the switch %s", r.name, word, s)
			}
		}
	}
	if tests == 0 && len(r.lists["Mutations"]) > 0 {
		fault("%s: no test is named that a mutation makes fail", r.name)
	}
}

// names reports whether a file has an identifier, in Go also behind the prefix that bpf2go
// gives those of C.
func names(file, text, word string) bool {
	if !strings.Contains(text, word) {
		return false
	}
	switch path.Ext(file) {
	case ".c", ".h":
		return regexp.MustCompile(`\b` + regexp.QuoteMeta(word) + `\b`).MatchString(text)
	case ".go":
		var s scanner.Scanner
		s.Init(token.NewFileSet().AddFile(file, -1, len(text)), []byte(text), nil, 0)
		for {
			switch _, tok, lit := s.Scan(); {
			case tok == token.EOF:
				return false
			case tok == token.IDENT && (lit == word || strings.HasPrefix(word, "LS_") && strings.HasSuffix(lit, word)):
				return true
			}
		}
	}
	return false
}

// checkWay checks a way through the code, a numbered list in a section of ARCHITECTURE.md:
// at most ten hops, each with file and function.
func checkWay(files map[string]string, section string, fault func(format string, args ...any)) {
	const doc = "ARCHITECTURE.md"
	_, way, ok := strings.Cut(files[doc], "\n## "+section+"\n")
	if !ok {
		fault("%s has no section %q", doc, section)
		return
	}
	way, _, _ = strings.Cut(way, "\n## ")
	hops := regexp.MustCompile(`(?m)^\d+\. .*(?:\n   .*)*`).FindAllString(way, -1)
	if len(hops) == 0 || len(hops) > 10 {
		fault("%s: %s: %d hops, want 1 to 10", doc, section, len(hops))
	}
	for i, hop := range hops {
		var words []string
		for _, q := range quoted.FindAllStringSubmatch(hop, -1) {
			words = append(words, q[1])
		}
		if len(words) == 0 || !sourceExt.MatchString(words[0]) {
			fault("%s: %s: hop %d does not begin with a file", doc, section, i+1)
			continue
		}
		checkPlaces(files, fmt.Sprintf("%s: %s: hop %d", doc, section, i+1), words, fault)
	}
}

// inFile is "`a`, `b` in `dir/file.go`".
var inFile = regexp.MustCompile("((?:`\\w+`(?:, | and ))*`\\w+`) in `([\\w./]+/[\\w.]+\\.(?:go|c|h))`")

var ourPath = regexp.MustCompile(`^(?:bench|bpf|cmd|compare|control|docs|loader|packaging|rewriter)/[\w./*-]+$`)

// checkPaths checks that the documents name files, folders and patterns that are there, and
// functions that are in the files named.
func checkPaths(files map[string]string, fault func(format string, args ...any)) {
	there := make(map[string]bool)
	for file := range files {
		for p := file; p != "."; p = path.Dir(p) {
			there[p] = true
		}
	}
	for file, text := range files {
		if path.Ext(file) != ".md" {
			continue
		}
		for _, m := range inFile.FindAllStringSubmatch(text, -1) {
			words := []string{m[2]}
			for _, q := range quoted.FindAllStringSubmatch(m[1], -1) {
				words = append(words, q[1])
			}
			checkPlaces(files, file, words, fault)
		}
		for _, q := range quoted.FindAllStringSubmatch(text, -1) {
			p := strings.TrimSuffix(q[1], "/")
			if !ourPath.MatchString(p) || strings.Contains(p, ".Test") || there[p] {
				continue
			}
			found := false
			for t := range there {
				matches, err := path.Match(p, t)
				found = found || matches && err == nil
			}
			if !found {
				fault("%s names %s, which is not there", file, p)
			}
		}
	}
}

// TestRulesFaults: each kind of fault is found, and a repository without one passes.
func TestRulesFaults(t *testing.T) {
	section := func(name string) string {
		return "## " + name + ". A rule\n\n**What.** It says so.\n\n**Why.** Because.\n\n" +
			"- Enforced: `p/a.go` `Guard`, `guard`; `p/b.c` `check`\n- Tests: `p.TestGuard`, `TestWhole` (real guests)\n- Mutations: `noGuard` by `p.TestMutation`; `LS_CHECK` by `p.TestMutation`\n\n"
	}
	whole := func() map[string]string {
		return map[string]string{
			"docs/RULES.md":              "# Rules\n\n" + section("R0") + section("R1") + "## Glossary\n",
			"ARCHITECTURE.md":            "# How\n\n## From the ring to the release\n\nAn event.\n\n1. `p/a.go` `Guard` reads\n   on.\n2. `p/b.c` `check`.\n\n## More\n\n1. Other lists.\n",
			"p/a.go":                     "package p\n\n// Guard is R0, R1.\nfunc (g *T) Guard() { noGuard = asm.R0 }\n\nfunc guard() {}\n",
			"p/b.c":                      "static __always_inline int check(int a)\n{\n\treturn LS_CHECK;\n}\n",
			"p/a_test.go":                "package p\n\nfunc TestGuard(t) {}\n\nfunc TestMutation(t) { noGuard, LsLS_CHECK }\n",
			"cmd/lockstep/e2e/x_test.go": "package main\n\nfunc TestWhole(t) {} // R1\n",
			"p/testdata/transcripts/r0":  "# R0: it says so.\n",
			"docs/other.md":              "```\nR1\n```\nR0 and R0-R1; `compare/`, `compare/*.go`, `compare/x.go`, `compare.TestX`; `Guard`, `guard` in `p/a.go`.\n",
			"compare/x.go":               "package compare\n",
			"cmd/lockstep/unrelated.txt": "",
		}
	}
	for _, c := range []struct {
		name, file, old, new, fault string
	}{
		{name: "none"},
		{"unknown rule in Go", "p/a.go", "R1.", "R7.", "p/a.go cites R7, which docs/RULES.md does not have"},
		{"unknown rule in C", "p/b.c", "{\n", "{ /* R27 */\n", "p/b.c cites R27"},
		{"unknown rule in a doc", "docs/other.md", "R0-R1", "R0-R9", "docs/other.md cites R9"},
		{"unknown rule in a transcript", "p/testdata/transcripts/r0", "R0", "R2", "cites R2"},
		{"unknown rule in the rules", "docs/RULES.md", "Because", "Because of R3", "docs/RULES.md cites R3"},
		{"cited by tests alone", "p/a.go", ", R1.", ".", "no code cites R1"},
		{"a number left out", "docs/RULES.md", "## R1.", "## R2.", "the rule at place 1 is R2, want R1"},
		{"no what", "docs/RULES.md", "**What.** ", "", `R0 has no paragraph "**What.**"`},
		{"no why", "docs/RULES.md", "**Why.** ", "", `R0 has no paragraph "**Why.**"`},
		{"enforced nowhere", "docs/RULES.md", "- Enforced:", "- Found:", `R0: the line "- Enforced:" is missing`},
		{"no test", "docs/RULES.md", "`p.TestGuard`, `TestWhole` (real guests)", "none", `R0: the line "- Tests:" is missing or names nothing`},
		{"no mutation", "docs/RULES.md", "- Mutations:", "- Mutants:", `R0: the line "- Mutations:" is missing`},
		{"file that moved", "docs/RULES.md", "p/b.c", "p/c.c", "R0: there is no file p/c.c"},
		{"Go function that moved", "docs/RULES.md", "`guard`", "`check`", "R0: p/a.go defines no check; it is defined in [p/b.c]"},
		{"C function that was renamed", "p/b.c", "check(", "look(", "R1: p/b.c defines no check; it is defined in []"},
		{"C function that is only called", "p/b.c", "int check(int a)\n{", "int look(int a)\n{\n\tcheck(a);", "R1: p/b.c defines no check"},
		{"file without a function", "docs/RULES.md", "`p/b.c` `check`", "`p/b.c`", "R0: no function is named of p/b.c"},
		{"test that is gone", "p/a_test.go", "TestGuard(", "TestGuards(", "R1: p has no TestGuard; it is in []"},
		{"end-to-end test that is gone", "cmd/lockstep/e2e/x_test.go", "TestWhole(", "Whole(", "R1: cmd/lockstep/e2e has no TestWhole"},
		{"test that moved", "docs/RULES.md", "`TestWhole`", "`p.TestWhole`", "R0: p has no TestWhole; it is in [cmd/lockstep/e2e]"},
		{"word that is no test", "docs/RULES.md", "`p.TestGuard`", "`guard`", `R0: "guard" is no test`},
		{"mutation's test that is gone", "p/a_test.go", "TestMutation(", "Mutation(", "R1: p has no TestMutation"},
		{"switch that nothing goes by", "p/a.go", "noGuard", "nothing", "R1: no code goes by the switch noGuard"},
		{"switch in C that nothing goes by", "p/b.c", "LS_CHECK", "0", "R1: no code goes by the switch LS_CHECK"},
		{"switch that only a comment names", "p/a.go", "noGuard =", "nothing = // noGuard\n", "R1: no code goes by the switch noGuard"},
		{"switch that no test turns", "p/a_test.go", "noGuard, ", "", "R1: the tests beside p.TestMutation do not turn the switch noGuard"},
		{"mutation that no rule lists", "p/b.c", "return LS_CHECK", "return LS_CHECK & LS_MUTATE_R1", "p/b.c has the mutation LS_MUTATE_R1, which no rule in docs/RULES.md lists"},
		{"mutation without a switch", "docs/RULES.md", "`noGuard` by ", "", "R0: the test p.TestMutation stands behind no switch"},
		{"mutation without a test", "docs/RULES.md", "`noGuard` by `p.TestMutation`; `LS_CHECK` by `p.TestMutation`", "`noGuard`", "R0: no test is named that a mutation makes fail"},
		{"path that moved", "docs/other.md", "compare/x.go", "compare/y.go", "docs/other.md names compare/y.go, which is not there"},
		{"function that is not in the file", "docs/other.md", "`guard` in", "`check` in", "docs/other.md: p/a.go defines no check"},
		{"pattern without a file", "docs/other.md", "compare/*.go", "compare/*.c", "docs/other.md names compare/*.c"},
		{"no way", "ARCHITECTURE.md", "From the ring", "Along the ring", "ARCHITECTURE.md has no section"},
		{"hop without a file", "ARCHITECTURE.md", "1. `p/a.go` ", "1. ", "ARCHITECTURE.md: From the ring to the release: hop 1 does not begin with a file"},
		{"hop that moved", "ARCHITECTURE.md", "`check`", "`guard`", "ARCHITECTURE.md: From the ring to the release: hop 2: p/b.c defines no guard; it is defined in [p/a.go]"},
		{"too many hops", "ARCHITECTURE.md", "\n## More", strings.Repeat("3. `p/b.c` `check`.\n", 9) + "\n## More", "ARCHITECTURE.md: From the ring to the release: 11 hops"},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := whole()
			if c.file != "" {
				if !strings.Contains(files[c.file], c.old) {
					t.Fatalf("%s lacks %q", c.file, c.old)
				}
				files[c.file] = strings.Replace(files[c.file], c.old, c.new, 1)
			}
			var faults []string
			note := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
			checkRules(files, note)
			checkWay(files, "From the ring to the release", note)
			checkPaths(files, note)
			if c.fault == "" && len(faults) > 0 || c.fault != "" && !slices.ContainsFunc(faults, func(f string) bool { return strings.Contains(f, c.fault) }) {
				t.Errorf("found %q, want %q", faults, c.fault)
			}
		})
	}
}
