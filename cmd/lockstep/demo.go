// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/demo"
	"github.com/lockstep-ft/lockstep/control/qemu/guestimage"
)

func newDemo(e env) *cobra.Command {
	o := demo.Options{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a pair of real guests through two failovers, on this machine alone",
		Long: "demo starts two hosts and a client as network namespaces, and a pair of real guests under emulation. A client with a long\n" +
			"TCP session and one that loads pages do not notice that the guests differ now and then, and that their hosts die. It\n" +
			"takes a minute, needs root, QEMU and a C compiler, and leaves nothing behind. The guest is Debian's kernel and busybox,\n" +
			"which are downloaded from Debian the first time and not installed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if os.Geteuid() != 0 {
				return fmt.Errorf("the demo makes network namespaces and loads programs into the kernel; run it as root")
			}
			if o.QEMU, err = exec.LookPath("qemu-system-x86_64"); err == nil {
				_, err = exec.LookPath("qemu-img")
			}
			if err != nil {
				return fmt.Errorf("%w; install QEMU (Debian: apt install qemu-system-x86 qemu-utils)", err)
			}
			if o.Lockstep, err = os.Executable(); err != nil {
				return fmt.Errorf("look up this program: %w", err)
			}
			began := time.Now()
			o.Say = func(format string, args ...any) {
				fmt.Fprintf(e.stdout, "%6.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
			}
			o.Show = func(text string) { fmt.Fprintf(e.stdout, "\n%s\n", text) }
			if o.Guest == "" {
				if o.Guest, err = demoGuest(o.Lockstep, o.Say); err != nil {
					return err
				}
			}
			if err := guestimage.Missing(o.Guest); err != nil {
				return err
			}
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the pair running, and say how to look at it, until ^C")
	cmd.Flags().StringVar(&o.Guest, "guest", "", "the folder with a guest's kernel and busybox (default guest, beside this binary, or one that is downloaded)")
	cmd.AddCommand(&cobra.Command{
		Use:    demo.ServeCommand,
		Short:  "Be the service in the guest",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return demo.Serve(e.stdout) },
	})
	return cmd
}

// demoGuest is the folder beside the binary, as make deps makes it, or one of this user's, into which the
// guest is downloaded if it is not there yet.
func demoGuest(binary string, say func(string, ...any)) (string, error) {
	beside := filepath.Join(filepath.Dir(binary), "guest")
	if guestimage.Missing(beside) == nil {
		return beside, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("look for a folder for the guest's kernel: %w; name one with --guest", err)
	}
	dir := filepath.Join(cache, "lockstep", "guest")
	if !guestimage.Fetched(dir) {
		say("Downloading the guest's kernel and busybox from Debian into %s.", dir)
		if err := guestimage.Fetch(dir); err != nil {
			return "", err
		}
	}
	return dir, nil
}
