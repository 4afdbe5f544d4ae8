// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"testing"
)

// derived makes what the commands make of a config.
func derived(t *testing.T, c *Config, data []byte) {
	t.Helper()
	again, err := Parse("elsewhere.yaml", data)
	if err != nil || again.Hash() != c.Hash() {
		t.Errorf("read once more, under another name, it is %v, or another config", err)
	}
	for i := range c.Nodes {
		self, other, err := c.Node(c.Nodes[i].Name)
		if err != nil || self == other || len(self.NICs) == 0 || len(self.NICs) != len(other.NICs) {
			t.Fatalf("node %q: %v, %v, %v", c.Nodes[i].Name, self, other, err)
		}
		_, _ = c.Incoming(self), c.Socket(self.Name)
		_, _, _ = c.TLS.Files(self.Name)
		if c.QEMU == nil {
			continue
		}
		if spec := c.Guest(self); len(spec.NICs) != len(self.NICs) || spec.QMP == "" {
			t.Errorf("guest %+v of %+v", spec, self)
		}
	}
}

// Whatever the file holds, it is accepted, and then describes a pair, or refused with a place
// in it.
func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte(short))
	for _, s := range []string{"", "[", "{", "a: &x 1\nb: *x\n", "? [a]\n: b\n", "<<: {vm: x}", "vm: |\n  a\n", "nodes: {a: , b: }", "nodes: {a: {nics: [~]}, b: {nics: [[]]}}", "%YAML 1.2\n---\nvm: x\n...\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 { // the parser is slow on deep nesting
			return
		}
		c, err := Parse("pair.yaml", data)
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v, error %v", c, err)
		}
		if err == nil {
			derived(t, c, data)
			return
		}
		es := Errors(nil)
		if !errors.As(err, &es) || len(es) == 0 {
			t.Fatalf("%T: %v", err, err)
		}
		for _, e := range es {
			if e.Pos.File != "pair.yaml" || e.Pos.Line < 1 || e.Pos.Col < 1 || e.Reason == "" {
				t.Errorf("%+v", e)
			}
		}
	})
}
