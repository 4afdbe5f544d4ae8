// SPDX-License-Identifier: Apache-2.0

// Package arbiter keeps, outside the two hosts of a pair, a durable entry that names
// the host which may serve alone (R21). A host changes it by compare-and-swap, so that
// of two hosts that lost contact one wins. The entry never expires: it is no lease.
package arbiter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/lockstep-ft/lockstep/control/config"
)

// Entry names the host that may serve alone. The zero Entry means that there is none
// yet. Its JSON is the form in which etcd and file store it.
type Entry struct {
	Term    uint64 `json:"term"`    // fencing term: one more with each change, 1 at first
	Speaker string `json:"speaker"` // the name of the node that may serve alone
}

func (r Entry) String() string {
	if r == (Entry{}) {
		return "no entry"
	}
	return fmt.Sprintf("fencing term %d, speaker %s", r.Term, r.Speaker)
}

// Arbiter holds the entry of one pair. Its methods give up when ctx ends or
// after config's arbiter.timeout, whichever is first. It is for one goroutine at
// a time.
type Arbiter interface {
	// Read returns the entry in force. After a Swap of unknown outcome that proves
	// nothing, because the Swap may still take effect: Settle is needed then.
	Read(ctx context.Context) (Entry, error)

	// Swap replaces the entry old by next, whose fencing term is one more than
	// old's. If the entry is neither old nor next, swapped is false and that entry is
	// returned. If it is next already, swapped is true, so that Swap can be repeated.
	// After an error the outcome is unknown: the host must stay muted and call Settle.
	Swap(ctx context.Context, old, next Entry) (now Entry, swapped bool, err error)

	// Settle returns the entry in force once no earlier Swap of this host, also by a
	// process that has ended, can take effect any more. It is the first call at a
	// daemon's start. After an error call it again.
	Settle(ctx context.Context) (Entry, error)

	Close() error
}

// Open makes the arbiter that c names, for node's use. It makes no connection yet.
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
	return nil, fmt.Errorf("%s names no arbiter; docs/CONFIG.md lists what arbiter.type may be", c.File)
}

// checkSwap refuses an entry that cannot follow old.
func checkSwap(old, next Entry) error {
	if next.Term != old.Term+1 || next.Term == 0 || next.Speaker == "" {
		return fmt.Errorf("arbiter: %q cannot follow %q: the fencing term must grow by one, and a node must be named", next, old)
	}
	return nil
}

var errBehind = errors.New("the arbiter's entry is older than one seen before: the arbiter has lost it")

// checkNow refuses the answer of an arbiter that has lost an entry, as one does that
// was restored from a backup.
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
		return r, fmt.Errorf("%d bytes are no arbiter entry", len(b))
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err = d.Decode(&r)
	if _, more := d.Token(); err != nil || more != io.EOF || (r.Term == 0) != (r.Speaker == "") {
		return Entry{}, fmt.Errorf("%q is no arbiter entry", b)
	}
	return r, nil
}

// none grants each host's Swap, so that after a partition both may serve.
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
