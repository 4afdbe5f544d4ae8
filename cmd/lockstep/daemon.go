// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/cilium/ebpf"

	"lockstep/compare"
	"lockstep/control"
	"lockstep/control/config"
	"lockstep/control/qemu"
	"lockstep/loader"
)

// kernel is what the program needs of the kernel: package loader, or a test's.
type kernel struct {
	checkBPFFS  func(pinDir string) error
	lock        func(pinDir, vm, node string) (release func(), err error)
	device      func(name string) (*net.Interface, error)
	ensureVXLAN func(v *config.VXLAN, guestMTU int) (device string, err error)
	removeVXLAN func(device string) error
	ensureTap   func(tap, bridge string) error
	removeTap   func(tap string) error
	inUse       func(tap string) (bool, error) // a process has it open
	mute        func(tap string) error         // sets it down
	open        func(nicOptions) (dp control.DataPath, fresh bool, err error)
	upgradable  func(nicOptions) (from string, err error)       // the version to take over from
	unload      func(pinDir, vm, node string, force bool) error // sets the taps down
	letGo       func(pinDir, vm, node string, force bool) error // leaves the taps as they are
	found       func(nicOptions) (control.Found, error)         // what an earlier daemon left
}

// nicOptions are what a NIC's programs and maps are made with.
type nicOptions struct {
	pinDir, vm, node string
	index            int
	primary          bool
	discard          bool   // what is there of an earlier part
	tap, peer        string // devices
	compare          config.Compare
	rules            []config.Rule
	xdp              string
	hash             [32]byte // of the config
	log              *slog.Logger
}

// maxCopies bounds the SVM's output that is kept, where slots would allow more.
const maxCopies = 8192

// runOptions are what `run` was asked for.
type runOptions struct {
	config      *config.Config
	self, other *config.Node
	primary     bool // the role to begin with
	log         *slog.Logger
	verifierLog bool
	metrics     string // address; "": none
}

// runDaemon runs this node's part in the pair, or one after the other, until ctx
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
	protected, err := certificates(o)
	if err != nil {
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
	if c.Arbiter.Type == "" {
		return runPart(ctx, e, o, protected, nil)
	}
	return runLife(ctx, e, o, protected)
}

// runPart puts the kernel half in place for one role and hands it to control. life is
// nil where nobody takes over.
func runPart(ctx context.Context, e env, o runOptions, protected *tls.Config, life *partLife) error {
	c := o.config
	nics, err := devices(e.kernel, o)
	if err != nil {
		return err
	}
	digest := c.Hash()
	opt := control.Options{
		ConfigDigest: hex.EncodeToString(digest[:]),
		VM:           c.VM, Node: o.self.Name, Peer: o.other.Name, Role: control.RoleSecondary,
		Control: o.other.Control.String(), // the primary's
		OwnAddr: o.self.Control.Addr(), PeerAddr: o.other.Control.Addr(),
		TLS: protected,
		QMP: o.self.QMP,
		Compare: compare.Config{
			Timeout: c.Compare.Timeout, CutDelay: c.Compare.CutDelay, MaxConnections: c.Compare.MaxConnections,
			Slots: loader.TCPSlots(c.Compare.Slots), LargeSlots: loader.TCPSlots(c.Compare.GSOSlots),
			KeepYoung: true, // a checkpoint costs no connection a guest's RTO
		},
		Copies: compare.SecondaryConfig{MaxCopies: max(1, min(c.Compare.Slots, maxCopies)/2)}, // parked input finds slots
		Period: c.Checkpoint.Period, MinInterval: c.Checkpoint.MinInterval, TargetPause: c.Checkpoint.TargetPause,
		Rekey: c.TLS.Rekey, EchoEvery: c.Heartbeat.Interval, SpeakFor: c.Heartbeat.Speak,
		StatusSocket: c.Socket(o.self.Name),
		Log:          o.log,
	}
	if o.primary {
		opt.Role, opt.Control = control.RolePrimary, o.self.Control.String()
	}
	if life != nil {
		life.fill(&opt, e, o)
	}
	for _, n := range nics {
		n.discard = life != nil && life.begin.Discard
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
			return c.Refuse(nicKey(o.self, n.index), err.Error(), "")
		}
		opt.NICs = append(opt.NICs, dp)
		opt.Fresh = opt.Fresh || fresh // one NIC's lost tables are the pair's
	}
	return e.control(ctx, opt) // closes the NICs
}

// unfit refuses a config whose parts do not make a whole: a pair that is believed to
// fail over, and does not, is worse than none.
func unfit(o runOptions) error {
	switch c := o.config; {
	case o.self.Starts && c.Arbiter.Type == "":
		return c.Refuse("qemu", "a pair that lockstep starts has to have an arbiter", "name one; {type: none} lets either host speak when it has lost the other")
	case o.self.QMP == "" && c.Arbiter.Type != "":
		return c.Refuse("arbiter", "without QEMU's socket nobody can take over", fmt.Sprintf("describe the guest with qemu, or name its socket with nodes.%s.qmp", o.self.Name))
	}
	if q := o.config.QEMU; q != nil && o.self.Starts {
		if i, err := qemu.CheckExtra(q.Extra); err != nil {
			what, fix, _ := strings.Cut(err.Error(), "; ")
			return o.config.Refuse(fmt.Sprintf("qemu.extra[%d]", i), what, fix)
		}
	}
	return nil
}

// certificates protect the control link; nil where the config wants it insecure.
func certificates(o runOptions) (*tls.Config, error) {
	c := o.config
	if c.TLS.Insecure {
		return nil, nil
	}
	files := control.Certificates{VM: c.VM, Node: o.self.Name, Peer: o.other.Name}
	files.CA, files.Cert, files.Key = c.TLS.Files(o.self.Name)
	cfg, err := files.TLS()
	if wrong := (*control.CertError)(nil); errors.As(err, &wrong) {
		return nil, c.Refuse("tls."+wrong.What, wrong.Reason, wrong.Fix)
	}
	return cfg, err
}

func nicKey(n *config.Node, i int) string { return fmt.Sprintf("nodes.%s.nics[%d]", n.Name, i) }

// devices finds or makes the devices of all NICs before anything is attached to
// one: a NIC that cannot work must not leave the others shut.
func devices(k kernel, o runOptions) ([]nicOptions, error) {
	var nics []nicOptions
	for i, nic := range o.self.NICs {
		key := nicKey(o.self, i)
		if nic.Bridge != "" {
			if err := k.ensureTap(nic.Tap, nic.Bridge); err != nil {
				return nil, notYetError{o.config.Refuse(key+".bridge", err.Error(), "")}
			}
		}
		tap, err := k.device(nic.Tap)
		if err != nil {
			return nil, notYetError{o.config.Refuse(key+".tap", fmt.Sprintf("there is no device %q: %v", nic.Tap, err),
				fmt.Sprintf("make it first, with `ip tuntap add dev %s mode tap`, or name the bridge that it is to be in: then lockstep makes it", nic.Tap))}
		}
		peer := nic.PeerDevice
		if v := nic.PeerVXLAN; v != nil {
			if peer, err = k.ensureVXLAN(v, tap.MTU); err != nil {
				return nil, notYetError{o.config.Refuse(key+".peer.vxlan.underlay", err.Error(), "")}
			}
		} else if _, err := k.device(peer); err != nil {
			return nil, notYetError{o.config.Refuse(key+".peer.device", fmt.Sprintf("there is no device %q: %v", peer, err),
				"make it first, or have lockstep make a VXLAN: peer: {vxlan: {...}}")}
		}
		nics = append(nics, nicOptions{
			pinDir: o.config.PinDir, vm: o.config.VM, node: o.self.Name, index: i,
			primary: o.primary, tap: nic.Tap, peer: peer, compare: o.config.Compare,
			rules: o.config.Compare.PrimaryOnly, xdp: nic.XDP, hash: o.config.Hash(), log: o.log,
		})
	}
	return nics, nil
}
