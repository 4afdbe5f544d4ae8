// SPDX-License-Identifier: Apache-2.0

package replica

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestJudge: a note counts only where nothing but a secondary's QEMU can have changed the images.
func TestJudge(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(1000, 0).Add(time.Duration(s) * time.Second) }
	note := content{Point: "p", Boot: "one", Inodes: []uint64{7}}
	disk := func(inode uint64, changed int) []image { return []image{{"disk", true, inode, at(changed)}} }
	for _, x := range []struct {
		name  string
		facts facts
		why   string // "": it counts
	}{
		{"written to the end", facts{"one", at(-900), at(0), disk(7, 2)}, ""},
		{"changed afterwards", facts{"one", at(-900), at(0), disk(7, 4)}, "was changed at"},
		{"replaced", facts{"one", at(-900), at(0), disk(8, -5)}, "is another file"},
		{"after a crash", facts{"two", at(100), at(0), disk(7, 40)}, ""},
		{"after a crash, the touch is too old", facts{"two", at(100), at(0), disk(7, 61)}, "was changed at"},
		{"changed since the boot", facts{"two", at(30), at(0), disk(7, 31)}, "was changed at"},
		{"the clock went back", facts{"two", at(-1), at(0), disk(7, -5)}, "clock went back"},
		{"a block device", facts{"one", at(-900), at(0), []image{{"disk", false, 7, at(-5)}}}, "is no file"},
		{"another disk", facts{"one", at(-900), at(0), nil}, "other disks"},
		{"no boot known", facts{"", at(-900), at(0), disk(7, 0)}, "boot is not known"},
	} {
		err := note.judge(&x.facts)
		if (err == nil) != (x.why == "") || err != nil && !strings.Contains(err.Error(), x.why) {
			t.Errorf("%s: %v, want %q", x.name, err, x.why)
		}
	}
}

func newNote(t *testing.T) (n *Note, image string) {
	t.Helper()
	dir := t.TempDir()
	image = filepath.Join(dir, "disk")
	if err := os.WriteFile(image, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	n = Open(filepath.Join(dir, "note"), []string{image})
	if err := n.Begin(false); err != nil || n.Point() != "" {
		t.Fatalf("where there is none: %q, %v", n.Point(), err)
	}
	if err := n.Save("p1"); err != nil {
		t.Fatal(err)
	}
	return n, image
}

// begun is what the next daemon makes of the note.
func begun(n *Note, held bool) (string, error) {
	next := Open(n.path, n.images)
	next.keep = n.keep
	err := next.Begin(held)
	return next.Point(), err
}

// backdate has the last touch lie so far back.
func backdate(t *testing.T, n *Note, by time.Duration) {
	t.Helper()
	at := time.Now().Add(-by)
	if err := os.Chtimes(n.path, at, at); err != nil {
		t.Fatal(err)
	}
}

func TestNote(t *testing.T) {
	n, _ := newNote(t)
	if got, err := begun(n, false); got != "p1" || err != nil {
		t.Errorf("the next daemon has %q, %v", got, err)
	}
	// Held by QEMU all the time, whenever it was written to.
	backdate(t, n, time.Hour)
	if got, err := begun(n, true); got != "p1" || err != nil {
		t.Errorf("with QEMU alive: %q, %v", got, err)
	}
	// The image is newer than the last touch: somebody else wrote to it.
	backdate(t, n, time.Hour)
	if got, err := begun(n, false); got != "" || err == nil {
		t.Errorf("an image that somebody wrote to: %q, %v", got, err)
	}
	if got, err := begun(n, false); got != "" || err != nil {
		t.Errorf("the note is still there: %q, %v", got, err)
	}
	n, _ = newNote(t)
	backdate(t, n, time.Hour)
	if err := n.Touch(); err != nil {
		t.Fatal(err)
	}
	if got, err := begun(n, false); got != "p1" || err != nil {
		t.Errorf("touched: %q, %v", got, err)
	}
	if err := os.WriteFile(n.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := begun(n, true); got != "" || err == nil {
		t.Errorf("damaged: %q, %v", got, err)
	}
}

// noteEnds checks that a note is gone once the images are the host's own to write to.
func noteEnds(t *testing.T, keep bool) (left string) {
	n, _ := newNote(t)
	n.keep = keep
	if err := n.End(); err != nil {
		t.Fatal(err)
	}
	if err := n.Save("p2"); err == nil {
		t.Error("a point that came late was saved")
	}
	left, err := begun(n, false)
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// TestNoteEnds: no note is left, and none is made any more, once somebody else than the
// primary may write to the images.
func TestNoteEnds(t *testing.T) {
	if left := noteEnds(t, false); left != "" {
		t.Errorf("the note %q is left", left)
	}
	if left := noteEnds(t, true); left == "" {
		t.Error("the mutation is not noticed")
	}
}
