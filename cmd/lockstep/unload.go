// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/qemu"
)

func newUnload(e env) *cobra.Command {
	var t target
	var force, endGuest bool
	cmd := &cobra.Command{
		Use:   "unload -c pair.yaml --node NAME",
		Short: "Remove the pinned programs and maps of a daemon that is gone",
		Long: "unload removes what a daemon left in the kernel: its programs leave the taps and\n" +
			"the peer devices, its maps go, and the guest's taps are set down. It refuses while the\n" +
			"daemon lives, and while the guest runs here: without the programs it could transmit\n" +
			"beside the other host's. With --force such a guest is muted: its taps are set down.\n" +
			"Only one that transmits alone, as the arbiter confirms, goes on, and the connections\n" +
			"that it took over break. With --end-guest it ends the QEMU that lockstep started, as a power\n" +
			"cut does: afterwards nothing of the guest is on this host. Run it in the daemon's network\n" +
			"namespace.\n" +
			"No setting needs it on a pair that runs: see docs/CONFIG.md, \"Changing a setting\".",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load(e)
			if err != nil {
				return err
			}
			return unload(cmd.Context(), e, c, self, force, endGuest)
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "also while the guest runs, which is muted unless it transmits alone; remove also what is not whole, not of this version, or of a secondary that took over")
	cmd.Flags().BoolVar(&endGuest, "end-guest", false, "end the guest's QEMU on this host first")
	return cmd
}

func unload(ctx context.Context, e env, c *config.Config, self *config.Node, force, endGuest bool) error {
	// The lock of a daemon that lives is in a bpffs, which somebody may have unmounted.
	if _, err := api.FetchStatus(ctx, c.Socket(self.Name)); !errors.Is(err, api.ErrNoDaemon) {
		return fmt.Errorf("a daemon of %s on %s answers at %s; stop it first", c.VM, self.Name, c.Socket(self.Name))
	}
	if endGuest {
		if err := endQEMU(ctx, e.kernel, c, self); err != nil {
			return err
		}
	}
	running, err := guestRuns(e.kernel, c, self)
	if err != nil {
		return fmt.Errorf("whether the guest of %s runs on %s is not known: %w", c.VM, self.Name, err)
	}
	if running != "" && !force {
		return fmt.Errorf("the guest of %s runs on %s (%s), and without lockstep's programs it could transmit beside the other host's. "+
			"To change a setting, see docs/CONFIG.md, \"Changing a setting\"; for another version, `lockstep upgrade`. "+
			"To remove lockstep from this host, end its QEMU first; --force mutes the guest, unless the arbiter names this node alone", c.VM, self.Name, running)
	}
	remove, goesOn := e.kernel.unload, false
	if running != "" {
		why := ""
		if goesOn, why = transmitsAlone(ctx, e, c, self); goesOn {
			remove = e.kernel.letGo
		}
		fmt.Fprintf(e.stderr, "lockstep: %s\n", why)
	}
	if !goesOn {
		// What is pinned may not be all that there is, or was.
		for _, nic := range self.NICs {
			if err := e.kernel.mute(nic.Tap); err != nil {
				return err
			}
		}
	}
	// Tables are of no use without the guest whose connections they know.
	if err := remove(c.PinDir, c.VM, self.Name, force || endGuest); err != nil {
		return err
	}
	for _, nic := range self.NICs {
		if v := nic.PeerVXLAN; v != nil {
			if err := e.kernel.removeVXLAN(v.Device()); err != nil {
				return err
			}
		}
		if nic.Bridge != "" {
			if err := e.kernel.removeTap(nic.Tap); err != nil {
				return err
			}
		}
	}
	said := fmt.Sprintf("No program, map or pin of %s is left on %s, and its taps are down.", c.VM, self.Name)
	switch {
	case goesOn:
		said = fmt.Sprintf("No program, map or pin of %s is left on %s. Its guest (%s) goes on.", c.VM, self.Name, running)
	case running != "":
		said += fmt.Sprintf(" So the guest (%s) is muted.", running)
	}
	_, err = fmt.Fprintln(e.stdout, said)
	return err
}

// endQEMU ends the QEMU that lockstep started here, if there is one.
func endQEMU(ctx context.Context, k kernel, c *config.Config, self *config.Node) error {
	if !self.Starts {
		return fmt.Errorf("lockstep did not start the QEMU of %s on %s: whoever did has to end it", c.VM, self.Name)
	}
	release, err := k.lock(c.PinDir, c.VM, self.Name) // a daemon that does not answer would take this for a failure
	if err != nil {
		return fmt.Errorf("%w; stop it first", err)
	}
	defer release()
	spec := c.Guest(self)
	p, err := qemu.Find(&spec)
	if errors.Is(err, qemu.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Release()
	return p.Kill(ctx)
}

// guestRuns names what runs of the guest on this host; "": nothing does. A QEMU that
// somebody else started is known by the taps that it has open.
func guestRuns(k kernel, c *config.Config, self *config.Node) (string, error) {
	if self.Starts {
		spec := c.Guest(self)
		p, err := qemu.Find(&spec)
		if err == nil {
			defer p.Release()
			return fmt.Sprintf("QEMU is process %d", p.Pid()), nil
		}
		if !errors.Is(err, qemu.ErrNotRunning) {
			return "", err
		}
	}
	for _, nic := range self.NICs {
		used, err := k.inUse(nic.Tap)
		if err != nil {
			return "", err
		}
		if used {
			return fmt.Sprintf("a process has tap %s open", nic.Tap), nil
		}
	}
	return "", nil
}

// transmitsAlone reports whether the guest that runs here is the only one that transmits,
// and stays so: it did when its daemon ended, and the arbiter names this node. In a pair
// without an arbiter that is the primary's. why is what was found.
func transmitsAlone(ctx context.Context, e env, c *config.Config, self *config.Node) (alone bool, why string) {
	found, err := e.kernel.found(tables(c, self, 0, discard))
	if err != nil {
		return false, fmt.Sprintf("what the guest was to the pair is not known, so it is muted: %v", err)
	}
	if c.Arbiter.Type == "" {
		if found.Role != datapath.RolePrimary {
			return false, "the guest is not the primary's, so it is muted"
		}
		return true, "the guest goes on, and nothing compares its output"
	}
	if found.Mode != datapath.ModeSolo {
		return false, "the guest did not transmit alone when its daemon ended, so it is muted"
	}
	a, err := arbiter.Open(c, self.Name)
	if err != nil {
		return false, fmt.Sprintf("the arbiter cannot be asked, so the guest is muted: %v", err)
	}
	defer a.Close()
	rec, err := a.Read(ctx)
	switch {
	case err != nil:
		return false, fmt.Sprintf("the arbiter's entry cannot be read, so the guest is muted: %v", err)
	case rec.Speaker != self.Name:
		return false, fmt.Sprintf("the arbiter (%s) does not name this node, so the guest is muted", rec)
	}
	return true, fmt.Sprintf("the arbiter (%s) names this node: the guest goes on, and the connections that it took over break", rec)
}
