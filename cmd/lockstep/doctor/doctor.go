// SPDX-License-Identifier: Apache-2.0

// Package doctor finds out what a host lacks to run lockstep, and how to fix it. It
// changes nothing.
package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
)

// States of a check.
const (
	OK      = "ok"
	Warning = "warning" // it works without, or not always
	Missing = "missing" // it does not work
)

// Check is one thing looked at.
type Check struct {
	Name  string `json:"name"`
	State string `json:"state"`
	Found string `json:"found"`
	Fix   string `json:"fix,omitempty"` // how to fix it
}

// Report is what was found, in the order in which it was looked at.
type Report struct {
	CanRun bool    `json:"can_run"`
	Checks []Check `json:"checks"`
}

// doctor looks at one host, for one node of a config if there is one.
type doctor struct {
	m      machine
	root   bool // all capabilities are there
	checks []Check
}

func (d *doctor) ok(name, found string, a ...any) {
	d.checks = append(d.checks, Check{Name: name, State: OK, Found: fmt.Sprintf(found, a...)})
}

func (d *doctor) warn(name, fix, found string, a ...any) {
	d.checks = append(d.checks, Check{name, Warning, fmt.Sprintf(found, a...), fix})
}

func (d *doctor) missing(name, fix, found string, a ...any) {
	d.checks = append(d.checks, Check{name, Missing, fmt.Sprintf(found, a...), fix})
}

// try reports what an attempt gave, which only root can make.
func (d *doctor) try(name, fix, found string, attempt func() error) {
	if !d.root {
		d.warn(name, asRoot, "not tried: that needs root")
		return
	}
	if err := attempt(); err != nil {
		d.missing(name, fix, "%v", err)
		return
	}
	d.ok(name, "%s", found)
}

const asRoot = "run it as root: sudo lockstep doctor"

// patience bounds everything that may not answer.
const patience = 2 * time.Second

// Examine looks at this host, and with a config at what that requires of it: as the named
// node's, or, when node is "", as that of the node whose control address it has.
func Examine(ctx context.Context, c *config.Config, node string) Report {
	return examine(ctx, thisMachine, c, node)
}

func examine(ctx context.Context, m machine, c *config.Config, node string) Report {
	d := &doctor{m: m}
	d.host(ctx, c)
	if c != nil {
		d.pair(ctx, c, node)
	}
	r := Report{Checks: d.checks}
	r.CanRun = r.missing() == 0
	return r
}

func (r Report) missing() (n int) {
	for _, c := range r.Checks {
		if c.State == Missing {
			n++
		}
	}
	return n
}

// Err is nil when lockstep can run here.
func (r Report) Err() error {
	switch n := r.missing(); n {
	case 0:
		return nil
	case 1:
		return errors.New("cannot run here: 1 thing is missing")
	default:
		return fmt.Errorf("cannot run here: %d things are missing", n)
	}
}

// Write prints a report as JSON, or for people.
func (r Report) Write(out io.Writer, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(r)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range r.Checks {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.State, c.Name, c.Found)
		if c.Fix != "" {
			fmt.Fprintf(w, "\t\tto fix it: %s\n", c.Fix)
		}
	}
	return w.Flush()
}
