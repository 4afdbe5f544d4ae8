// SPDX-License-Identifier: Apache-2.0

// Package arbiter keeps, outside the two hosts of a pair, the durable record of
// which of them may speak alone (R21). A host changes it by compare-and-swap, so
// that of two hosts that lost each other one wins. The record never expires.
package arbiter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"lockstep/control/config"
)

// Record says who may speak alone. The zero Record stands for none yet.
type Entry struct {
	Term    uint64 `json:"term"`    // grows by one with each change
	Speaker string `json:"speaker"` // a node's name
}

func (r Entry) String() string {
	if r == (Entry{}) {
		return "no record"
	}
	return fmt.Sprintf("term %d, speaker %s", r.Term, r.Speaker)
}

// Record is the former name of [Entry].
type Record = Entry

// Arbiter holds the record of one pair. Its methods give up when ctx ends or
// after config's arbiter.timeout, whichever is first. It is for one goroutine at
// a time.
type Arbiter interface {
	// Read returns the newest record. After a Swap of unknown outcome it proves
	// nothing: that Swap may still take effect. Settle does.
	Read(ctx context.Context) (Entry, error)

	// Swap makes the record next if it is old; next is of the term after old's.
	// With swapped false and no error another one is there, which is returned. That
	// next is there already counts as swapped, so Swap can be repeated. After an
	// error the outcome is unknown: stay quiet and call Settle.
	Swap(ctx context.Context, old, next Entry) (now Entry, swapped bool, err error)

	// Settle returns the record when no earlier Swap of this host, also by a
	// process that has ended, can still take effect. It is the first call at a
	// daemon's start. After an error call it again.
	Settle(ctx context.Context) (Entry, error)

	Close() error
}

// Open makes the arbiter that c names, as seen by node. It talks to nobody yet.
func Open(c *config.Config, node string) (Arbiter, error) {
	self, other, err := c.Node(node)
	if err != nil {
		return nil, err
	}
	switch a := &c.Arbiter; a.Type {
	case config.ArbiterEtcd:
		return openEtcd(c.VM, self.Name, a)
	case config.ArbiterFile:
		return openFile(c.VM, self.Name, a)
	case config.ArbiterExec:
		return &execArbiter{pair: c.VM, self: self.Name, other: other.Name, command: a.Command, timeout: a.Timeout}, nil
	case config.ArbiterNone:
		return &none{}, nil
	}
	return nil, fmt.Errorf("%s names no arbiter; docs/CONFIG.md tells what arbiter.type may be", c.File)
}

// checkSwap refuses what would break the record's promise.
func checkSwap(old, next Entry) error {
	if next.Term != old.Term+1 || next.Speaker == "" {
		return fmt.Errorf("arbiter: %q cannot follow %q: the term must grow by one, and somebody must speak", next, old)
	}
	return nil
}

var errBehind = errors.New("the record is older than one seen before: the arbiter has lost it")

// checkNow: an arbiter that went back in time decides nothing.
func checkNow(seen, now Entry) error {
	if now.Term < seen.Term {
		return fmt.Errorf("%w (%s, was %s); put it back by hand", errBehind, now, seen)
	}
	return nil
}

// maxEntry bounds what is parsed.
const maxEntry = 4096

func (r Entry) encode() []byte {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // a number and a string
	}
	return b
}

func decode(b []byte) (r Entry, err error) {
	if len(b) > maxEntry {
		return r, fmt.Errorf("%d bytes are no record", len(b))
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil || d.More() || (r.Term == 0) != (r.Speaker == "") {
		return Entry{}, fmt.Errorf("%q is no record", b)
	}
	return r, nil
}

// none lets whoever asks speak. Both hosts may do so after a partition.
type none struct{ now Entry }

func (n *none) Read(context.Context) (Entry, error)   { return n.now, nil }
func (n *none) Settle(context.Context) (Entry, error) { return n.now, nil }
func (n *none) Close() error                          { return nil }

func (n *none) Swap(_ context.Context, old, next Entry) (Entry, bool, error) {
	if err := checkSwap(old, next); err != nil {
		return Entry{}, false, err
	}
	n.now = next
	return next, true, nil
}
