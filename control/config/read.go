// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

const (
	maxNICs   = 16
	maxQueues = 64 // pairs, of a NIC
	maxRules  = 16 // of compare.primary_only
	maxDisks  = 16
	maxWords  = 256 // of qemu.extra and arbiter.command
	// maxSocket is what sun_path holds, its final zero left out.
	maxSocket = 107
)

// reader walks the file's tree by hand: that gives every message its own words
// and place.
type reader struct {
	file string
	errs Errors
	at   map[string]Pos

	warnings Errors
	spares   bool // there are more than two nodes
}

func (r *reader) refuse(p Pos, reason, fix string) {
	r.errs = append(r.errs, &Error{Pos: p, Reason: reason, Fix: fix})
}

// parse returns the file's mapping, or nil after refusing it.
func (r *reader) parse(data []byte) (root ast.Node) {
	top := Pos{File: r.file, Line: 1, Col: 1}
	if len(data) > maxFile {
		r.refuse(top, fmt.Sprintf("the file is larger than %d KiB", maxFile>>10), "is it a lockstep config?")
		return nil
	}
	defer func() { // the parser is not ours: a crash in it is a syntax error here
		if p := recover(); p != nil {
			r.refuse(top, "the file is not YAML", "")
			root = nil
		}
	}()
	f, err := parser.ParseBytes(data, 0)
	if err != nil {
		pos, msg := top, err.Error()
		var ye yaml.Error
		if errors.As(err, &ye) {
			pos, msg = r.pos(ye.GetToken(), top), ye.GetMessage()
		}
		if dup := new(yaml.SyntaxError); errors.As(err, &dup) && strings.HasPrefix(msg, "mapping key ") {
			r.refuse(pos, fmt.Sprintf("key %q is there twice", dup.Token.Value), "keep one of the two")
			return nil
		}
		r.refuse(pos, "not YAML: "+msg, "")
		return nil
	}
	var docs []ast.Node
	for _, d := range f.Docs {
		if d.Body != nil {
			docs = append(docs, d.Body)
		}
	}
	switch len(docs) {
	case 0:
		r.refuse(top, "the file is empty", "docs/CONFIG.md shows a whole one")
		return nil
	case 1:
		return docs[0]
	}
	r.refuse(r.pos(docs[1].GetToken(), top), "a second YAML document begins here", "use one file per VM")
	return nil
}

func (r *reader) pos(tk *token.Token, or Pos) Pos {
	if tk == nil || tk.Position == nil || tk.Position.Line < 1 {
		return or
	}
	return Pos{File: r.file, Line: tk.Position.Line, Col: max(tk.Position.Column, 1)}
}

func (r *reader) config(root ast.Node, c *Config) {
	top := value{node: root, pos: Pos{File: r.file, Line: 1, Col: 1}}
	r.mapping(top, []field{
		{"vm", "it names the guest in pins, sockets and logs", r.name(&c.VM)},
		{"nodes", "it describes the two hosts", func(v value) { r.nodes(v, c) }},
		{"tls", needTLS, func(v value) { r.tls(v, &c.TLS) }},
		{"pin_dir", "", r.path(&c.PinDir)},
		{"run_dir", "", r.path(&c.RunDir)},
		{"state_dir", "", r.path(&c.StateDir)},
		{"heartbeat", "", func(v value) {
			r.mapping(v, []field{
				{"interval", "", r.duration(&c.Heartbeat.Interval, time.Millisecond, 10*time.Second)},
				{"timeout", "", r.duration(&c.Heartbeat.Timeout, 3*time.Millisecond, time.Minute)},
				{"lease", "", r.duration(&c.Heartbeat.Lease, 3*time.Millisecond, time.Minute)},
				{"restart", "", r.duration(&c.Heartbeat.Restart, 3*time.Millisecond, time.Hour)},
			})
		}},
		{"compare", "", func(v value) {
			r.mapping(v, []field{
				{"timeout", "", r.duration(&c.Compare.Timeout, time.Millisecond, time.Hour)},
				{"cut_delay", "", r.duration(&c.Compare.CutDelay, time.Microsecond, time.Second)},
				{"max_connections", "", r.integer(&c.Compare.MaxConnections, 1, 1<<20)},
				{"slots", "", r.integer(&c.Compare.Slots, 16, 1<<20)},
				{"gso_slots", "", r.integer(&c.Compare.GSOSlots, 1, 1<<16)},
				{"fast_path", "", r.boolean(&c.Compare.FastPath)},
				{"mptcp", "", r.boolean(&c.Compare.MPTCP)},
				{"primary_only", "", func(v value) { r.rules(v, &c.Compare.PrimaryOnly) }},
			})
		}},
		{"checkpoint", "", func(v value) {
			r.mapping(v, []field{
				{"period", "", r.duration(&c.Checkpoint.Period, time.Millisecond, 24*time.Hour)},
				{"min_interval", "", r.duration(&c.Checkpoint.MinInterval, time.Millisecond, time.Hour)},
				{"target_pause", "", r.duration(&c.Checkpoint.TargetPause, 0, 10*time.Second)},
				{"periodic_above", "", r.integer(&c.Checkpoint.PeriodicAbove, 0, 6000)},
				{"epoch", "", r.duration(&c.Checkpoint.Epoch, 5*time.Millisecond, time.Second)},
			})
		}},
		{"qemu", "", func(v value) { r.qemu(v, c) }},
		{"migration", "", func(v value) { r.migration(v, &c.Migration) }},
		{"arbiter", "", func(v value) { r.arbiter(v, &c.Arbiter) }},
	})
}
