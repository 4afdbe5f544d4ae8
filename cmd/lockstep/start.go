// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/arbiter"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/state"
)

func newStart(e env) *cobra.Command {
	var t target
	var here, force bool
	cmd := &cobra.Command{
		Use:   "start -c pair.yaml --node NAME [--here [--force]]",
		Short: "Have a guest that powered off, or never ran, boot with the next run",
		Long: "start forgets that the guest powered off while this host was its primary. `lockstep run`, or\n" +
			"the unit that runs it, boots the guest then. It changes nothing else, and needs no daemon.\n" +
			"With --here it says that this node has the guest's disks, and the arbiter's entry names it\n" +
			"from then on: before the pair's first start, or when the node that served last is lost for\n" +
			"good. That one must be off, and what it wrote and this one does not have is lost; where there\n" +
			"may be such writes, --force is needed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, other, err := t.load(e)
			if err != nil {
				return err
			}
			if force && !here {
				return usageError{errors.New("--force goes with --here: without, start forces nothing")}
			}
			release, err := e.kernel.lock(c.PinDir, c.VM, self.Name)
			if err != nil {
				return fmt.Errorf("%w; stop it first", err)
			}
			defer release()
			store, err := state.Open(c.StateDir, c.VM, self.Name)
			if err != nil {
				return err
			}
			if here {
				return startHere(cmd.Context(), e, c, self, other, store, force)
			}
			st, err := store.Load()
			if err != nil {
				return err
			}
			if !st.Off {
				return fmt.Errorf("%s did not power off while %s was its primary, so there is nothing to forget: start the daemon", c.VM, self.Name)
			}
			st.Off = false
			if err := store.Save(st); err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.stdout, "The next `lockstep run` on %s boots %s.\n", self.Name, c.VM)
			return err
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&here, "here", false, "this node has the guest's disks: name it in the arbiter's entry")
	cmd.Flags().BoolVar(&force, "force", false, "with --here: also where the entry names the other node, which is off and stays so")
	return cmd
}

// noticed is how long a primary that lives may take to find that the entry does not name it any more. Tests
// shorten it.
var noticed = control.EntryNoticed

// startHere has the arbiter's entry name this node, which is the primary then when its daemon starts (R19).
func startHere(ctx context.Context, e env, c *config.Config, self, other *config.Node, store *state.Store, force bool) error {
	if c.Arbiter.Type == "" || c.Arbiter.Type == config.ArbiterNone {
		return c.Refuse("arbiter", "nobody keeps which node has the guest's disks", "name an arbiter, or start this node with --role primary")
	}
	if running, err := guestRuns(e.kernel, c, self); err != nil {
		return err
	} else if running != "" {
		return fmt.Errorf("the guest runs here (%s): start the daemon, which takes over if this guest may; or end QEMU, and call this again", running)
	}
	a, err := arbiter.Open(c, self.Name)
	if err != nil {
		return err
	}
	defer a.Close()
	rec, err := a.Settle(ctx)
	if err != nil {
		return err
	}
	st, err := store.Load()
	switch {
	case err != nil && !force:
		return err
	case err != nil:
		st = state.State{} // it is damaged, which may be why this is forced
	}
	// A secondary that was covered to the end has every write that was confirmed.
	whole := rec.Speaker != self.Name && st.Role == string(datapath.RoleSecondary) && st.Covered != 0 && st.Covered == rec.Term
	switch {
	case rec.Speaker == self.Name && st.Role != "" && !force:
		return fmt.Errorf("the arbiter (%s) names %s already: start the daemon", rec, self.Name)
	case rec.Term < st.Term:
		return fmt.Errorf("the arbiter's entry (%s) is older than the one that this node has acted on (term %d): docs/ARBITER.md describes how to move to another arbiter", rec, st.Term)
	case rec != (arbiter.Entry{}) && !whole && !force:
		return fmt.Errorf("the arbiter (%s) says that %s served last, and what is on this node's disks may not be all that the guest wrote then. If that node is there, start the daemons: it is the primary. "+
			"If it is lost for good and off, --force takes what this node has for the guest's", rec, rec.Speaker)
	}
	// First the node, then the entry: an entry that names a node which does not know of it is refused.
	st.Role, st.Term, st.Covered, st.Off = string(datapath.RolePrimary), rec.Term, 0, false
	st.Replicated = rec != (arbiter.Entry{}) // if so, the other node's disks are copied from here
	if err := store.Save(st); err != nil {
		return err
	}
	now, won, err := a.Swap(ctx, rec, arbiter.Entry{Term: rec.Term + 1, Speaker: self.Name})
	switch {
	case err != nil:
		return fmt.Errorf("%w; whether the entry names %s now is not known: call this again", err, self.Name)
	case !won:
		return fmt.Errorf("somebody else changed the arbiter's entry meanwhile: %s", now)
	}
	if rec.Speaker != "" && rec.Speaker != self.Name {
		select { // nobody transmits here before one that is not off after all has stopped (R26)
		case <-time.After(noticed):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	all, follows := "both nodes", other.Name
	if c.Spares() {
		all, follows = "all nodes", "the first of the others that is there"
	}
	_, err = fmt.Fprintf(e.stdout, "%s has the guest's disks (%s). Start the daemons of %s: %s is the primary, and %s follows.\n", self.Name, now, all, self.Name, follows)
	return err
}
