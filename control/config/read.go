// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"lockstep/control/qemu"
)

const (
	maxNICs  = 16
	maxRules = 16 // of compare.primary_only
	maxDisks = 16
	maxWords = 256 // of qemu.extra and arbiter.command
	// maxSocket is what sun_path holds, its final zero left out.
	maxSocket = 107
)

// reader walks the file's tree by hand: that gives every message its own words
// and place.
type reader struct {
	file string
	errs Errors
	at   map[string]Pos
}

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
		{"nodes", "it says where the two hosts are", func(v value) { r.nodes(v, c) }},
		{"tls", needTLS, func(v value) { r.tls(v, &c.TLS) }},
		{"pin_dir", "", r.path(&c.PinDir)},
		{"run_dir", "", r.path(&c.RunDir)},
		{"state_dir", "", r.path(&c.StateDir)},
		{"heartbeat", "", func(v value) {
			r.mapping(v, []field{
				{"interval", "", r.duration(&c.Heartbeat.Interval, time.Millisecond, 10*time.Second)},
				{"timeout", "", r.duration(&c.Heartbeat.Timeout, 3*time.Millisecond, time.Minute)},
				{"speak", "", r.duration(&c.Heartbeat.Speak, 3*time.Millisecond, time.Minute)},
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
				{"mptcp", "", r.boolean(&c.Compare.MPTCP)},
				{"primary_only", "", func(v value) { r.rules(v, &c.Compare.PrimaryOnly) }},
			})
		}},
		{"checkpoint", "", func(v value) {
			r.mapping(v, []field{
				{"period", "", r.duration(&c.Checkpoint.Period, time.Millisecond, 24*time.Hour)},
				{"min_interval", "", r.duration(&c.Checkpoint.MinInterval, time.Millisecond, time.Hour)},
				{"target_pause", "", r.duration(&c.Checkpoint.TargetPause, 0, 10*time.Second)},
			})
		}},
		{"qemu", "", func(v value) { r.qemu(v, c) }},
		{"migration", "", func(v value) { r.migration(v, &c.Migration) }},
		{"arbiter", "", func(v value) { r.arbiter(v, &c.Arbiter) }},
	})
}

const needTLS = "name the files that `lockstep keys` makes (ca, cert, key), or write `tls: {insecure: true}` to let session keys travel in the clear"

func (r *reader) tls(v value, t *TLS) {
	before := len(r.errs)
	r.mapping(v, []field{
		{"insecure", "", r.boolean(&t.Insecure)},
		{"ca", "", r.path(&t.CA)},
		{"cert", "", r.path(&t.Cert)},
		{"key", "", r.path(&t.Key)},
		{"rekey", "", r.duration(&t.Rekey, time.Second, 24*time.Hour)},
	})
	if len(r.errs) > before {
		return
	}
	var named, missing []string
	for _, f := range []struct{ key, path string }{{"ca", t.CA}, {"cert", t.Cert}, {"key", t.Key}} {
		if f.path == "" {
			missing = append(missing, f.key)
		} else {
			named = append(named, f.key)
		}
	}
	switch {
	case t.Insecure && len(named) > 0:
		r.refuse(v.pos, "tls has both insecure: true and "+strings.Join(named, ", "), "keep the files for a protected link, or insecure: true for one in the clear")
	case !t.Insecure && len(named) == 0:
		r.refuse(v.pos, "tls names no files", needTLS)
	case !t.Insecure && len(missing) > 0:
		r.refuse(v.pos, "tls lacks "+strings.Join(missing, " and "), "ca, cert and key go together; `lockstep keys` makes all three")
	}
}

func (r *reader) qemu(v value, c *Config) {
	q := &QEMU{
		Guest: qemu.Guest{
			Binary: DefaultBinary, Machine: DefaultMachine, Accel: DefaultAccel,
			Memory: DefaultMemory, SMP: DefaultSMP, NICModel: DefaultNICModel,
		},
		FirstStart: FirstCompare,
	}
	c.QEMU = q
	r.mapping(v, []field{
		{"binary", "", r.program(&q.Binary)},
		{"machine", "", r.option(&q.Machine, `a machine of QEMU like "pc" or "q35"`)},
		{"accel", "", func(v value) {
			r.option(&q.Accel, "kvm or tcg")(v)
			if kind, _, _ := strings.Cut(q.Accel, ","); q.Accel != "" && kind != "kvm" && kind != "tcg" {
				r.refuse(v.pos, fmt.Sprintf("accel is %q", q.Accel), "it must be kvm or tcg; QEMU's options may follow behind a comma")
			}
		}},
		{"cpu", "", r.option(&q.CPU, `a CPU model of QEMU like "host"`)},
		{"memory", "", r.memory(&q.Memory)},
		{"smp", "", r.integer(&q.SMP, 1, 1024)},
		{"kernel", "", r.path(&q.Kernel)},
		{"initrd", "", r.path(&q.Initrd)},
		{"append", "", func(v value) { r.text(v, "the kernel's command line", func(s string) { q.Append = s }) }},
		{"disks", "", func(v value) {
			r.list(v, "a list like [{id: colo-disk0, image: web1.qcow2}]", maxDisks, func(v value) {
				var d qemu.Disk
				r.mapping(v, []field{
					{"id", "it names the drive on both nodes", r.diskID(&d.ID)},
					{"image", "it is the disk's file", r.path(&d.Image)},
					{"overlay_dir", "", r.path(&d.OverlayDir)},
				})
				q.Disks = append(q.Disks, d)
			})
		}},
		{"first_start", "", r.word(&q.FirstStart, FirstCompare, FirstCopy, FirstTrust)},
		{"nic_model", "", r.option(&q.NICModel, `a NIC of QEMU like "virtio-net-pci"`)},
		{"macs", "", func(v value) {
			r.list(v, `a list like ["52:54:00:12:34:56"]`, maxNICs, func(v value) { r.mac(v, &q.MACs) })
			if seq, ok := v.node.(*ast.SequenceNode); ok && len(seq.Values) == 0 {
				r.refuse(v.pos, "macs is empty", "give one per NIC, or remove the key for addresses that follow from vm")
			}
		}},
		{"user", "", r.user(&q.User)},
		{"extra", "", func(v value) {
			r.list(v, `a list of arguments like ["-display", "none"]`, maxWords, func(v value) {
				r.text(v, "one argument (put numbers in quotes)", func(s string) { q.Extra = append(q.Extra, s) })
			})
		}},
	})
}

func (r *reader) migration(v value, m *Migration) {
	port, nbd := int(m.Port), int(m.NBDPort)
	r.mapping(v, []field{
		{"port", "", r.integer(&port, 1, math.MaxUint16)},
		{"unix", "", r.socket(&m.Unix)},
		{"nbd_port", "", r.integer(&nbd, 1, math.MaxUint16)},
		{"bandwidth", "", r.memory(&m.Bandwidth)},
		{"auto_converge", "", r.boolean(&m.AutoConverge)},
		{"timeout", "", r.duration(&m.Timeout, time.Second, 7*24*time.Hour)},
	})
	m.Port, m.NBDPort = uint16(port), uint16(nbd)
}

const arbiterTypes = "etcd, file, exec or none"

func (r *reader) arbiter(v value, a *Arbiter) {
	before := len(r.errs)
	r.mapping(v, []field{
		{"type", "it says who decides which host may speak alone: " + arbiterTypes, r.word(&a.Type, ArbiterEtcd, ArbiterFile, ArbiterExec, ArbiterNone)},
		{"endpoints", "", func(v value) {
			r.list(v, `a list like ["192.0.2.9:2379"]`, 16, func(v value) { r.endpoint(v, &a.Endpoints) })
		}},
		{"tls", "", func(v value) { r.arbiterTLS(v, a) }},
		{"path", "", func(v value) {
			r.text(v, "an absolute path", func(s string) {
				switch {
				case strings.Contains(s, "{node}"):
					r.refuse(v.pos, "path contains {node}, which makes two records of one", "both hosts must use the same directory, on storage they share")
				case !filepath.IsAbs(s) || strings.ContainsRune(s, 0):
					r.refuse(v.pos, fmt.Sprintf("path %q is not absolute", s), "both hosts must use the same directory, on storage they share")
				default:
					a.Path = filepath.Clean(s)
				}
			})
		}},
		{"command", "", func(v value) {
			r.list(v, `a list like ["fence-host", "--ipmi"]`, maxWords, func(v value) {
				word := ""
				if len(a.Command) == 0 {
					r.program(&word)(v)
				} else {
					r.text(v, "one argument (put numbers in quotes)", func(s string) { word = s })
				}
				a.Command = append(a.Command, word)
			})
		}},
		{"timeout", "", r.duration(&a.Timeout, 10*time.Millisecond, 10*time.Minute)},
	})
	if len(r.errs) > before {
		return
	}
	for _, k := range []struct {
		key, of string
		there   bool
		why     string
	}{
		{"endpoints", ArbiterEtcd, len(a.Endpoints) > 0, "they are etcd's members"},
		{"tls", ArbiterEtcd, a.TLS != nil, ""},
		{"path", ArbiterFile, a.Path != "", "it is a directory for the records, on storage that both hosts share"},
		{"command", ArbiterExec, len(a.Command) > 0, "it is the program that fences the other host"},
	} {
		switch _, written := r.at[v.path+"."+k.key]; {
		case written && k.of != a.Type:
			r.refuse(r.at[v.path+"."+k.key], fmt.Sprintf("%s does not go with type %s", k.key, a.Type), fmt.Sprintf("remove it, or write type: %s", k.of))
		case k.of == a.Type && !k.there && k.why != "":
			r.refuse(v.pos, fmt.Sprintf("%s.%s is missing", v.path, k.key), k.why)
		}
	}
	if a.Timeout == 0 {
		a.Timeout = map[string]time.Duration{ArbiterEtcd: DefaultEtcdTimeout, ArbiterFile: DefaultFileTimeout, ArbiterExec: DefaultExecTimeout}[a.Type]
	}
}

// arbiterTLS: without any file it is as if the key were absent.
func (r *reader) arbiterTLS(v value, a *Arbiter) {
	var t TLSFiles
	before := len(r.errs)
	r.mapping(v, []field{
		{"ca", "", r.path(&t.CA)},
		{"cert", "", r.path(&t.Cert)},
		{"key", "", r.path(&t.Key)},
	})
	switch {
	case len(r.errs) > before || t == (TLSFiles{}):
	case t.CA == "":
		r.refuse(v.pos, "tls lacks ca", "it is the CA that signed the etcd servers' certificates")
	case (t.Cert == "") != (t.Key == ""):
		r.refuse(v.pos, "tls has one of cert and key", "they go together; leave both out where etcd asks for no client certificate")
	default:
		a.TLS = &t
	}
}

func (r *reader) endpoint(v value, to *[]string) {
	const want = `a host and a port like "192.0.2.9:2379"`
	r.text(v, want, func(s string) {
		host, port, err := net.SplitHostPort(s)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || perr != nil || n == 0 || host == "" || strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c == '/' || c > '~' }) {
			r.refuse(v.pos, fmt.Sprintf("%q cannot be an endpoint", s), "it must be "+want+"; whether TLS is used, arbiter.tls says")
			return
		}
		if slices.Contains(*to, s) {
			r.refuse(v.pos, fmt.Sprintf("endpoint %q is there twice", s), "keep one of the two")
		}
		*to = append(*to, s)
	})
}

func (r *reader) mac(v value, to *[]net.HardwareAddr) {
	const want = `a unicast MAC address like "52:54:00:12:34:56"`
	r.text(v, want, func(s string) {
		m, err := net.ParseMAC(s)
		if err != nil || len(m) != 6 || m[0]&1 != 0 || bytes.Equal(m, make([]byte, 6)) {
			r.refuse(v.pos, fmt.Sprintf("%q cannot be a guest's MAC address", s), "it must be "+want)
			return
		}
		if slices.ContainsFunc(*to, func(o net.HardwareAddr) bool { return bytes.Equal(o, m) }) {
			r.refuse(v.pos, fmt.Sprintf("MAC address %s is there twice", m), "give each NIC its own")
		}
		*to = append(*to, m)
	})
}

var userRE = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_-]*|[1-9][0-9]*:[0-9]+)$`)

func (r *reader) user(to *string) func(value) {
	return func(v value) {
		const want = `a user like "qemu", or uid:gid like "107:107"`
		r.text(v, want, func(s string) {
			if *to = s; !userRE.MatchString(s) || s == "root" {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be QEMU's user", s), "it must be "+want+"; without the key QEMU stays what lockstep is")
			}
		})
	}
}

// QEMU's names begin with a letter, have at most 31 characters, and lockstep
// puts a word of its own around them.
var diskRE = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,19}$`)

func (r *reader) diskID(to *string) func(value) {
	return func(v value) {
		r.text(v, `a name like "colo-disk0"`, func(s string) {
			if *to = s; !diskRE.MatchString(s) {
				r.refuse(v.pos, fmt.Sprintf("%q cannot be a disk's id", s), "use a letter, then up to 19 letters, digits, '-' and '_'")
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

// option is one word for QEMU's command line.
func (r *reader) option(to *string, want string) func(value) {
	return func(v value) {
		r.text(v, want, func(s string) {
			if *to = s; s == "" || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' }) {
				r.refuse(v.pos, fmt.Sprintf("%s is %q", v.path[strings.LastIndexByte(v.path, '.')+1:], s), "it must be "+want)
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

// maxMemory of a guest, in MiB: more is a mistake.
const maxMemory = 64 << 20

func (r *reader) memory(to *int64) func(value) {
	return func(v value) {
		const want = "a size like 512M or 4G"
		key := v.path[strings.LastIndexByte(v.path, '.')+1:]
		if n, ok := v.node.(*ast.IntegerNode); ok {
			r.refuse(v.pos, key+" is a bare number", fmt.Sprintf("give it a unit: %sM or %sG", n.Token.Value, n.Token.Value))
			return
		}
		r.text(v, want, func(s string) {
			n, mib := int64(0), int64(0)
			if s != "" {
				mib = map[byte]int64{'M': 1, 'G': 1 << 10, 'T': 1 << 20}[s[len(s)-1]]
				u, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
				if err != nil {
					mib = 0
				}
				n = int64(u)
			}
			if mib == 0 || n == 0 || n > maxMemory/mib {
				r.refuse(v.pos, fmt.Sprintf("%s is %q", key, s), fmt.Sprintf("it must be %s, at most %dT", want, maxMemory>>20))
				return
			}
			*to = n * mib << 20
		})
	}
}

func (r *reader) rules(v value, rules *[]Rule) {
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.wrongType(v, "a list like [{proto: udp, remote_port: 123}]")
		return
	}
	if len(seq.Values) > maxRules {
		r.refuse(v.pos, fmt.Sprintf("primary_only has %d rules, and there is room for %d", len(seq.Values), maxRules), "")
		return
	}
	for i, e := range seq.Values {
		var (
			rule          Rule
			guest, remote int
		)
		v := r.value(e, fmt.Sprintf("%s[%d]", v.path, i), v.pos)
		before := len(r.errs)
		r.mapping(v, []field{
			{"proto", "it says what leaves uncompared: udp, icmp, icmpv6 or an IP protocol's number", r.proto(&rule.Proto)},
			{"guest_port", "", r.integer(&guest, 1, math.MaxUint16)},
			{"remote_port", "", r.integer(&remote, 1, math.MaxUint16)},
		})
		if len(r.errs) > before {
			continue
		}
		if rule.Proto != protoUDP && (guest != 0 || remote != 0) {
			r.refuse(v.pos, fmt.Sprintf("IP protocol %d has no ports here", rule.Proto), "remove them, or write proto: udp")
		}
		rule.GuestPort, rule.RemotePort = uint16(guest), uint16(remote)
		*rules = append(*rules, rule)
	}
}

const (
	protoTCP, protoUDP = 6, 17
	// maxProto: 255 is what is not IP to the kernel half.
	maxProto = 254
)

func (r *reader) proto(to *uint8) func(value) {
	return func(v value) {
		n := protoTCP
		const want = "udp, icmp, icmpv6 or an IP protocol's number"
		switch s := v.node.(type) {
		case *ast.StringNode:
			var ok bool
			if n, ok = map[string]int{"icmp": 1, "tcp": protoTCP, "udp": protoUDP, "icmpv6": 58}[s.Value]; !ok {
				r.refuse(v.pos, fmt.Sprintf("proto %q is not known here", s.Value), "write "+want)
				return
			}
		case *ast.IntegerNode:
			before := len(r.errs)
			if r.integer(&n, 0, maxProto)(v); len(r.errs) > before {
				return
			}
		default:
			r.wrongType(v, want)
			return
		}
		if n == protoTCP {
			r.refuse(v.pos, "TCP cannot be primary-only: the SVM could not go on with a connection whose bytes it never said", "remove the rule")
			return
		}
		*to = uint8(n)
	}
}

func (r *reader) nodes(v value, c *Config) {
	kvs, ok := r.pairs(v)
	if !ok {
		return
	}
	if len(kvs) != 2 {
		r.refuse(v.pos, fmt.Sprintf("nodes has %s, and a pair has exactly two", count(len(kvs), "entry", "entries")), "")
		return
	}
	for i, kv := range kvs {
		n := &c.Nodes[i]
		r.checkName(kv.keyPos, kv.key, "a node's name")
		n.Name = kv.key
		r.mapping(kv.val, []field{
			{"control", "the daemons talk to each other there", r.addrPort(&n.Control)},
			{"nics", "it lists the guest's taps", func(v value) { r.nics(v, &n.NICs) }},
			{"qmp", "", r.socket(&n.QMP)},
		})
	}
}

func (r *reader) nics(v value, nics *[]NIC) {
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.wrongType(v, "a list like [{tap: tap0, peer: {device: eth1}}]")
		return
	}
	if len(seq.Values) == 0 || len(seq.Values) > maxNICs {
		r.refuse(v.pos, fmt.Sprintf("nics has %s, and a guest has 1 to %d", count(len(seq.Values), "entry", "entries"), maxNICs), "")
		return
	}
	for i, e := range seq.Values {
		nic := NIC{XDP: XDPAuto}
		r.mapping(r.value(e, fmt.Sprintf("%s[%d]", v.path, i), v.pos), []field{
			{"tap", "it is the guest's device in this host", r.device(&nic.Tap)},
			{"bridge", "", r.device(&nic.Bridge)},
			{"peer", "it is the link to the other host: {device: NAME} or {vxlan: {...}}", func(v value) { r.peer(v, &nic) }},
		})
		*nics = append(*nics, nic)
	}
}

func (r *reader) peer(v value, nic *NIC) {
	before := len(r.errs)
	r.mapping(v, []field{
		{"device", "", r.device(&nic.PeerDevice)},
		{"xdp", "", r.word(&nic.XDP, XDPAuto, XDPOn, XDPOff)},
		{"vxlan", "", func(v value) {
			x := &VXLAN{Port: DefaultVXLANPort}
			nic.PeerVXLAN = x
			var id, port = 0, int(x.Port)
			r.mapping(v, []field{
				{"id", "it is the VXLAN network identifier, the same on both nodes", r.integer(&id, 1, 1<<24-1)},
				{"port", "", r.integer(&port, 1, math.MaxUint16)},
				{"local", "it is this host's address on the underlay", r.addr(&x.Local)},
				{"remote", "it is the other host's address on the underlay", r.addr(&x.Remote)},
				{"underlay", "it is the device that carries the VXLAN", r.device(&x.Underlay)},
			})
			x.ID, x.Port = uint32(id), uint16(port)
		}},
	})
	if len(r.errs) > before {
		return
	}
	switch {
	case nic.PeerDevice == "" && nic.PeerVXLAN == nil:
		r.refuse(v.pos, "peer is empty", "write {device: NAME} or {vxlan: {...}}")
	case nic.PeerDevice != "" && nic.PeerVXLAN != nil:
		r.refuse(v.pos, "peer has both device and vxlan", "keep one of the two")
	}
}

// relations checks what one value says about another.
func (r *reader) relations(c *Config) {
	at := func(format string, a ...any) Pos { return c.pos(fmt.Sprintf(format, a...)) }
	a, b := &c.Nodes[0], &c.Nodes[1]
	if a.Control == b.Control {
		r.refuse(at("nodes.%s.control", b.Name), fmt.Sprintf("%s and %s have the same control address", a.Name, b.Name), "give each host its own")
	}
	if len(a.NICs) != len(b.NICs) {
		r.refuse(at("nodes.%s.nics", b.Name), fmt.Sprintf("%s has %s and %s has %d", a.Name, count(len(a.NICs), "NIC", "NICs"), b.Name, len(b.NICs)),
			"the guest is the same on both: list the same number, in the same order")
		return
	}
	for _, n := range c.Nodes {
		seen := make(map[string]string)
		use := func(dev, key string) {
			if was, dup := seen[dev]; dup {
				r.refuse(at("nodes.%s.%s", n.Name, key), fmt.Sprintf("device %q is already %s of this node", dev, was), "give each its own device")
				return
			}
			seen[dev] = key
		}
		for i, nic := range n.NICs {
			use(nic.Tap, fmt.Sprintf("nics[%d].tap", i))
			if v := nic.PeerVXLAN; v == nil {
				use(nic.PeerDevice, fmt.Sprintf("nics[%d].peer.device", i))
			} else {
				use(v.Device(), fmt.Sprintf("nics[%d].peer.vxlan.id", i))
				if v.Local.Is4() != v.Remote.Is4() || v.Local == v.Remote {
					r.refuse(at("nodes.%s.nics[%d].peer.vxlan.remote", n.Name, i), fmt.Sprintf("remote %s does not go with local %s", v.Remote, v.Local),
						"give two different addresses of one family")
				}
			}
		}
		if s := c.Socket(n.Name); len(s) > maxSocket {
			r.refuse(at("run_dir"), fmt.Sprintf("the status socket's path %q has %d bytes, and the kernel takes %d", s, len(s), maxSocket), "shorten run_dir, vm or the node's name")
		}
	}
	for i := range a.NICs {
		x, y := a.NICs[i].PeerVXLAN, b.NICs[i].PeerVXLAN
		if x == nil || y == nil {
			continue // the other end is somebody else's VXLAN device
		}
		differ := func(key string, got, want any) {
			if got != want {
				r.refuse(at("nodes.%s.nics[%d].peer.vxlan.%s", b.Name, i, key), fmt.Sprintf("%s is %v, and the other end of this link, on %s, makes it %v", key, got, a.Name, want),
					"the two ends must match")
			}
		}
		differ("id", y.ID, x.ID)
		differ("port", y.Port, x.Port)
		differ("local", y.Local, x.Remote)
		differ("remote", y.Remote, x.Local)
	}
	r.guest(c)
	if h := c.Heartbeat; h.Speak > h.Timeout {
		r.refuse(at("heartbeat.speak"), fmt.Sprintf("speak %v is above timeout %v", h.Speak, h.Timeout), "a host that counts as dead must have fallen silent; lower it")
	} else if h.Interval > h.Speak/3 {
		r.refuse(at("heartbeat.interval"), fmt.Sprintf("interval %v is above a third of speak %v", h.Interval, h.Speak), "one lost echo must not silence the guest; lower it or raise speak")
	}
	if h := &c.Heartbeat; h.Restart == 0 {
		h.Restart = max(DefaultHeartbeatRestart, h.Timeout)
	} else if h.Restart < h.Timeout {
		r.refuse(at("heartbeat.restart"), fmt.Sprintf("restart %v is below timeout %v", h.Restart, h.Timeout), "a daemon that ends on a living host is given at least the time of a host that is silent; raise it")
	}
	if c.Compare.CutDelay >= c.Compare.Timeout {
		r.refuse(at("compare.cut_delay"), fmt.Sprintf("cut_delay %v is not below timeout %v", c.Compare.CutDelay, c.Compare.Timeout), "a cut that waits for the timeout never happens; lower it")
	}
	if c.Checkpoint.MinInterval > c.Checkpoint.Period {
		r.refuse(at("checkpoint.min_interval"), fmt.Sprintf("min_interval %v is above period %v", c.Checkpoint.MinInterval, c.Checkpoint.Period), "lower it or raise the period")
	}
}

// guest checks how the guest is run and moved.
func (r *reader) guest(c *Config) {
	at := func(format string, a ...any) Pos { return c.pos(fmt.Sprintf(format, a...)) }
	m := &c.Migration
	if m.Port == m.NBDPort && m.Unix == "" {
		r.refuse(at("migration"), fmt.Sprintf("port and nbd_port are both %d", m.Port), "give each its own")
	}
	for _, n := range c.Nodes {
		if n.QMP == "" {
			continue // nothing migrates
		}
		for _, p := range []struct {
			key  string
			port uint16
		}{{"port", m.Port}, {"nbd_port", m.NBDPort}} {
			if p.port == n.Control.Port() && (p.key != "port" || m.Unix == "") {
				r.refuse(at("migration.%s", p.key), fmt.Sprintf("%s is %d, which %s uses for the control link", p.key, p.port, n.Name), "give each its own")
			}
		}
	}
	q := c.QEMU
	if q == nil {
		return
	}
	if accel, _, _ := strings.Cut(q.Accel, ","); accel == "tcg" && strings.HasPrefix(q.CPU+",", "host,") {
		r.refuse(at("qemu.cpu"), "cpu host needs accel kvm", "write another CPU model, or remove the key for max")
	}
	if q.User != "" && m.Unix != "" {
		r.refuse(at("qemu.user"), "user does not go with migration.unix: the other QEMU may not use the socket", "remove migration.unix, which is for two QEMUs on one host, or user")
	}
	if q.Kernel == "" && q.Initrd != "" {
		r.refuse(at("qemu.initrd"), "initrd needs kernel", "name the kernel, or remove initrd")
	}
	if q.Kernel == "" && q.Append != "" {
		r.refuse(at("qemu.append"), "append needs kernel", "name the kernel, or remove append")
	}
	if nics := len(c.Nodes[0].NICs); len(q.MACs) != nics {
		r.refuse(at("qemu.macs"), fmt.Sprintf("macs has %s, and the guest has %s", count(len(q.MACs), "entry", "entries"), count(nics, "NIC", "NICs")), "give one per NIC, or remove the key")
	}
	for i, d := range q.Disks {
		for j, o := range q.Disks[:i] {
			if d.ID == o.ID {
				r.refuse(at("qemu.disks[%d].id", i), fmt.Sprintf("id %q is already that of disks[%d]", d.ID, j), "give each disk its own")
			}
			if d.Image == o.Image {
				r.refuse(at("qemu.disks[%d].image", i), fmt.Sprintf("image %q is already that of disks[%d]", d.Image, j), "give each disk its own")
			}
		}
	}
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
