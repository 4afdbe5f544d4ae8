// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// value is one node of the tree with the path of keys that leads to it.
type value struct {
	node ast.Node
	path string
	pos  Pos
}

// field is one known key of a mapping.
type field struct {
	key  string
	need string // why it must be there; "": it need not
	read func(value)
}

// pair is one entry of a mapping.
type pair struct {
	key    string
	keyPos Pos
	val    value
}

// pairs lists a mapping's entries, or refuses what is none.
func (r *reader) pairs(v value) ([]pair, bool) {
	var kvs []*ast.MappingValueNode
	switch n := v.node.(type) {
	case *ast.MappingNode:
		kvs = n.Values
	case *ast.MappingValueNode:
		kvs = []*ast.MappingValueNode{n}
	default:
		r.wrongType(v, "a mapping like {key: value}")
		return nil, false
	}
	out := make([]pair, 0, len(kvs))
	for _, kv := range kvs {
		if kv == nil || kv.Key == nil {
			r.refuse(v.pos, "an entry without a key", "")
			return nil, false
		}
		tk := kv.Key.GetToken()
		pos := r.pos(tk, v.pos)
		s, ok := kv.Key.(*ast.StringNode)
		if !ok {
			word := ""
			if tk != nil {
				word = tk.Value
			}
			r.refuse(pos, fmt.Sprintf("key %q is not a plain string", word), "")
			return nil, false
		}
		path := s.Value
		if v.path != "" {
			path = v.path + "." + s.Value
		}
		out = append(out, pair{s.Value, pos, r.value(kv.Value, path, pos)})
	}
	return out, true
}

func (r *reader) value(n ast.Node, path string, or Pos) value {
	v := value{node: n, path: path, pos: or}
	if n != nil {
		v.pos = r.pos(n.GetToken(), or)
		// A block mapping's own token is its first colon: point at its first key.
		if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 && m.Values[0].Key != nil {
			v.pos = r.pos(m.Values[0].Key.GetToken(), v.pos)
		}
	}
	r.at[path] = v.pos
	return v
}

// renamed are keys by the name that they had, with the one that they have now. The old name
// is read for one release, with a warning.
var renamed = map[string]string{
	"heartbeat.speak": "heartbeat.lease",
}

// mapping reads the known keys, and refuses others and missing ones.
func (r *reader) mapping(v value, fields []field) {
	kvs, ok := r.pairs(v)
	if !ok {
		return
	}
	known := make([]string, len(fields))
	for i, f := range fields {
		known[i] = f.key
	}
	there := make(map[string]bool)
	for _, kv := range kvs {
		if now := renamed[kv.val.path]; now != "" {
			r.warnings = append(r.warnings, &Error{kv.keyPos, kv.val.path + " is called " + now + " now", "rename it: the next release does not read the old name"})
			kv.key, kv.val.path = now[strings.LastIndexByte(now, '.')+1:], now
			if _, both := r.at[now]; both {
				r.refuse(kv.keyPos, kv.key+" is there twice, once by its old name", "keep one of the two")
				continue
			}
			r.at[now] = kv.val.pos
		}
		i := slices.Index(known, kv.key)
		if i < 0 {
			r.refuse(kv.keyPos, fmt.Sprintf("unknown key %q", kv.key), suggest(kv.key, known))
			continue
		}
		there[kv.key] = true
		if _, null := kv.val.node.(*ast.NullNode); null || kv.val.node == nil {
			r.refuse(kv.val.pos, fmt.Sprintf("%s has no value", kv.key), "write one or remove the key")
			continue
		}
		fields[i].read(kv.val)
	}
	for _, f := range fields {
		if f.need != "" && !there[f.key] {
			r.refuse(v.pos, fmt.Sprintf("%s is missing", join(v.path, f.key)), f.need)
		}
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// wrongType refuses a value of another kind.
func (r *reader) wrongType(v value, want string) {
	key, is := v.path[strings.LastIndexByte(v.path, '.')+1:], "something else"
	if key == "" {
		key = "the file"
	}
	switch v.node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		is = "a mapping"
	case *ast.SequenceNode:
		is = "a list"
	case *ast.StringNode:
		is = "a string"
	case *ast.LiteralNode:
		is = "a block of text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		is = "a number"
	case *ast.BoolNode:
		is = "true or false"
	case *ast.NullNode, nil:
		is = "empty"
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode:
		r.refuse(v.pos, key+" uses a YAML anchor, alias or tag", "write the value itself: "+want)
		return
	}
	r.refuse(v.pos, fmt.Sprintf("%s is %s", key, is), "it must be "+want)
}

func (r *reader) text(v value, want string, use func(string)) {
	s, ok := v.node.(*ast.StringNode)
	if !ok {
		r.wrongType(v, want)
		return
	}
	use(s.Value)
}

// word takes one of some words.
func (r *reader) word(to *string, known ...string) func(value) {
	return func(v value) {
		want := "one of " + strings.Join(known, ", ")
		r.text(v, want, func(s string) {
			if *to = s; !slices.Contains(known, s) {
				r.refuse(v.pos, fmt.Sprintf("%s is %q", v.path[strings.LastIndexByte(v.path, '.')+1:], s), "it must be "+want)
			}
		})
	}
}

// list reads a sequence of at most limit values.
func (r *reader) list(v value, want string, limit int, each func(value)) {
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.wrongType(v, want)
		return
	}
	if len(seq.Values) > limit {
		r.refuse(v.pos, fmt.Sprintf("%s has %d entries, and there is room for %d", v.path[strings.LastIndexByte(v.path, '.')+1:], len(seq.Values), limit), "")
		return
	}
	for i, e := range seq.Values {
		each(r.value(e, fmt.Sprintf("%s[%d]", v.path, i), v.pos))
	}
}

// Names become file names in a bpffs, where a dot is refused.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$`)

func (r *reader) checkName(p Pos, s, what string) {
	if !nameRE.MatchString(s) {
		r.refuse(p, fmt.Sprintf("%q cannot be %s", s, what), "use up to 32 letters, digits, '-' and '_'")
	}
}

func (r *reader) name(to *string) func(value) {
	return func(v value) {
		r.text(v, `a name like "web1" (put digits in quotes)`, func(s string) {
			*to = s
			r.checkName(v.pos, s, "the VM's name")
		})
	}
}

func (r *reader) device(to *string) func(value) {
	return func(v value) {
		r.text(v, `a network device's name like "tap0"`, func(s string) {
			*to = s
			if s == "" || len(s) > 15 || s == "." || s == ".." || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c == '/' || c == ':' || c > '~' }) {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be a network device's name", s), "a name has 1 to 15 characters, no blanks, '/' or ':'")
			}
		})
	}
}

func (r *reader) path(to *string) func(value) {
	return func(v value) {
		r.text(v, "a path", func(s string) {
			switch {
			case s == "" || strings.ContainsRune(s, 0):
				r.refuse(v.pos, fmt.Sprintf("%q is not a path", s), "")
			case filepath.IsAbs(s):
				*to = filepath.Clean(s)
			default:
				*to = filepath.Join(filepath.Dir(r.file), s)
			}
		})
	}
}

// program takes what can be run wherever the config file is.
func (r *reader) program(to *string) func(value) {
	return func(v value) {
		const want = "a program's name, looked up in PATH, or its absolute path"
		r.text(v, want, func(s string) {
			if *to = s; s == "" || strings.ContainsRune(s, 0) || strings.ContainsRune(s, '/') && !filepath.IsAbs(s) {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be a program", s), "write "+want)
			}
		})
	}
}

func (r *reader) socket(to *string) func(value) {
	return func(v value) {
		r.path(to)(v)
		if len(*to) > maxSocket {
			r.refuse(v.pos, fmt.Sprintf("the socket's path %q has %d bytes, and the kernel takes %d", *to, len(*to), maxSocket), "use a shorter one")
		}
	}
}

func (r *reader) addrPort(to *netip.AddrPort) func(value) {
	return func(v value) {
		const want = `an IP address and a port like "192.0.2.1:7700" or "[2001:db8::1]:7700"`
		r.text(v, want, func(s string) {
			ap, err := netip.ParseAddrPort(s)
			if err != nil || ap.Port() == 0 || !usable(ap.Addr()) {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be a control address", s), "it must be "+want)
				return
			}
			*to = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		})
	}
}

func (r *reader) addr(to *netip.Addr) func(value) {
	return func(v value) {
		const want = `one host's IP address like "192.0.2.1"`
		r.text(v, want, func(s string) {
			a, err := netip.ParseAddr(s)
			if err != nil || !usable(a) {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be a host's address", s), "it must be "+want)
				return
			}
			*to = a.Unmap()
		})
	}
}

// usable: an address that one host can have and another can reach.
func usable(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func (r *reader) boolean(to *bool) func(value) {
	return func(v value) {
		b, ok := v.node.(*ast.BoolNode)
		if !ok {
			r.wrongType(v, "true or false")
			return
		}
		*to = b.Value
	}
}

func (r *reader) integer(to *int, lo, hi int) func(value) {
	return func(v value) {
		want := fmt.Sprintf("a whole number from %d to %d", lo, hi)
		key := v.path[strings.LastIndexByte(v.path, '.')+1:]
		n, ok := v.node.(*ast.IntegerNode)
		if s, isText := v.node.(*ast.StringNode); isText { // also a number beyond 64 bits
			r.refuse(v.pos, fmt.Sprintf("%s is %q", key, s.Value), "it must be "+want)
			return
		}
		if !ok {
			r.wrongType(v, want)
			return
		}
		var i int64
		switch x := n.Value.(type) {
		case int64:
			i = x
		case uint64:
			i = int64(min(x, math.MaxInt64))
		}
		if i < int64(lo) || i > int64(hi) {
			r.refuse(v.pos, fmt.Sprintf("%s is %s", key, n.Token.Value), "it must be "+want)
			return
		}
		*to = int(i)
	}
}

func (r *reader) duration(to *time.Duration, lo, hi time.Duration) func(value) {
	return func(v value) {
		key := v.path[strings.LastIndexByte(v.path, '.')+1:]
		if n, ok := v.node.(*ast.IntegerNode); ok {
			r.refuse(v.pos, fmt.Sprintf("%s is a bare number", key), fmt.Sprintf("give it a unit: %sms or %ss", n.Token.Value, n.Token.Value))
			return
		}
		want := "a time like 500ms or 20s"
		r.text(v, want, func(s string) {
			d, err := time.ParseDuration(s)
			if err != nil {
				r.refuse(v.pos, fmt.Sprintf("%s %q is not a time", key, s), "it must be "+want)
				return
			}
			if d < lo || d > hi {
				r.refuse(v.pos, fmt.Sprintf("%s is %v", key, d), fmt.Sprintf("it must be from %v to %v", lo, hi))
				return
			}
			*to = d
		})
	}
}
