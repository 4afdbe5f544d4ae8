// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/cilium/ebpf"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/failover"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/loader"
)

// maxCopies bounds the SVM's output that is kept, where slots would allow more.
const maxCopies = 8192

// runOptions are what `run` was asked for.
type runOptions struct {
	config      *config.Config
	self, other *config.Node  // the pair's; where there are spares, other is found out
	role        datapath.Role // that the command line asks for; or failover.RoleAuto
	log         *slog.Logger
	verifierLog bool
	metrics     string // address; "": none

	protected map[string]*tls.Config // the control link, by the other node; nil: it is insecure
}

// runDaemon runs this node in its role, and in those that follow from failovers, until ctx
// ends. Programs and maps stay behind, and so does QEMU.
func runDaemon(ctx context.Context, e env, o runOptions) error {
	c := o.config
	o.log.Info("lockstep", "version", versionString())
	if err := unfit(o); err != nil {
		return err
	}
	if err := e.kernel.checkBPFFS(c.PinDir); err != nil {
		return notYetError{c.Refuse("pin_dir", err.Error(), "")}
	}
	if err := os.MkdirAll(c.RunDir, 0o755); err != nil {
		return notYetError{c.Refuse("run_dir", fmt.Sprintf("cannot make the folder of the status socket: %v", err), "")}
	}
	if err := protect(&o); err != nil {
		return err
	}
	release, err := e.kernel.lock(c.PinDir, c.VM, o.self.Name)
	if err != nil {
		return err
	}
	defer release()
	if o.metrics != "" {
		stop, err := serveMetrics(ctx, o)
		if err != nil {
			return err
		}
		defer stop()
	}
	defer control.Notify(o.log, sd.SdNotifyStopping)
	if c.Arbiter.Type == "" {
		err = runRole(ctx, e, o, nil)
	} else {
		err = runFailover(ctx, e, o)
	}
	return err
}

// runRole puts the kernel half in place for one role and hands it to control. rs is nil
// in a pair without an arbiter, which does not fail over.
func runRole(ctx context.Context, e env, o runOptions, rs *roleState) error {
	c := o.config
	nics, err := devices(e.kernel, o)
	if err != nil {
		return err
	}
	digest := c.Hash()
	opt := control.Options{
		ConfigDigest: hex.EncodeToString(digest[:]),
		VM:           c.VM, Node: o.self.Name, Peer: o.other.Name, Role: datapath.RoleSecondary,
		Control: o.other.Control.String(), // the primary's
		OwnAddr: o.self.Control.Addr(), PeerAddr: o.other.Control.Addr(),
		TLS: o.protected[o.other.Name],
		QMP: o.self.QMP, GuestAgent: o.self.GuestAgent,
		Compare: compare.Config{
			Timeout: c.Compare.Timeout, CutDelay: c.Compare.CutDelay, MaxConnections: c.Compare.MaxConnections,
			Slots: loader.TCPSlots(c.Compare.Slots), LargeSlots: loader.TCPSlots(c.Compare.GSOSlots),
			FastPath: c.Compare.FastPath,
		},
		// Parked input finds slots, and so do connections that talk while others are quiet.
		Copies:     compare.SecondaryConfig{MaxCopies: max(1, min(c.Compare.Slots, maxCopies)/2), MaxLarge: max(1, c.Compare.GSOSlots/2)},
		Checkpoint: c.Checkpoint, Heartbeat: c.Heartbeat, Rekey: c.TLS.Rekey,
		StatusSocket: c.Socket(o.self.Name),
		Log:          o.log,
	}
	if o.role == datapath.RolePrimary {
		opt.Role, opt.Control = datapath.RolePrimary, o.self.Control.String()
	}
	if rs != nil {
		rs.fill(&opt, e, o)
		opt.Spares = spares(e, o)
	}
	for _, n := range nics {
		n.Discard = rs != nil && rs.begin.Discard
		dp, fresh, err := e.kernel.open(n)
		if err != nil {
			for _, dp := range opt.NICs {
				err = errors.Join(err, dp.Close())
			}
			if rejected := (*ebpf.VerifierError)(nil); errors.As(err, &rejected) {
				if o.verifierLog {
					fmt.Fprintf(e.stderr, "%+v\n", rejected)
					return err
				}
				return fmt.Errorf("%w; --verifier-log prints the whole log", err)
			}
			return c.Refuse(nicKey(o.self, n.NIC), err.Error(), "")
		}
		opt.NICs = append(opt.NICs, dp)
		opt.Fresh = opt.Fresh || fresh // one NIC's lost tables are the pair's
	}
	return e.control(ctx, opt) // closes the NICs
}

// unfit refuses a config that does not go together, or not with the role.
func unfit(o runOptions) error {
	c := o.config
	if err := c.Unfit(o.self); err != nil {
		return err
	}
	if o.role != failover.RoleAuto && c.Spares() {
		return usageError{fmt.Errorf("%s has spare nodes, and which of its nodes are the pair the arbiter and the nodes decide: leave out --role (`lockstep start --here` says which node has the guest's disks first)", c.File)}
	}
	if o.role == failover.RoleAuto && (c.Arbiter.Type == "" || c.Arbiter.Type == config.ArbiterNone) {
		return c.Refuse("arbiter", "nobody keeps which node served last, so this one cannot find out its role by itself", "name an arbiter (etcd, file or exec), or start each node with its --role, primary or secondary")
	}
	return nil
}

// certificates are this node's, towards another one.
func certificates(o runOptions, other *config.Node) peerlink.Certificates {
	files := peerlink.Certificates{VM: o.config.VM, Node: o.self.Name, Peer: other.Name}
	files.CA, files.Cert, files.Key = o.config.TLS.Files(o.self.Name)
	return files
}

// protect reads the certificates that protect the control link, and looks whether QEMU can
// use them.
func protect(o *runOptions) error {
	c := o.config
	if c.TLS.Insecure {
		return nil
	}
	o.protected = make(map[string]*tls.Config)
	for _, other := range c.Others(o.self.Name) {
		files := certificates(*o, other)
		cfg, err := files.TLS()
		if err == nil && c.TLS.QEMU && c.Arbiter.Type != "" {
			err = files.CheckQEMU()
		}
		if wrong := (*peerlink.CertError)(nil); errors.As(err, &wrong) {
			return c.Refuse("tls."+wrong.What, wrong.Reason, wrong.Fix)
		}
		if err != nil {
			return err
		}
		o.protected[other.Name] = cfg
	}
	return nil
}

func newRun(e env) *cobra.Command {
	var (
		t           target
		role, level string
		metrics     string
		verifierLog bool
	)
	cmd := &cobra.Command{
		Use:   "run -c pair.yaml --node NAME [--role auto|primary|secondary]",
		Short: "Run the daemon of this host in the foreground",
		Long: "run is this host's daemon. What it is in the pair the arbiter's entry decides: the node\n" +
			"that it names, which served last, is the primary, and the other one the secondary. The\n" +
			"role changes while the daemon runs: a secondary takes over, and a host that was deposed\n" +
			"becomes the secondary, with the other host's memory and disks.\n" +
			"Before a pair has run, `lockstep start --here` says which node has the guest's disks.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, other, err := t.load(e)
			if err != nil {
				return err
			}
			switch datapath.Role(role) {
			case failover.RoleAuto, datapath.RolePrimary, datapath.RoleSecondary:
			default:
				return usageError{fmt.Errorf("role %q is none of auto, primary, secondary", role)}
			}
			var lv slog.Level
			if err := lv.UnmarshalText([]byte(level)); err != nil {
				return usageError{fmt.Errorf("log level %q is none of debug, info, warn, error", level)}
			}
			return runDaemon(cmd.Context(), e, runOptions{
				config: c, self: self, other: other,
				role:        datapath.Role(role),
				log:         newLogger(e, lv).With("vm", c.VM, "node", self.Name),
				verifierLog: verifierLog,
				metrics:     metrics,
			})
		},
	}
	t.flags(cmd)
	cmd.Flags().StringVar(&role, "role", string(failover.RoleAuto), "auto: as the arbiter's entry has it; primary: also the first one of a pair that never ran; secondary")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().StringVar(&metrics, "metrics", "", "serve Prometheus metrics at this address, like 127.0.0.1:9177; off by default")
	cmd.Flags().BoolVar(&verifierLog, "verifier-log", false, "print the whole verifier log when the kernel refuses a program")
	return cmd
}
