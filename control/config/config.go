// SPDX-License-Identifier: Apache-2.0

// Package config reads lockstep's one config file. Both daemons of a pair read
// the same file. What it refuses, it refuses with the line, the reason and the
// fix, all mistakes at once.
package config

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"lockstep/control/qemu"
)

// Defaults of optional keys; docs/CONFIG.md lists them.
const (
	DefaultPinDir   = "/sys/fs/bpf/lockstep"
	DefaultRunDir   = "/run/lockstep"
	DefaultStateDir = "/var/lib/lockstep"

	DefaultVXLANPort = 4790

	DefaultTimeout        = time.Second
	DefaultCutDelay       = time.Millisecond
	DefaultMaxConnections = 65536
	DefaultSlots          = 16384
	DefaultGSOSlots       = 1024

	DefaultRekey = time.Hour

	DefaultHeartbeatInterval = 50 * time.Millisecond
	DefaultHeartbeatTimeout  = 500 * time.Millisecond
	DefaultHeartbeatSpeak    = 400 * time.Millisecond
	DefaultHeartbeatRestart  = 3 * time.Second

	DefaultPeriod      = 20 * time.Second
	DefaultMinInterval = 20 * time.Millisecond

	DefaultBinary   = "qemu-system-x86_64"
	DefaultMachine  = "pc"
	DefaultAccel    = "kvm"
	DefaultCPU      = "host"
	DefaultCPUTCG   = "max" // where accel is tcg, which has no host CPU
	DefaultMemory   = 4 << 30
	DefaultSMP      = 2
	DefaultNICModel = "virtio-net-pci"

	DefaultMigrationPort    = 9998
	DefaultMigrationTimeout = time.Hour
	DefaultNBDPort          = 9999

	DefaultEtcdTimeout = 2 * time.Second
	DefaultFileTimeout = 5 * time.Second
	DefaultExecTimeout = time.Minute
)

// maxFile bounds what is parsed: the YAML parser's time grows faster than its
// input.
const maxFile = 64 << 10

// Config is a whole, valid file.
type Config struct {
	File string // as given to Load

	VM         string
	Nodes      [2]Node // in the file's order
	TLS        TLS
	PinDir     string // in a bpffs
	RunDir     string // of the status sockets, and the sockets of QEMUs that lockstep starts
	StateDir   string // of role, term and journal: they outlive a boot
	Heartbeat  Heartbeat
	Compare    Compare
	Checkpoint Checkpoint
	QEMU       *QEMU // nil: not described, so only attached to
	Migration  Migration
	Arbiter    Arbiter

	at map[string]Pos // key path → where its value is written
}

// Node is one of the two hosts.
type Node struct {
	Name    string
	Control netip.AddrPort // the control link's address on this host
	NICs    []NIC          // as many as the other node has, in the guest's order
	QMP     string         // socket of this host's QEMU; "": none
	Starts  bool           // lockstep starts this host's QEMU, with its socket at QMP
}

// NIC is one guest NIC on one host. Exactly one of Peer's ways is set.
type NIC struct {
	Tap        string
	Bridge     string // lockstep makes the tap, where there is none, and puts it there; "": it is there
	PeerDevice string // an L2 device that exists
	PeerVXLAN  *VXLAN // or one that lockstep makes
	XDP        string // of the peer device's early filter: XDPAuto, XDPOn, XDPOff
}

// What NIC.XDP may say.
const (
	XDPAuto = "auto" // where the device's driver runs it itself
	XDPOn   = "on"   // or do not start
	XDPOff  = "off"
)

// VXLAN is a peer link that lockstep makes.
type VXLAN struct {
	ID            uint32
	Port          uint16
	Local, Remote netip.Addr
	Underlay      string
}

// Device is the name of the device that lockstep makes.
func (v *VXLAN) Device() string { return fmt.Sprintf("lsx%d", v.ID) }

// TLS says how the control link is protected: with three files, or not at all.
type TLS struct {
	Insecure      bool          // it is not
	CA, Cert, Key string        // may contain {node}: see Files
	Rekey         time.Duration // between two rotations of the session's keys
}

// Files are a node's CA, certificate and private key.
func (t *TLS) Files(node string) (ca, cert, key string) {
	return forNode(t.CA, node), forNode(t.Cert, node), forNode(t.Key, node)
}

func forNode(s, node string) string { return strings.ReplaceAll(s, "{node}", node) }

// Heartbeat times the echoes between the kernels (R20).
type Heartbeat struct {
	Interval time.Duration // between two echoes
	Timeout  time.Duration // of a silent peer, before it counts as dead
	Speak    time.Duration // an echo lets the PVM speak for so long: T of R20
	Restart  time.Duration // for a daemon that ended on a living host to come back
}

// Rule names datagrams that leave from the PVM uncompared.
type Rule struct {
	Proto                 uint8  // IPPROTO_*, not TCP
	GuestPort, RemotePort uint16 // UDP only; 0: any
}

// Compare bounds the comparison.
type Compare struct {
	Timeout        time.Duration // of unmatched output, before a checkpoint (R7)
	CutDelay       time.Duration // before a verified prefix leaves alone (R5)
	MaxConnections int
	Slots          int // held frames, per NIC
	GSOSlots       int // held GSO frames, per NIC
	PrimaryOnly    []Rule
	MPTCP          bool // the guests may use it; else its option is taken out of SYNs
}

// Checkpoint paces the checkpoints.
type Checkpoint struct {
	Period      time.Duration // between checkpoints that nothing asked for
	MinInterval time.Duration // between any two
	TargetPause time.Duration // the period follows the measured pause, up to Period; 0: it does not
}

// QEMU describes the guest. Where lockstep attaches to a QEMU that runs, only
// MACs and Disks mean anything.
type QEMU struct {
	qemu.Guest // "{node}" in Kernel, Initrd, Append, Extra and the disks' paths: see [Config.Guest]
	// FirstStart is what is done about the disks' contents before the first replication:
	// one of the constants below.
	FirstStart string
	MACs       []net.HardwareAddr // one per NIC, the same on both nodes
}

// What QEMU.FirstStart may say.
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
		s.NICs = append(s.NICs, qemu.NIC{Tap: nic.Tap, MAC: c.QEMU.MACs[i]})
	}
	return s
}

// MAC is the address of a guest's NIC where the config gives none. A guest's
// NICs differ in the last byte, so never collide.
func MAC(vm string, nic int) net.HardwareAddr {
	h := sha256.Sum256([]byte("lockstep mac " + vm))
	return net.HardwareAddr{0x52, 0x54, 0x00, h[0], h[1], h[2] + byte(nic)}
}

// Migration says where the secondary's QEMU waits for the primary's, on the
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

// What Arbiter.Type may say.
const (
	ArbiterEtcd = "etcd"
	ArbiterFile = "file"
	ArbiterExec = "exec"
	ArbiterNone = "none"
)

// Arbiter decides who may speak alone (R21).
type Arbiter struct {
	Type      string        // "": there is none, so nobody takes over by itself
	Endpoints []string      // etcd: host:port of each member
	TLS       *TLSFiles     // etcd; nil: in the clear
	Path      string        // file: a directory, absolute, on storage that both hosts share
	Command   []string      // exec: the fencing command
	Timeout   time.Duration // of one request
}

// TLSFiles protect a client's connection. Cert and Key may be empty: then the
// server asks for none.
type TLSFiles struct{ CA, Cert, Key string }

// On are a node's files: {node} is replaced.
func (t *TLSFiles) On(node string) TLSFiles {
	return TLSFiles{forNode(t.CA, node), forNode(t.Cert, node), forNode(t.Key, node)}
}

// Load reads and checks a file. An error that is about its content is an
// [Errors].
func Load(file string) (*Config, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	return Parse(file, data)
}

// Parse checks a file's content. Relative paths in it are relative to file.
func Parse(file string, data []byte) (*Config, error) {
	r := &reader{file: file, at: make(map[string]Pos)}
	root := r.parse(data)
	if root == nil {
		return nil, r.errs
	}
	c := &Config{
		File:     file,
		PinDir:   DefaultPinDir,
		RunDir:   DefaultRunDir,
		StateDir: DefaultStateDir,
		Compare: Compare{
			Timeout:        DefaultTimeout,
			CutDelay:       DefaultCutDelay,
			MaxConnections: DefaultMaxConnections,
			Slots:          DefaultSlots,
			GSOSlots:       DefaultGSOSlots,
		},
		TLS:        TLS{Rekey: DefaultRekey},
		Heartbeat:  Heartbeat{DefaultHeartbeatInterval, DefaultHeartbeatTimeout, DefaultHeartbeatSpeak, 0},
		Checkpoint: Checkpoint{Period: DefaultPeriod, MinInterval: DefaultMinInterval},
		Migration:  Migration{Port: DefaultMigrationPort, NBDPort: DefaultNBDPort, Limits: qemu.Limits{Timeout: DefaultMigrationTimeout}},
		at:         r.at,
	}
	r.config(root, c)
	c.derive()
	// Relations between values mean something only where each value is right.
	if len(r.errs) == 0 {
		r.relations(c)
	}
	if len(r.errs) > 0 {
		r.errs.sort()
		return nil, r.errs
	}
	return c, nil
}

// derive fills in defaults that come from other values.
func (c *Config) derive() {
	q := c.QEMU
	if q == nil {
		return
	}
	for i := range c.Nodes {
		if n := &c.Nodes[i]; n.QMP == "" {
			n.Starts, n.QMP = true, filepath.Join(c.RunDir, c.VM+"-"+n.Name+".qmp") // shorter than Socket's
		}
	}
	if q.CPU == "" {
		q.CPU = DefaultCPU
		if accel, _, _ := strings.Cut(q.Accel, ","); accel == "tcg" {
			q.CPU = DefaultCPUTCG
		}
	}
	for i := range q.Disks {
		if q.Disks[i].OverlayDir == "" {
			q.Disks[i].OverlayDir = c.RunDir
		}
	}
	if q.MACs == nil {
		for i := range c.Nodes[0].NICs {
			q.MACs = append(q.MACs, MAC(c.VM, i))
		}
	}
}

// Node returns the named node and the other one.
func (c *Config) Node(name string) (self, other *Node, err error) {
	for i := range c.Nodes {
		if c.Nodes[i].Name == name {
			return &c.Nodes[i], &c.Nodes[1-i], nil
		}
	}
	return nil, nil, fmt.Errorf("%s has no node %q; it has %q and %q", c.File, name, c.Nodes[0].Name, c.Nodes[1].Name)
}

// Socket is the path of a node's status socket.
func (c *Config) Socket(node string) string {
	return filepath.Join(c.RunDir, c.VM+"-"+node+".sock")
}

// Refuse makes an error about a value that only its use showed to be wrong:
// key is its path, like "nodes.alpha.nics[0].tap".
func (c *Config) Refuse(key, reason, fix string) error {
	return Errors{{Pos: c.pos(key), Reason: reason, Fix: fix}}
}

// pos finds where a value is written, or, when it is a default, what is around it.
func (c *Config) pos(key string) Pos {
	for {
		if p, ok := c.at[key]; ok {
			return p
		}
		i := strings.LastIndexAny(key, ".[")
		if i < 0 {
			return Pos{File: c.File, Line: 1, Col: 1}
		}
		key = key[:i]
	}
}
