// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"strings"
	"testing"
	"time"
)

// TestCopyLimit: the time limit of a disk's copy is for what the guest writes behind
// the first pass. It does not run during that pass, which takes as long as the disk
// is large, nor before QEMU knows how much there is to copy.
func TestCopyLimit(t *testing.T) {
	d, l := &Disk{ID: "vda"}, Limits{Timeout: time.Nanosecond}
	c := diskCopy{still: stall{limit: time.Hour}}
	for _, x := range []struct {
		name string
		job  job
		err  string
	}{
		{"not begun", job{}, ""},
		{"the first pass", job{Current: 1, Total: 64}, ""},
		{"the first pass, and the guest writes", job{Current: 63, Total: 80}, ""},
		{"behind it", job{Current: 64, Total: 80}, "the guest has written"},
		{"the rest is copied", job{Current: 81, Total: 81, Status: "ready"}, ""},
	} {
		// The limit has passed by the second look.
		var err error
		for range 2 {
			_, err = c.look(d, &x.job, l)
			time.Sleep(time.Microsecond)
		}
		switch {
		case x.err == "" && err != nil:
			t.Errorf("%s: %v", x.name, err)
		case x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)):
			t.Errorf("%s: got %v, want %q", x.name, err, x.err)
		}
	}
}
