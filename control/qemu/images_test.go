// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/lockstep-ft/lockstep/control/qemu"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Before the first replication both hosts' images are compared, whether lockstep started
// the QEMUs or not.
func TestCompareImages(t *testing.T) {
	for _, seed := range []bool{false, true} {
		t.Run(map[bool]string{false: "started", true: "attached"}[seed], func(t *testing.T) {
			w := newWorld(t, map[bool]int{false: 2, true: 1}[seed])
			if w.seed = seed; !seed {
				w.runAs("nobody") // a user who cannot make a socket here
			}
			last := w.disks - 1
			// On both hosts, so that the equal parts are not all empty.
			for _, host := range []string{"a", "b"} {
				lt.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", w.image(host, last))
			}
			a, b := w.start("a", false), w.start("b", true)
			if err := qemu.PrepareSecondary(t.Context(), b.m, b.caps, b.spec.Disks, *b.in); err != nil {
				t.Fatal(err)
			}
			sizes, err := a.spec.DiskSizes()
			if err != nil {
				t.Fatal(err)
			}
			var progress qemu.Progress
			compare := func(ctx context.Context) (err error) {
				lt.In(t, w.ns("a"), func() {
					err = qemu.CompareImages(ctx, a.m, a.spec.Disks, sizes, w.to("a", b.in), filepath.Join(w.dir, "a, nbd"), func(p qemu.Progress) { progress = p })
				})
				return err
			}
			for range 2 { // the first comparison leaves nothing that disturbs the second
				if err := compare(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if d := a.spec.Disks[last].ID; progress.What != d || !progress.Compare || progress.Done != diskSize || progress.Total != diskSize {
				t.Errorf("progress ends with %+v", progress)
			}
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			if err := compare(gone); !errors.Is(err, context.Canceled) {
				t.Errorf("with a context that has ended: %v", err)
			}
			// Over NBD, because QEMU has the image open.
			lt.In(t, w.ns("b"), func() {
				remove, err := qemu.TLSFolder(w.tls("a"))
				if err != nil {
					t.Fatal(err)
				}
				defer remove()
				lt.Run(t, "qemu-io", "--object", "tls-creds-x509,id=tls,endpoint=client,dir="+w.tls("a").Dir, "--image-opts", "-c", "write -P 8 1228800 1",
					fmt.Sprintf("driver=raw,file.driver=nbd,file.host=%s,file.port=%d,file.export=parent%d,file.tls-creds=tls,file.tls-hostname=b.web1", b.in.NBD.Addr(), b.in.NBD.Port(), last))
			})
			differ := (*qemu.DifferentError)(nil)
			if err := compare(t.Context()); !errors.As(err, &differ) || differ.Disk != a.spec.Disks[last].ID || differ.Offset != 1228800 {
				t.Errorf("of images that differ at byte 1228800: %v", err)
			}
			if err := qemu.Cont(a.m); err != nil {
				t.Fatal(err)
			}
			if err := compare(t.Context()); !errors.Is(err, qemu.ErrRuns) {
				t.Errorf("while the guest runs: %v", err)
			}
		})
	}
}
