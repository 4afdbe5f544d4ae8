// SPDX-License-Identifier: Apache-2.0

// Package state keeps what a daemon must know when it starts again: a host that
// forgot its role or fencing term could transmit while another one serves (R19).
package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lockstep-ft/lockstep/control/durable"
)

// State is what a node has to remember of one guest. The zero State is that of a node
// that never ran.
type State struct {
	Role       string `json:"role"`               // "primary", "secondary"
	Term       uint64 `json:"term"`               // fencing term of the arbiter's entry that this node last acted on
	Covered    uint64 `json:"covered"`            // fencing term in which the secondary may take over (R18); 0: none
	Replicated bool   `json:"replicated"`         // replication has begun once: the images of both hosts may differ since
	Alone      bool   `json:"alone,omitempty"`    // the guest ran alone before that: nobody can have copied its images
	Unmerged   bool   `json:"unmerged,omitempty"` // the guest took over, and its overlays are not yet merged into its images
	Off        bool   `json:"off,omitempty"`      // the guest powered off and was not started since (R25)

	// Of a pair with spares: the other node of the last pair, and the fencing term in which it was one.
	Peer     string `json:"peer,omitempty"`
	PairTerm uint64 `json:"pair_term,omitempty"`
}

// Follower is the node that may have been told that it can take over at a fencing term; known: there may be
// one. With "" it is not known which: only a pair without spares does not store it.
func (s *State) Follower(term uint64) (node string, known bool) {
	if s.PairTerm != 0 && s.PairTerm == term {
		return s.Peer, true
	}
	return "", s.Covered != 0 && s.Covered == term
}

// Store is a node's file in state_dir. It is for one process at a time, which the
// daemon's lock on its pins ensures.
type Store struct{ dir, vm, node string }

// Open returns the store of a guest's node in dir, which it makes if necessary.
func Open(dir, vm, node string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	return &Store{dir, vm, node}, nil
}

// Path returns the path of the file.
func (s *Store) Path() string { return filepath.Join(s.dir, s.vm+"-"+s.node+".state") }

// Note returns the path of the note of what a secondary's images are (package replica).
func (s *Store) Note() string { return filepath.Join(s.dir, s.vm+"-"+s.node+".replica") }

// content is the file's first line; the second is its SHA-256 in hex.
type content struct {
	Version int    `json:"version"`
	VM      string `json:"vm"`
	Node    string `json:"node"`
	State
}

const (
	version = 1
	maxFile = 4096
)

// Load returns what Save last wrote; the zero State if it never did.
func (s *Store) Load() (State, error) {
	f, err := os.Open(s.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return State{}, nil
	}
	if err != nil {
		return State{}, fmt.Errorf("read this node's state: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return State{}, fmt.Errorf("read this node's state: %w", err)
	}
	st, err := s.decode(b)
	if err != nil {
		return State{}, fmt.Errorf("%s: %w; it says whether this node may serve %s. If the arbiter names the other node, or lockstep status there shows that it serves, remove the file: this node follows it then. If this one has the guest's newest disks, call lockstep start --here --force",
			s.Path(), err, s.vm)
	}
	return st, nil
}

func (s *Store) decode(b []byte) (State, error) {
	line, sum, ok := bytes.Cut(b, []byte("\n"))
	if !ok || string(sum) != checksum(line) {
		return State{}, errors.New("the file is damaged")
	}
	var c content
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil || c.Version != version {
		return State{}, fmt.Errorf("the file is of another version (%d, not %d)", c.Version, version)
	}
	if _, err := d.Token(); err != io.EOF {
		return State{}, errors.New("the file is damaged")
	}
	if c.VM != s.vm || c.Node != s.node {
		return State{}, fmt.Errorf("the file is of guest %s on node %s", c.VM, c.Node)
	}
	if c.Role != "primary" && c.Role != "secondary" {
		return State{}, fmt.Errorf("the file names the role %q", c.Role)
	}
	return c.State, nil
}

func checksum(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:]) + "\n"
}

// Save replaces the file. When it returns nil, st outlives a crash of the host. After
// an error, or a crash in between, the file holds st or what was there before.
func (s *Store) Save(st State) error {
	if err := s.save(st); err != nil {
		return fmt.Errorf("keep this node's state: %w", err)
	}
	return nil
}

func (s *Store) save(st State) error {
	line, err := json.Marshal(content{version, s.vm, s.node, st})
	if err != nil {
		return err
	}
	return durable.Replace(s.Path(), append(append(line, '\n'), checksum(line)...))
}
