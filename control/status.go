// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"lockstep/compare"
	"lockstep/control/config"
	"lockstep/control/datapath"
	"lockstep/control/failover"
)

// Status is what a daemon says of itself.
type Status struct {
	VM   string `json:"vm"`
	Node string `json:"node"`
	// What a daemon that takes this one's place must have as well, or the peer refuses it.
	Protocol int    `json:"protocol"` // of the control link
	Config   string `json:"config"`   // digest of what both nodes must agree on

	Role   string `json:"role"`             // "primary", "secondary"
	State  string `json:"state"`            // "start", "replicating", "checkpointing", "failover", "solo", "resync"
	Detail string `json:"detail,omitempty"` // why it is frozen, parked or shut
	Epoch  uint32 `json:"epoch"`
	Term   uint32 `json:"term"`
	// With an arbiter: whether the secondary may take over (R18), and the term of the
	// arbiter's record that this node goes by.
	Covered bool   `json:"covered"`
	Record  uint64 `json:"record,omitempty"`
	// P: how far replication is that begins, and what came of the tries so far.
	Replication *Replication `json:"replication,omitempty"`
	// Why replication does not begin before somebody does something about it.
	Refused string `json:"refused,omitempty"`

	Connections     int    `json:"connections"` // S: with an offset
	HeldPackets     int    `json:"held_packets"`
	HeldBytes       int    `json:"held_bytes"`
	ReleasedPackets uint64 `json:"released_packets"`  // that were held, datagrams too; not pure ACKs
	HalfOpenEvicted uint64 `json:"half_open_evicted"` // connections that made room (R11)
	// CheckpointsRequested counts what asked for one: divergences, timeouts,
	// doubt. The period is not among them. CheckpointsDone counts commits.
	CheckpointsRequested uint64 `json:"checkpoints_requested"`
	CheckpointsDone      uint64 `json:"checkpoints_done"`

	DiskFaults []DiskFault `json:"disk_faults,omitempty"` // what replicas of disks did not do, as far as this node knows
	// P: what the guest wrote since it took over is not in its images yet.
	Unmerged    bool     `json:"unmerged,omitempty"`
	MaskedDisks []string `json:"masked_disks,omitempty"` // P: on these QEMU hides such faults from the guest

	Dropped  map[string]uint64        `json:"dropped"`  // frames by reason
	Counters map[string]uint64        `json:"counters"` // all of the kernel's, by reason, and what is no frame
	Programs map[string]ProgramStatus `json:"programs"` // by name; of further NICs by name@device

	Peer        PeerStatus      `json:"peer"`
	QMP         QMPStatus       `json:"qmp"`
	Overlays    []OverlayStatus `json:"overlays,omitempty"` // the secondary's, one of each file system
	Causes      []Cause         `json:"causes"`             // the last requests, oldest first
	Checkpoints []Checkpoint    `json:"checkpoints"`        // the last attempts, oldest first
}

// Replication is a primary's beginning of one.
type Replication struct {
	What    string `json:"what,omitempty"` // is copied: "memory", or a disk's ID
	Done    int64  `json:"done,omitempty"` // bytes
	Total   int64  `json:"total,omitempty"`
	Rate    int64  `json:"bytes_per_second,omitempty"`
	Dirtied int64  `json:"dirtied_per_second,omitempty"` // bytes that the guest writes to its memory meanwhile
	// Tries in a row that came to nothing, why the last one did, and when the next is due.
	Failed int        `json:"failed,omitempty"`
	Why    string     `json:"why,omitempty"`
	Next   *time.Time `json:"next,omitempty"`
}

// ProgramStatus is where a program is attached.
type ProgramStatus struct {
	Device string `json:"device"`
	Attach string `json:"attach"`
}

// PeerStatus is the control link's state.
type PeerStatus struct {
	Node      string    `json:"node"`
	Address   string    `json:"address,omitempty"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"` // of the present state
	Error     string    `json:"error,omitempty"`
	Insecure  bool      `json:"insecure,omitempty"`
}

// QMPStatus is the state of the connection to this host's QEMU.
type QMPStatus struct {
	Configured bool      `json:"configured"`
	Connected  bool      `json:"connected"`
	Since      time.Time `json:"since"`
	QEMU       string    `json:"qemu,omitempty"`  // version
	State      string    `json:"state,omitempty"` // QEMU's word
	COLO       string    `json:"colo,omitempty"`  // mode
	Error      string    `json:"error,omitempty"` // of the last failure
}

// Cause is a request for a checkpoint.
type Cause struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
	NIC    *int      `json:"nic,omitempty"`
	Flow   string    `json:"flow,omitempty"` // guest>remote
}

// Checkpoint is an attempt at one.
type Checkpoint struct {
	Epoch  uint32    `json:"epoch"`
	At     time.Time `json:"at"`
	Cause  string    `json:"cause"`          // the first of its causes
	Flow   string    `json:"flow,omitempty"` // guest>remote, where a connection asked for it
	Result string    `json:"result"`         // "running", "committed", or why it failed
	// Milliseconds: how long nothing left P, how long either guest stood still.
	FrozenMS   float64 `json:"frozen_ms"`
	PVMPauseMS float64 `json:"pvm_pause_ms"`
	SVMPauseMS float64 `json:"svm_pause_ms"`
}

// Flow is a connection of the guest. The secondary knows offsets, the primary
// the rest.
type Flow struct {
	NIC         int     `json:"nic"`
	Guest       string  `json:"guest"`
	Remote      string  `json:"remote"`
	VLAN        *uint16 `json:"vlan,omitempty"` // TCI
	State       string  `json:"state"`
	Offset      *uint32 `json:"offset,omitempty"`   // ISN_SVM - ISN_PVM
	Compared    *uint32 `json:"compared,omitempty"` // TCP sequence number, PVM numbering
	HeldPackets int     `json:"held_packets"`
	HeldBytes   int     `json:"held_bytes"`
	Age         float64 `json:"age"` // seconds; on the secondary since the last frame
}

// notDrops are the kernel's reasons that are not drops: the frame went on, or
// into a slot, or was a message. Any other counts as a drop, a new one too.
var notDrops = map[string]bool{
	"released": true, "mirrored": true, "held": true, "held_ack": true, "announced": true, "passed": true,
	"record_in": true, "record_out": true, "delivered": true, "parked": true, "released_out": true, "let_in": true,
	"primary_only": true, "nack_out": true, "nack_in": true, "resent": true, "echo_in": true, "echo_out": true, "neigh_out": true,
	"xdp_passed": true, "sacked": true, "peer_again": true, "copy_lost": true, "resend_gone": true,
}

// Status gathers what the daemon knows.
func (d *Daemon) Status(ctx context.Context) (Status, error) {
	var s Status
	if err := d.ask(ctx, func() { s = d.ownStatus() }); err != nil {
		return Status{}, err
	}
	for _, n := range d.nics {
		if err := n.status(&s); err != nil {
			return Status{}, fmt.Errorf("nic %d: %w", n.index, err)
		}
	}
	return s, nil
}

// ownStatus is the controller's share.
func (d *Daemon) ownStatus() Status {
	s := Status{
		VM: d.opt.VM, Node: d.opt.Node, Role: string(d.opt.Role), Epoch: d.epoch, Term: d.term,
		CheckpointsRequested: d.requested.Load(), CheckpointsDone: d.committed,
		Protocol: linkVersion, Config: d.opt.ConfigDigest,
		Dropped: make(map[string]uint64), Counters: make(map[string]uint64), Programs: make(map[string]ProgramStatus),
		Peer: PeerStatus{
			Node: d.opt.Peer, Address: d.peerAddr, Connected: d.linkUp, Since: d.linkSince,
			Error: d.linkErr, Insecure: d.opt.TLS == nil,
		},
		QMP: QMPStatus{
			Configured: d.opt.QMP != "", Connected: d.qmp.info.connected, Since: d.qmp.info.since,
			QEMU: d.qmp.info.version, State: d.qmp.info.state, COLO: d.qmp.info.colo, Error: d.qmp.info.err,
		},
		Causes:      append([]Cause{}, d.causes...),
		Checkpoints: append([]Checkpoint{}, d.attempts...),
	}
	s.State, s.Detail = d.machine.State()
	if d.life != nil {
		d.life.status(&s)
	}
	return s
}

// status adds a NIC's share.
func (n *nic) status(s *Status) error {
	drops := func(d *[compare.ReasonCount]uint64) {
		for r, count := range d {
			switch {
			case count == 0:
			case compare.Reason(r) == compare.ReasonForgotten: // positions
				s.Counters[compare.ReasonForgotten.String()] += count
			default:
				s.Dropped[compare.Reason(r).String()] += count
			}
		}
	}
	err := n.do(func() error {
		if n.intruder != "" {
			s.Detail = strings.TrimPrefix(s.Detail+"; "+n.intruder+": shut until that is mended", "; ")
		}
		if n.intruded > 0 {
			s.Counters["intruded"] += n.intruded
		}
		if n.primary != nil {
			st := n.primary.Stats()
			s.Connections += st.Connections
			s.HeldPackets += st.HeldPackets
			s.HeldBytes += st.HeldBytes
			s.ReleasedPackets += st.ReleasedPackets + st.ReleasedDatagrams
			s.HalfOpenEvicted += st.Evicted
			drops(&st.Drops)
			return nil
		}
		// What S frees are copies, not frames that got lost.
		st := n.secondary.Stats()
		s.HeldPackets += st.Copies + st.Parked
		s.HeldBytes += st.Bytes
		return nil
	})
	if err != nil {
		return err
	}
	counters, err := n.dp.Counters()
	if err != nil {
		return err
	}
	for reason, count := range counters {
		s.Counters[reason] += count
		if !notDrops[reason] && count > 0 {
			s.Dropped[reason] += count
		}
	}
	if n.secondary != nil {
		known, err := n.offsets()
		if err != nil {
			return err
		}
		s.Connections += known
	}
	for _, p := range n.dp.Programs() {
		name := p.Name
		if n.index > 0 {
			name += "@" + p.Device
		}
		s.Programs[name] = ProgramStatus{Device: p.Device, Attach: p.Attach}
	}
	return nil
}

// Flows lists the guest's connections.
func (d *Daemon) Flows(context.Context) ([]Flow, error) {
	flows := []Flow{}
	for _, n := range d.nics {
		more, err := n.flows()
		if err != nil {
			return nil, fmt.Errorf("nic %d: %w", n.index, err)
		}
		flows = append(flows, more...)
	}
	return flows, nil
}

func (n *nic) flows() ([]Flow, error) {
	var out []Flow
	if n.secondary != nil {
		now := n.dp.Now()
		err := n.dp.Offsets(func(t compare.Tuple, o datapath.Offset) {
			f := n.flow(&t)
			f.State, f.Offset, f.Age = o.State, &o.Seq, time.Duration(now-o.Last).Seconds()
			out = append(out, f)
		})
		return out, err
	}
	var all []compare.Flow
	var walk compare.FlowWalk
	err := n.do(func() error {
		walk = n.primary.WalkFlows()
		return nil
	})
	for more := true; more && err == nil; {
		err = n.do(func() error {
			all, more = walk.Next(n.primary, flowsPart, all)
			return nil
		})
	}
	compare.SortFlows(all)
	for _, c := range all {
		f := n.flow(&c.Tuple)
		f.State, f.Compared, f.HeldPackets, f.HeldBytes, f.Age = c.State, &c.Compared, c.Held, c.HeldBytes, c.Age.Seconds()
		out = append(out, f)
	}
	return out, err
}

// flowsPart is how many flows are listed before the NIC's loop turns again.
const flowsPart = 1000

func (n *nic) flow(t *compare.Tuple) Flow {
	f := Flow{
		NIC:    n.index,
		Guest:  netip.AddrPortFrom(netip.AddrFrom16(t.Guest).Unmap(), t.GuestPort).String(),
		Remote: netip.AddrPortFrom(netip.AddrFrom16(t.Remote).Unmap(), t.RemotePort).String(),
	}
	if t.VLAN != 0 {
		f.VLAN = &t.VLAN
	}
	return f
}

const askTimeout = 10 * time.Second

// listenStatus opens the status socket. A dead daemon's is replaced, a living
// one's is not.
func listenStatus(ctx context.Context, path string) (net.Listener, error) {
	conn, err := (&net.Dialer{Timeout: askTimeout}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("a daemon already answers on %s; stop it first", path)
	case errors.Is(err, syscall.EAGAIN):
		return nil, fmt.Errorf("a daemon listens on %s and takes no connection: it stands still; stop it first", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove a dead daemon's status socket: %w", err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("protect the status socket: %w", err)
	}
	return l, nil
}

// serveStatus answers until ctx ends.
func (d *Daemon) serveStatus(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /status", answer(d.Status))
	mux.Handle("GET /flows", answer(d.Flows))
	mux.Handle("POST /checkpoint", obey(func(ctx context.Context, _ *http.Request) (Checkpoint, error) { return d.Checkpoint(ctx) }))
	mux.Handle("POST /failover", obey(func(ctx context.Context, r *http.Request) (FailoverDone, error) {
		return d.Failover(ctx, r.URL.Query().Has("force"))
	}))
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: askTimeout,
		WriteTimeout:      askTimeout,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("status socket: %w", err)
	case <-ctx.Done():
	}
	// Whoever is being answered still looks at the data paths.
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer done()
	if srv.Shutdown(stop) != nil {
		srv.Close()
	}
	<-served
	return nil
}

func answer[T any](get func(context.Context) (T, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := get(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		reply(w, v)
	})
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // an error here is the asker's
}

// Takes reports whether a daemon of this version, with a config of this digest, can take the
// place of the one whose status s is: whether the peer will have it.
func (s *Status) Takes(digest string) error {
	switch in := strings.Join(config.DifferHex(s.Config, digest), ", "); {
	case s.Protocol == 0:
		return errors.New("the daemon that runs does not tell what its peer expects: it is too old to be replaced alone")
	case s.Protocol != linkVersion:
		return fmt.Errorf("the daemon that runs speaks control protocol %d with %s, and this lockstep %d", s.Protocol, s.Peer.Node, linkVersion)
	case s.State == "solo" || s.Config == digest:
		return nil
	case in == "":
		return errors.New("the daemon that runs has another config, and its version does not tell in what")
	default:
		return fmt.Errorf("the daemon that runs has another config (%s)", in)
	}
}

// ErrNoDaemon means that nothing listens on a status socket.
var ErrNoDaemon = errors.New("no daemon runs")

// FetchStatus asks the daemon behind the status socket path for its status.
func FetchStatus(ctx context.Context, path string) (Status, error) {
	return call[Status](ctx, http.MethodGet, path, "status")
}

// FetchFlows asks for the guest's connections.
func FetchFlows(ctx context.Context, path string) ([]Flow, error) {
	return call[[]Flow](ctx, http.MethodGet, path, "flows")
}

func call[T any](ctx context.Context, method, path, topic string) (v T, err error) {
	client := http.Client{
		Timeout: map[string]time.Duration{http.MethodGet: askTimeout, http.MethodPost: failover.OrderTimeout + askTimeout}[method],
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}},
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://lockstep/"+topic, nil)
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return v, fmt.Errorf("%w (%s: %w)", ErrNoDaemon, path, err)
	}
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	if resp.StatusCode == http.StatusConflict {
		return v, errors.New(strings.TrimSpace(string(body))) // the daemon's reason
	}
	if resp.StatusCode != http.StatusOK {
		return v, fmt.Errorf("the daemon cannot tell its %s: %s", topic, body)
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return v, fmt.Errorf("the daemon's %s make no sense, is it of another version? %w", topic, err)
	}
	return v, nil
}
