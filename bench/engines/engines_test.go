// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TestRun measures in short. It asserts nothing about the figures but that they are there,
// and that neither engine releases what differs.
func TestRun(t *testing.T) {
	lt.NeedRoot(t)
	bin := filepath.Join(t.TempDir(), "lockstep")
	lt.Run(t, "go", "build", "-o", bin, "github.com/lockstep-ft/lockstep/cmd/lockstep")
	part, err := Run(t.Context(), Options{Lockstep: bin, Quick: true}, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	differing := 0
	for _, c := range part.Cases {
		for _, v := range part.Variants {
			s := c.Series[v]
			t.Logf("%s, %s: %s: %.1f %s %s", c.Group, c.Name, v, s.Rounds, c.Unit, s.Instead)
			if len(s.Rounds) == 0 && s.Instead == "" {
				t.Errorf("%s, %s: %s has neither a figure nor what it did instead", c.Group, c.Name, v)
			}
			if c.Name == "p50" && len(s.Rounds) > 0 && len(s.CDF) == 0 {
				t.Errorf("%s: %s has no distribution", c.Group, v)
			}
			if c.Group != differGroup {
				continue
			}
			differing++
			want := 5.
			if strings.HasSuffix(c.Name, "behind it") {
				want = 0
			}
			if len(s.Rounds) != 1 || s.Rounds[0] != want {
				t.Errorf("%s, %s: %s has %v, want %v", c.Group, c.Name, v, s.Rounds, want)
			}
		}
	}
	if want := 2 * 2 * (len(synthetic()) + 1); differing != want {
		t.Errorf("%d figures of differing streams, want %d", differing, want)
	}
	for _, n := range part.Notes {
		t.Log(n)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte("lockstep-engines-")) {
		t.Error("a bpffs is left behind")
	}
}

// fake releases what the SVM sends as it comes, and nothing after most frames.
type fake struct {
	out     chan []byte
	most    int
	turned  bool // the last of a batch comes first
	ports   ports
	renewed int
}

func (f *fake) greet(*flow) error                { return nil }
func (f *fake) ack(*flow, uint32) error          { return nil }
func (f *fake) cpu() (time.Duration, error)      { return 0, nil }
func (f *fake) programs() (time.Duration, error) { return 0, nil }
func (f *fake) port() (uint16, error)            { return f.ports.next() }
func (f *fake) renew() error                     { f.renewed++; return nil }

func (f *fake) feed(g guest, frames []frame) error {
	order := slices.Clone(frames)
	if f.turned {
		slices.Reverse(order)
	}
	for _, fr := range order {
		if g == svm && f.most > 0 {
			f.most--
			f.out <- append(bytes.Clone(fr.head[vnetLen:]), fr.payload...)
		}
	}
	return nil
}

func (f *fake) take(visit func([]byte)) error {
	select {
	case b := <-f.out:
		visit(b)
	case <-time.After(grain):
	}
	return nil
}

func fakeBench(most int) (*bench, *fake) {
	f := &fake{out: make(chan []byte, 2*window), most: most}
	b := &bench{
		plan: plan{rounds: 1, span: 20 * time.Millisecond, quiet: 50 * time.Millisecond}, progress: func(string) {},
		streams: synthetic()[:1], table: newTable(),
	}
	return b, f
}

// An engine that does not compare is not measured.
func TestMustCompare(t *testing.T) {
	b, f := fakeBench(1000)
	err := b.differing(t.Context(), variant{"fake", f})
	if err == nil || !strings.Contains(err.Error(), "does not compare") {
		t.Errorf("%v, though everything was released", err)
	}
}

// What an engine does not carry is bounded, and told.
func TestInstead(t *testing.T) {
	const most = 100
	b, f := fakeBench(1 + most) // the SYN|ACK too
	if err := b.measure(t.Context(), variant{"fake", f}, b.streams[0], 1, 0, nil); err != nil {
		t.Fatal(err)
	}
	if f.renewed != 1 {
		t.Errorf("the engine was renewed %d times after it got stuck", f.renewed)
	}
	if len(b.table.Cases) != len(saturation) {
		t.Errorf("%d cases, want %d", len(b.table.Cases), len(saturation))
	}
	for _, c := range b.table.Cases {
		if s := c.Series["fake"]; len(s.Rounds) != 0 || !strings.HasPrefix(s.Instead, "released 100 of ") {
			t.Errorf("%s: %v, %q", c.Name, s.Rounds, s.Instead)
		}
	}
}

// A frame that overtakes others does not release them.
func TestOutOfOrder(t *testing.T) {
	b, f := fakeBench(1 << 30)
	f.turned = true
	s := b.streams[0]
	out, err := drive(t.Context(), f, load{stream: s, flows: 1, span: patience, most: 2 * s.batch, quiet: b.quiet})
	if err != nil {
		t.Fatal(err)
	}
	if out.released != 2*s.batch || out.reordered != 2*(s.batch-1) || out.bytes != out.released*64 {
		t.Errorf("%+v: want all %d released, all but the last of each batch out of order", out, 2*s.batch)
	}
}
