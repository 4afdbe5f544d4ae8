// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/lockstep-ft/lockstep/control/qemu"
)

// QEMU describes the guest. Where lockstep attaches to a QEMU that runs, only
// MACs and Disks mean anything.
type QEMU struct {
	qemu.Guest // "{node}" in Kernel, Initrd, Append, Extra and the disks' paths: see [Config.Guest]
	// FirstStart is what is done about the disks' contents before the first replication:
	// one of the constants below.
	FirstStart string
	MACs       []net.HardwareAddr // one per NIC, the same on both nodes
}

// Values of QEMU.FirstStart.
const (
	FirstCompare = "compare" // refuse images that are not the same
	FirstCopy    = "copy"    // the primary's over the secondary's
	FirstTrust   = "trust"   // the operator has copied them
)

// Guest is the config's guest on a node, as QEMU is started with it there. The config
// has a qemu section.
func (c *Config) Guest(n *Node) qemu.Spec {
	s := qemu.Spec{VM: c.VM, Node: n.Name, Guest: c.QEMU.Guest, QMP: n.QMP, Dir: c.RunDir}
	s.Kernel, s.Initrd, s.Append = forNode(s.Kernel, n.Name), forNode(s.Initrd, n.Name), forNode(s.Append, n.Name)
	s.Disks, s.Extra = slices.Clone(s.Disks), slices.Clone(s.Extra)
	for i := range s.Disks {
		d := &s.Disks[i]
		d.Image, d.OverlayDir = forNode(d.Image, n.Name), forNode(d.OverlayDir, n.Name)
	}
	for i := range s.Extra {
		s.Extra[i] = forNode(s.Extra[i], n.Name)
	}
	for i, nic := range n.NICs {
		s.NICs = append(s.NICs, qemu.NIC{Tap: nic.Tap, MAC: c.QEMU.MACs[i], Queues: nic.Queues, VHost: nic.VHost})
	}
	return s
}

// MAC is the address of a guest's NIC where the config gives none. A guest's
// NICs differ in the last byte, so never collide.
func MAC(vm string, nic int) net.HardwareAddr {
	h := sha256.Sum256([]byte("lockstep mac " + vm))
	return net.HardwareAddr{0x52, 0x54, 0x00, h[0], h[1], h[2] + byte(nic)}
}

// Migration is where the secondary's QEMU waits for the primary's, on the
// secondary's control address, and how the guest is copied there.
type Migration struct {
	Port    uint16
	Unix    string // a socket instead of Port, where both QEMUs are on one host
	NBDPort uint16 // of the disks
	qemu.Limits
}

// Incoming is where a node's QEMU waits as a secondary.
func (c *Config) Incoming(n *Node) qemu.Incoming {
	host := n.Control.Addr()
	in := qemu.Incoming{
		Migration: "tcp:" + netip.AddrPortFrom(host, c.Migration.Port).String(),
		NBD:       netip.AddrPortFrom(host, c.Migration.NBDPort),
	}
	if c.Migration.Unix != "" {
		in.Migration = "unix:" + c.Migration.Unix
	}
	return in
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
					{"format", "", r.word(&d.Format, "qcow2", "raw")},
					{"cache", "", r.word(&d.Cache, qemu.CacheWriteback, qemu.CacheNone, qemu.CacheWritethrough, qemu.CacheDirectsync)},
					{"aio", "", r.word(&d.AIO, "threads", "native", "io_uring")},
					{"discard", "", r.boolean(&d.Discard)},
				})
				q.Disks = append(q.Disks, d)
			})
		}},
		{"first_start", "", r.word(&q.FirstStart, FirstCompare, FirstCopy, FirstTrust)},
		{"nic_model", "", r.option(&q.NICModel, `a NIC of QEMU like "virtio-net-pci"`)},
		{"offloads", "", func(v value) { q.Offloads = offloads(r, v) }},
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

func offloads(r *reader, v value) map[string]bool {
	set := make(map[string]bool)
	on := make([]bool, len(qemu.Offloads))
	fields := make([]field, len(on))
	for i, name := range qemu.Offloads {
		fields[i] = field{name, "", func(v value) {
			r.boolean(&on[i])(v)
			set[name] = on[i]
		}}
	}
	r.mapping(v, fields)
	return set
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

// maxMemory of a guest, in KiB: more is a mistake.
const maxMemory = 64 << 30

func (r *reader) memory(to *int64) func(value) {
	return func(v value) {
		const want = "a size like 512M or 4G"
		key := v.path[strings.LastIndexByte(v.path, '.')+1:]
		if n, ok := v.node.(*ast.IntegerNode); ok {
			r.refuse(v.pos, key+" is a bare number", fmt.Sprintf("give it a unit: %sM or %sG", n.Token.Value, n.Token.Value))
			return
		}
		r.text(v, want, func(s string) {
			n, kib := int64(0), int64(0)
			if s != "" {
				kib = map[byte]int64{'K': 1, 'M': 1 << 10, 'G': 1 << 20, 'T': 1 << 30}[s[len(s)-1]]
				u, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
				if err != nil {
					kib = 0
				}
				n = int64(u)
			}
			if kib == 0 || n == 0 || n > maxMemory/kib {
				r.refuse(v.pos, fmt.Sprintf("%s is %q", key, s), fmt.Sprintf("it must be %s, at most %dT", want, maxMemory>>30))
				return
			}
			*to = n * kib << 10
		})
	}
}

// Unfit refuses a config whose sections do not go together on a node: a pair that is believed to
// fail over, and does not, is worse than none.
func (c *Config) Unfit(self *Node) error {
	switch {
	case self.Starts && c.Arbiter.Type == "":
		return c.Refuse("qemu", "a pair that lockstep starts has to have an arbiter", "name one; {type: none} lets either host transmit when it has lost the other")
	case self.QMP == "" && c.Arbiter.Type != "":
		return c.Refuse("arbiter", "without QEMU's socket no node can take over", fmt.Sprintf("describe the guest with qemu, or name its socket with nodes.%s.qmp", self.Name))
	case c.QEMU == nil || !self.Starts:
		return nil
	}
	i, err := qemu.CheckExtra(c.QEMU.Extra)
	if err != nil {
		what, fix, _ := strings.Cut(err.Error(), "; ")
		return c.Refuse(fmt.Sprintf("qemu.extra[%d]", i), what, fix)
	}
	return nil
}
