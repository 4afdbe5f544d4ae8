// SPDX-License-Identifier: Apache-2.0

// Package config reads lockstep's one config file. Both daemons of a pair read
// the same file. What it refuses, it refuses with the line, the reason and the
// fix, all mistakes at once.
package config

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu"
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
	DefaultHeartbeatLease    = 400 * time.Millisecond
	DefaultHeartbeatRestart  = 3 * time.Second

	DefaultPeriod      = 20 * time.Second
	DefaultMinInterval = 20 * time.Millisecond
	// A guest that mostly agrees stays below it: a Debian with a database, SSH and web pages that have the time in them
	// asks for 30 a minute (docs/GUESTS.md). One whose answers all wait for DefaultTimeout asks for 50 or more.
	DefaultPeriodicAbove = 45
	DefaultEpoch         = 50 * time.Millisecond

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
	Nodes      []Node // in the file's order; two of them are the pair, the others wait as spares
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

	// Warnings are about what is read now and will be refused: one for each key by an old
	// name, with its place.
	Warnings Errors

	at map[string]Pos // key path → where its value is written
}

// Heartbeat times the echoes between the kernels (R20).
type Heartbeat struct {
	Interval time.Duration // between two echoes
	Timeout  time.Duration // without a sign of the peer, before it counts as dead
	Lease    time.Duration // for so long after an echo the PVM may transmit: T of R20
	Restart  time.Duration // for a daemon that ended on a living host to come back
}

// Checkpoint paces the checkpoints.
type Checkpoint struct {
	Period      time.Duration // between checkpoints that nothing asked for
	MinInterval time.Duration // between any two
	TargetPause time.Duration // the period follows the measured pause, up to Period; 0: it does not

	PeriodicAbove int           // so many a minute because of divergence lead to periodic mode (R28); 0: none do
	Epoch         time.Duration // between two in periodic mode
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
			FastPath:       true,
		},
		TLS:        TLS{Rekey: DefaultRekey, QEMU: true},
		Heartbeat:  Heartbeat{DefaultHeartbeatInterval, DefaultHeartbeatTimeout, DefaultHeartbeatLease, 0},
		Checkpoint: Checkpoint{Period: DefaultPeriod, MinInterval: DefaultMinInterval, PeriodicAbove: DefaultPeriodicAbove, Epoch: DefaultEpoch},
		Migration:  Migration{Port: DefaultMigrationPort, NBDPort: DefaultNBDPort, Limits: qemu.Limits{Timeout: DefaultMigrationTimeout}},
		at:         r.at,
	}
	r.config(root, c)
	c.Warnings = r.warnings
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

// Node returns the named node and the first other one.
func (c *Config) Node(name string) (self, other *Node, err error) {
	for i := range c.Nodes {
		if c.Nodes[i].Name == name {
			return &c.Nodes[i], c.Others(name)[0], nil
		}
	}
	return nil, nil, fmt.Errorf("%s has no node %q; it has %s", c.File, name, c.Names())
}

// Others are the nodes that node may be a pair with.
func (c *Config) Others(node string) (others []*Node) {
	for i := range c.Nodes {
		if c.Nodes[i].Name != node {
			others = append(others, &c.Nodes[i])
		}
	}
	return others
}

// Spares reports whether there are more nodes than a pair has.
func (c *Config) Spares() bool { return len(c.Nodes) > 2 }

// Names lists the nodes, for a message.
func (c *Config) Names() string {
	var names []string
	for _, n := range c.Nodes {
		names = append(names, fmt.Sprintf("%q", n.Name))
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " and " + names[last]
}

// PeerVXLAN is the VXLAN of a NIC of self as it leads to other; nil: its peer link is another.
func (c *Config) PeerVXLAN(self, other *Node, nic int) *VXLAN {
	v := self.NICs[nic].PeerVXLAN
	if v == nil || !c.Spares() {
		return v
	}
	to := *v
	to.Remote, to.Turns = other.NICs[nic].PeerVXLAN.Local, true
	return &to
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
