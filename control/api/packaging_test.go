// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
)

const packaging = "../../packaging/"

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(packaging + file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// alertRules are those of packaging/lockstep.rules.yaml.
func alertRules(t *testing.T) (exprs []string) {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(read(t, "lockstep.rules.yaml"), &file); err != nil {
		t.Fatal(err)
	}
	tests := string(read(t, "lockstep.rules.test.yaml"))
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			exprs = append(exprs, r.Expr)
			if n := strings.Count(tests, "alertname: "+r.Alert+"\n"); n == 0 {
				t.Errorf("no test in lockstep.rules.test.yaml has %s fire", r.Alert)
			}
		}
	}
	return exprs
}

type dashboard struct {
	Panels []struct {
		ID      int
		Title   string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr, LegendFormat, RefID string }
	}
	Templating struct{ List []struct{ Name string } }
}

// panelExprs are the dashboard's, with its variables filled in.
func panelExprs(t *testing.T) (exprs []string) {
	t.Helper()
	known := exported(t)
	var d dashboard
	if err := json.Unmarshal(read(t, "lockstep.dashboard.json"), &d); err != nil {
		t.Fatal(err)
	}
	for i, p := range d.Panels {
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if p.ID == q.ID || a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("the panels %q and %q have one id, or lie on each other", p.Title, q.Title)
			}
		}
		if p.GridPos.X+p.GridPos.W > 24 || len(p.Targets) == 0 {
			t.Errorf("the panel %q is too wide, or shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			expr := strings.NewReplacer("$vm", "web1", "$__rate_interval", "5m").Replace(q.Expr)
			if strings.Contains(expr, "$") {
				t.Errorf("the panel %q uses an unknown variable: %s", p.Title, expr)
			}
			exprs = append(exprs, expr)
			for _, label := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(q.LegendFormat, -1) {
				checkLabel(t, known, expr, label[1])
			}
		}
	}
	return exprs
}

var (
	metricName = regexp.MustCompile(`\b((?:lockstep|process|go)_\w+)(?:\{([^}]*)\})?`)
	labelLists = regexp.MustCompile(`\b(?:by|on|group_left) \(([^)]*)\)`)
	matcher    = regexp.MustCompile(`(\w+)=~?"([^"]*)"`)
)

// exported are the metrics of a real registry, each with the labels that it has there.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	cert := peerlinktest.NewAuthority(t, "ca").Files("alpha", "beta", "web1", nil).Cert
	r := api.Process{VM: "web1", Node: "alpha", Version: "v1", Certificates: map[string]string{"cert": cert}}.Registry(api.FullStatus)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string][]string)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			names := []string{"job", "instance"} // Prometheus adds them
			for _, l := range m.GetLabel() {
				names = append(names, l.GetName())
			}
			for _, suffix := range []string{"", "_bucket", "_sum", "_count"} {
				if suffix == "" || m.GetHistogram() != nil {
					labels[f.GetName()+suffix] = append(names, "le")
				}
			}
		}
	}
	return labels
}

// checkLabel: one of an expression's metrics has a label.
func checkLabel(t *testing.T, known map[string][]string, expr, label string) {
	t.Helper()
	for _, m := range metricName.FindAllStringSubmatch(expr, -1) {
		if slices.Contains(known[m[1]], label) {
			return
		}
	}
	t.Errorf("no metric in %q has a label %q", expr, label)
}

// What the alerts and the dashboard ask for is there: metrics, labels, and the words in them.
func TestPackagedMetrics(t *testing.T) {
	known := exported(t)
	rules, panels := alertRules(t), panelExprs(t)
	if len(rules) < 8 || len(panels) < 20 {
		t.Errorf("%d alerts, %d queries of the dashboard: does the test still find them?", len(rules), len(panels))
	}
	for _, expr := range slices.Concat(rules, panels) {
		metrics := metricName.FindAllStringSubmatch(expr, -1)
		if metrics == nil {
			t.Errorf("no metric in %q", expr)
		}
		for _, m := range metrics {
			labels, ok := known[m[1]]
			if !ok {
				t.Errorf("%s is not exported: %s", m[1], expr)
			}
			for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
				if !slices.Contains(labels, l[1]) {
					t.Errorf("%s has no label %s: %s", m[1], l[1], expr)
				}
				for _, word := range strings.Split(l[2], "|") {
					if _, ok := api.Explain(strings.ReplaceAll(word, ".*", "pvm")); l[1] == "reason" && !ok {
						t.Errorf("no reason %s: %s", word, expr)
					}
				}
			}
		}
		for _, list := range labelLists.FindAllStringSubmatch(expr, -1) {
			for _, label := range strings.Split(list[1], ", ") {
				checkLabel(t, known, expr, label)
			}
		}
	}
}

// Prometheus's own tool accepts the alerts, and they fire when they should; the dashboard's queries are valid, too.
func TestPromtoolRules(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil && os.Getenv("LOCKSTEP_REQUIRE_ALL") == "" {
		t.Skip("promtool is missing: apt-get install --no-install-recommends prometheus")
	}
	var queries strings.Builder
	queries.WriteString("groups:\n- name: dashboard\n  rules:\n")
	for i, expr := range panelExprs(t) {
		fmt.Fprintf(&queries, "  - record: query:%d\n    expr: %q\n", i, expr)
	}
	file := filepath.Join(t.TempDir(), "queries.yaml")
	if err := os.WriteFile(file, []byte(queries.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", packaging + "lockstep.rules.yaml", file}, {"test", "rules", packaging + "lockstep.rules.test.yaml"}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
