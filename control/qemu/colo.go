// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"lockstep/control/qmp"
)

const (
	poll = 20 * time.Millisecond
	// slow is the deadline of commands that wait for the guest's I/O.
	slow = 15 * time.Second
	// settle is how long QEMU may take between two states that follow by
	// themselves.
	settle = 15 * time.Second
	// nbdConnect bounds in seconds how long QEMU, and its guest with it, waits
	// for the secondary's NBD server.
	nbdConnect = 1
)

// Caps are what a QEMU can do.
type Caps struct {
	Version string
	Machine string // with its version, "pc-i440fx-7.2"
	Accel   string // "kvm" or "tcg"
	Disks   bool   // it has the replication driver
}

// Probe finds out what QEMU can do, and refuses one whose COLO is known not to
// work.
func Probe(m *qmp.Monitor) (Caps, error) {
	c := Caps{Version: m.Version(), Accel: "tcg"}
	var kvm struct{ Enabled bool }
	if err := m.Execute("query-kvm", nil, &kvm); err != nil {
		return c, err
	}
	if kvm.Enabled {
		c.Accel = "kvm"
	}
	if why := BrokenCOLO(ParseVersion(c.Version), c.Accel); why != "" {
		return c, fmt.Errorf("QEMU %s: %s; use %s", c.Version, why, GoodQEMU)
	}
	if err := m.Execute("qom-get", map[string]string{"path": "/machine", "property": "type"}, &c.Machine); err != nil {
		return c, err
	}
	c.Machine = strings.TrimSuffix(c.Machine, "-machine")
	var commands []struct{ Name string }
	if err := m.Execute("query-commands", nil, &commands); err != nil {
		return c, err
	}
	for _, need := range []string{"x-colo-lost-heartbeat", "query-colo-status", "yank", "x-blockdev-change"} {
		if !slices.ContainsFunc(commands, func(n struct{ Name string }) bool { return n.Name == need }) {
			return c, fmt.Errorf("QEMU %s has no %s: it was built without COLO, or is older than 6.0", c.Version, need)
		}
	}
	if _, ok, err := capability(m, "x-colo"); err != nil {
		return c, err
	} else if !ok {
		return c, fmt.Errorf("QEMU %s has no migration capability x-colo", c.Version)
	}
	var schema []struct{ Values []string }
	if err := m.Execute("query-qmp-schema", nil, &schema); err != nil {
		return c, err
	}
	for _, s := range schema {
		if slices.Contains(s.Values, "quorum") && slices.Contains(s.Values, "replication") {
			c.Disks = true
		}
	}
	return c, nil
}

// ParseVersion reads the three numbers of "7.2.22"; one that is missing is 0.
func ParseVersion(version string) (v [3]int) {
	for i, f := range strings.SplitN(version, ".", 3) {
		v[i], _ = strconv.Atoi(f)
	}
	return v
}

// GoodQEMU is what to use in place of a release that [BrokenCOLO] names.
const GoodQEMU = "10.0.13 or later of 10.0, or a release from 7.2 to 9.2"

// BrokenCOLO says what is wrong with COLO in a release under an accelerator; "": it works.
func BrokenCOLO(v [3]int, accel string) string {
	switch {
	case v[0] == 10 && v[1] == 0 && v[2] < 13:
		return "COLO is broken in 10.0 before 10.0.13"
	case v[0] == 10 && v[1] == 1:
		return "COLO is broken in 10.1"
	case v[0] >= 11 && accel == "tcg":
		return "under TCG, from 11 on, a COLO secondary crashes or falls silent at a checkpoint"
	}
	return ""
}

// SameMachine is an error unless the two hosts' guests have the same hardware: an alias
// such as "pc" is another machine in another release of QEMU.
func SameMachine(own, peer Caps) error {
	if own.Machine == peer.Machine {
		return nil
	}
	return fmt.Errorf("the guest's machine is %s here (QEMU %s), and %s there (QEMU %s): set qemu.machine to the older of the two in both hosts' configs, "+
		"or install the same QEMU on both", own.Machine, own.Version, peer.Machine, peer.Version)
}

// capability reports whether a migration capability is on, and whether it is there at
// all.
func capability(m *qmp.Monitor, name string) (on, there bool, err error) {
	var caps []struct {
		Capability string
		State      bool
	}
	err = m.Execute("query-migrate-capabilities", nil, &caps)
	for _, c := range caps {
		if c.Capability == name {
			return c.State, true, err
		}
	}
	return false, false, err
}

// setCOLO switches x-colo. From 11 on it needs return-path, with which 7.2 does not
// come to COLO: so that is set only where x-colo alone is refused.
func setCOLO(m *qmp.Monitor, on bool) error {
	if is, _, err := capability(m, "x-colo"); err != nil || is == on {
		return err
	}
	err := setCapabilities(m, on, "x-colo")
	if err != nil && on && setCapabilities(m, on, "return-path", "x-colo") == nil {
		return nil
	}
	return err
}

// nodes are the names of all block nodes.
func nodes(m *qmp.Monitor) (map[string]bool, error) {
	var list []struct {
		Name string `json:"node-name"`
	}
	if err := m.Execute("query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(list))
	for _, n := range list {
		names[n.Name] = true
	}
	return names, nil
}

func checkCaps(caps Caps, disks []Disk) error {
	if len(disks) > 0 && !caps.Disks {
		return fmt.Errorf("QEMU %s cannot replicate disks: it was built without the quorum or the replication driver", caps.Version)
	}
	return nil
}

// PrepareSecondary makes a secondary that waits for its primary ready for it:
// behind it the primary may call [Replicate]. nbd is where it serves its disks'
// images.
func PrepareSecondary(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, nbd netip.AddrPort) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if mode, err := m.COLO(); err != nil || mode == "secondary" {
		return err
	}
	// From 8.1 on the secondary has to know; 7.2 does not mind.
	if err := setCOLO(m, true); err != nil {
		return err
	}
	if len(disks) == 0 {
		return nil
	}
	var exports []struct{ ID string }
	if err := m.Execute("query-block-exports", nil, &exports); err != nil {
		return err
	}
	if len(exports) == 0 {
		err := m.Execute("nbd-server-start", map[string]any{"addr": map[string]any{"type": "inet",
			"data": map[string]string{"host": nbd.Addr().String(), "port": strconv.Itoa(int(nbd.Port()))}}}, nil)
		if err != nil && !strings.Contains(err.Error(), "already running") {
			return err
		}
	}
	for i := range disks {
		name := parentNode(i)
		if slices.ContainsFunc(exports, func(e struct{ ID string }) bool { return e.ID == name }) {
			continue
		}
		if err := m.Execute("nbd-server-add", map[string]any{"device": name, "writable": true}, nil); err != nil {
			return fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// Options of Replicate.
type Options struct {
	// Resync copies the disks to the secondary first. Without it the images of
	// both hosts have to be the same already.
	Resync bool
	// Progress is told how far things are, in between; nil: nobody is.
	Progress func(Progress)
	Limits

	ownPeriod bool // a mutation, only tests set it: QEMU's own period stays
}

// Progress is how much is done of copying one disk, or the memory, or of comparing a
// disk's images.
type Progress struct {
	What        string // "memory" or the disk's ID
	Compare     bool   // both hosts' images are compared, and nothing is copied
	Done, Total int64  // bytes; Total may grow
	Rate        int64  // bytes per second; 0: not measured yet
	Dirtied     int64  // of memory: bytes per second that the guest writes meanwhile; 0: not measured yet
}

func (p Progress) String() string {
	what := p.What
	if p.Compare {
		what = "comparing the images of " + what
	}
	s := fmt.Sprintf("%s: %d of %d MiB", what, p.Done>>20, p.Total>>20)
	if p.Rate > 0 {
		s += ", " + perSecond(p.Rate)
	}
	if p.Dirtied > 0 {
		s += ", and the guest writes " + perSecond(p.Dirtied)
	}
	return s
}

// Replicate makes a primary, or a guest that is alone, replicate to the
// secondary at to, which is prepared. Behind it the guest runs in COLO: it does
// so as well when it was paused before, as a primary is that was just started.
// When replication is on already, it returns at once.
//
// The guest runs meanwhile. When it fails, or ctx ends, everything is undone, and
// the guest goes on alone if it ran. The secondary's QEMU has to be started anew
// then.
//
// Other than with QEMU's replication driver on the primary, which refuses writes
// until COLO is on, the secondary's image is an NBD child of the disk's quorum from
// the moment on in which both are the same. So the guest need not stand still while
// its memory is copied.
func Replicate(ctx context.Context, m *qmp.Monitor, caps Caps, disks []Disk, to Incoming, o Options) error {
	if err := checkCaps(caps, disks); err != nil {
		return err
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	o.Limits.fill()
	state, err := migration(m)
	if err != nil {
		return err
	}
	running, _, err := m.Status()
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"setup", "active", "colo"}, state.Status) {
		// What an earlier try has left is found before a disk is copied in vain.
		if err := endMigration(ctx, m, disks); err != nil {
			return err
		}
		err = begin(ctx, m, disks, to, o, running)
	}
	if err == nil {
		err = finish(ctx, m, o, running)
	}
	if err != nil {
		return errors.Join(err, undo(m, disks, running))
	}
	return nil
}

// begin does everything up to the order to migrate.
func begin(ctx context.Context, m *qmp.Monitor, disks []Disk, to Incoming, o Options, running bool) error {
	if len(disks) > 0 {
		// Of an earlier try, or of the time before a failover.
		if err := detach(m, disks); err != nil {
			return err
		}
		if err := until(ctx, "the overlays are merged", func() (bool, error) { return Merged(m, disks) }); err != nil {
			return err
		}
		for i := range disks {
			if err := connectNBD(m, i, to.NBD); err != nil {
				return fmt.Errorf("disk %s: %w", disks[i].ID, err)
			}
		}
		if o.Resync {
			if err := mirror(ctx, m, disks, o); err != nil {
				return err
			}
			if running {
				if err := guarded(m, disks, func() error { return Stop(m) }); err != nil {
					return err
				}
			}
			if err := endMirror(ctx, m, disks); err != nil {
				return err
			}
		}
		if err := guarded(m, disks, func() error { return attach(m, disks) }); err != nil {
			return err
		}
		if o.Resync && running {
			if err := Cont(m); err != nil {
				return err
			}
		}
	}
	if err := setLimits(m, o.Limits); err != nil {
		return err
	}
	if err := setCOLO(m, true); err != nil {
		return err
	}
	// No checkpoint but ours, from the first moment on (R12).
	if !o.ownPeriod {
		if err := m.Checkpoint(); err != nil {
			return err
		}
	}
	return m.Execute("migrate", map[string]any{"uri": to.Migration}, nil)
}

func connectNBD(m *qmp.Monitor, i int, to netip.AddrPort) error {
	return m.ExecuteWithin(slow, "blockdev-add", map[string]any{
		"driver": "nbd", "node-name": nbdNode(i), "export": parentNode(i), "open-timeout": nbdConnect,
		"server": map[string]string{"type": "inet", "host": to.Addr().String(), "port": strconv.Itoa(int(to.Port()))},
	}, nil)
}

func mirrorJob(d *Disk) string { return "resync-" + d.ID }

type job struct {
	ID      string
	Status  string
	Current int64 `json:"current-progress"`
	Total   int64 `json:"total-progress"`
	Error   string
}

func (j *job) ready() bool    { return j.Status == "ready" }
func (j *job) finished() bool { return j.Status == "concluded" }

// mirrors are the disks' jobs, in the disks' order.
func mirrors(m *qmp.Monitor, disks []Disk) ([]*job, error) {
	if len(disks) == 0 {
		return nil, nil
	}
	var all []job
	if err := m.Execute("query-jobs", nil, &all); err != nil {
		return nil, err
	}
	list := make([]*job, len(disks))
	for i := range disks {
		for k := range all {
			if all[k].ID == mirrorJob(&disks[i]) {
				list[i] = &all[k]
			}
		}
	}
	return list, nil
}

// mirror copies the disks and returns when both sides are the same, but for what
// the guest writes now. It is drive-mirror's job; over a node of a name that is
// known, so that its connection can be cut.
func mirror(ctx context.Context, m *qmp.Monitor, disks []Disk, o Options) error {
	for i := range disks {
		d := &disks[i]
		args := map[string]any{
			"job-id": mirrorJob(d), "device": d.ID, "target": nbdNode(i), "sync": "full", "auto-dismiss": false,
		}
		if o.Bandwidth > 0 {
			args["speed"] = o.Bandwidth
		}
		if err := guarded(m, disks, func() error { return m.ExecuteWithin(slow, "blockdev-mirror", args, nil) }); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	copies := make([]diskCopy, len(disks))
	for i := range copies {
		copies[i].still.limit = o.Stalled
	}
	return until(ctx, "the disks are copied", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for i, j := range jobs {
			if j == nil || j.finished() {
				return false, mirrorFailed(&disks[i], j)
			}
			p, err := copies[i].look(&disks[i], j, o.Limits)
			if err != nil {
				return false, err
			}
			o.Progress(p)
			all = all && j.ready()
		}
		return all, nil
	})
}

// diskCopy follows the copy of one disk.
type diskCopy struct {
	still stall
	speed meter
	size  int64     // of its first pass; 0: QEMU does not know yet
	again time.Time // since when only what the guest writes meanwhile is left
}

func (c *diskCopy) look(d *Disk, j *job, l Limits) (Progress, error) {
	if c.size == 0 {
		c.size = j.Total
	}
	if c.again.IsZero() && c.size != 0 && j.Current >= c.size {
		c.again = time.Now()
	}
	p := Progress{What: d.ID, Done: j.Current, Total: j.Total, Rate: c.speed.measure(j.Current)}
	switch still := c.still.spent(j.Current); {
	case j.ready():
	case still:
		return p, fmt.Errorf("disk %s: copying it to the secondary has stood still for %v, at %d of %d MiB", d.ID, l.Stalled, p.Done>>20, p.Total>>20)
	case !c.again.IsZero() && time.Since(c.again) > l.Timeout:
		return p, fmt.Errorf("disk %s: the guest has written for %v as fast as its disk is copied, at %s; a faster link, a higher migration.bandwidth or less load ends that",
			d.ID, l.Timeout, perSecond(p.Rate))
	}
	return p, nil
}

func perSecond(rate int64) string { return fmt.Sprintf("%.1f MiB/s", float64(rate)/(1<<20)) }

func mirrorFailed(d *Disk, j *job) error {
	why := "the job is gone"
	if j != nil && j.Error != "" {
		why = j.Error
	}
	return fmt.Errorf("disk %s: copying it to the secondary failed: %s", d.ID, why)
}

// endMirror ends the jobs; the guest stands still, so both sides are the same
// behind it.
func endMirror(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pause, errors.New("the guest stands still for it, and the secondary does not take the rest of its disk"))
	defer cancel()
	for i := range disks {
		// Of a job that is ready, cancel copies the rest and ends well.
		if err := guarded(m, disks, func() error {
			return m.ExecuteWithin(slow, "block-job-cancel", map[string]any{"device": mirrorJob(&disks[i])}, nil)
		}); err != nil {
			return fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
	}
	return until(ctx, "the copies are complete", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for i, j := range jobs {
			switch {
			case j == nil:
			case !j.finished():
				all = false
			case j.Error != "":
				return false, mirrorFailed(&disks[i], j)
			default:
				if err := m.Execute("job-dismiss", map[string]string{"id": j.ID}, nil); err != nil {
					return false, err
				}
			}
		}
		return all, nil
	})
}

type migrationState struct {
	Status string
	Why    string `json:"error-desc"`
	RAM    struct {
		Transferred, Remaining, Total int64
		PageSize                      int64 `json:"page-size"`
		DirtyPages                    int64 `json:"dirty-pages-rate"` // per second
	}
}

func migration(m *qmp.Monitor) (s migrationState, err error) {
	err = m.Execute("query-migrate", nil, &s)
	return s, err
}

// finish waits until COLO is on and the guest runs in it. running: it did before, and
// must not stand still for long.
func finish(ctx context.Context, m *qmp.Monitor, o Options, running bool) error {
	copying, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	still, halted := stall{limit: o.Stalled}, stall{limit: pause}
	var speed meter
	var last Progress
	err := until(copying, "the memory is copied", func() (bool, error) {
		s, err := migration(m)
		if err != nil {
			return false, err
		}
		switch s.Status {
		case "colo":
			return true, nil
		case "setup", "active", "device":
			last = Progress{What: "memory", Done: max(0, s.RAM.Total-s.RAM.Remaining), Total: s.RAM.Total,
				Rate: speed.measure(s.RAM.Transferred), Dirtied: s.RAM.DirtyPages * s.RAM.PageSize}
			o.Progress(last)
			if still.spent(s.RAM.Transferred) {
				return false, fmt.Errorf("copying the memory to the secondary has stood still for %v, at %d of %d MiB", o.Stalled, last.Done>>20, last.Total>>20)
			}
			return false, standsStill(m, running, &halted)
		}
		if s.Why == "" {
			s.Why = "its state is " + s.Status
		}
		return false, fmt.Errorf("the migration to the secondary failed: %s", s.Why)
	})
	if err != nil && ctx.Err() == nil && copying.Err() != nil {
		return fmt.Errorf("the memory was not copied within %v: %s are copied and the guest writes %s, with %d of %d MiB left; "+
			"a faster link, a higher migration.bandwidth, migration.auto_converge, less load or a longer migration.timeout ends that",
			o.Timeout, perSecond(last.Rate), perSecond(last.Dirtied), (last.Total-last.Done)>>20, last.Total>>20)
	}
	if err != nil {
		return err
	}
	ctx, cancelCOLO := context.WithTimeoutCause(ctx, settle, errors.New("COLO began and ended at once: the secondary's log tells why"))
	defer cancelCOLO()
	return until(ctx, "the guest runs in COLO", func() (bool, error) {
		mode, err := m.COLO()
		if err != nil {
			return false, err
		}
		is, _, err := m.Status()
		if err != nil || is && mode == "primary" {
			return err == nil, err
		}
		return false, standsStill(m, running, &halted)
	})
}

// standsStill is an error when a guest that ran has stood still for too long, because
// the secondary does not take the last of its state.
func standsStill(m *qmp.Monitor, ran bool, halted *stall) error {
	is, _, err := m.Status()
	if err != nil || !ran {
		return err
	}
	if is {
		halted.at = time.Time{}
		return nil
	}
	if halted.spent(0) {
		return fmt.Errorf("the guest has stood still for %v, because the secondary does not take the last of its state", halted.limit)
	}
	return nil
}

// undo leaves a guest that is alone, running if it was; it needs no context,
// because each command has its deadline.
func undo(m *qmp.Monitor, disks []Disk, running bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*settle)
	defer cancel()
	// Whatever waits for the secondary fails at once.
	err := endMigration(ctx, m, disks)
	if running {
		err = errors.Join(err, goOn(m)) // the rest need not keep it waiting
	}
	for i := range disks {
		m.Execute("block-job-cancel", map[string]any{"device": mirrorJob(&disks[i]), "force": true}, nil)
	}
	err = errors.Join(err, until(ctx, "the copies have ended", func() (bool, error) {
		jobs, err := mirrors(m, disks)
		if err != nil {
			return false, err
		}
		all := true
		for _, j := range jobs {
			if j != nil && j.finished() {
				err = errors.Join(err, m.Execute("job-dismiss", map[string]string{"id": j.ID}, nil))
			} else if j != nil {
				all = false
			}
		}
		return all, err
	}))
	err = errors.Join(err, PrimaryFailover(ctx, m, disks), setCOLO(m, false))
	if running {
		err = errors.Join(err, goOn(m))
	}
	if err != nil {
		return fmt.Errorf("and could not be undone: %w", err)
	}
	return nil
}

// goOn has a guest run that does not.
func goOn(m *qmp.Monitor) error {
	is, _, err := m.Status()
	if err != nil || is {
		return err
	}
	return Cont(m)
}

// cut ends the connections to the other host: what waits for it, and may hold up
// the whole QEMU, fails.
func cut(m *qmp.Monitor, disks []Disk) error {
	return m.Yank(func(l qmp.Link) bool {
		if isMigration(l) {
			return true
		}
		for i := range disks {
			if l.Type == "block-node" && l.Node == nbdNode(i) {
				return true
			}
		}
		return false
	})
}

// PrimaryFailover makes a primary whose secondary is dead go on alone. It returns
// when COLO is off and the guest runs, or stands still for a reason of its own. What
// it could not write to the secondary's disks is done again on its own.
func PrimaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// First of all: a guest's write that waits for a silent host can hold up
	// every other command.
	err := cut(m, disks)
	// A disk that keeps the secondary's image must not keep the guest in COLO.
	return errors.Join(err, detach(m, disks), lostHeartbeat(ctx, m, "primary"), Retry(m))
}

// SecondaryFailover makes a secondary whose primary is dead take over. It
// returns when COLO is off and the guest runs, or stands still for a reason of its own.
// A secondary whose guest is not in
// COLO yet cannot, and its QEMU may end.
func SecondaryFailover(ctx context.Context, m *qmp.Monitor, disks []Disk) error {
	// A QEMU that reads a checkpoint from a silent host answers nothing else.
	cutErr := cut(m, nil)
	_, state, err := m.Status()
	if err != nil {
		return err
	}
	if state == "inmigrate" {
		if mode, err := m.COLO(); err != nil || mode != "secondary" {
			return errors.Join(errors.New("this secondary has no guest that could take over: it still waits for the primary's"), err)
		}
	}
	if len(disks) > 0 {
		if err := m.ExecuteWithin(slow, "nbd-server-stop", nil, nil); err != nil && !strings.Contains(err.Error(), "not running") {
			return err
		}
	}
	return errors.Join(cutErr, lostHeartbeat(ctx, m, "secondary"))
}

// lostHeartbeat ends COLO.
func lostHeartbeat(ctx context.Context, m *qmp.Monitor, mode string) error {
	is, err := m.COLO()
	if err != nil {
		return err
	}
	if is == "none" {
		return nil
	}
	if is != mode {
		return fmt.Errorf("the guest is %s in COLO, not %s", is, mode)
	}
	if err := m.Execute("x-colo-lost-heartbeat", nil, nil); err != nil {
		// It ended by itself meanwhile?
		if is, e := m.COLO(); e != nil || is != "none" {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	return until(ctx, "COLO has ended", func() (bool, error) {
		mode, err := m.COLO()
		if err != nil || mode != "none" {
			return false, err
		}
		running, state, err := m.Status()
		return running || ownState[state], err
	})
}

// ownState are the states of a guest that stands still for a reason of its own, not of
// COLO's.
var ownState = map[string]bool{
	"io-error": true, "guest-panicked": true, "watchdog": true, "internal-error": true, "shutdown": true, "suspended": true, "prelaunch": true,
}

// Retry has a guest go on that QEMU stopped because a disk failed: it tries the
// request again. When that fails, too, QEMU stops it again. Nothing, when the guest
// stands still for another reason, or runs.
func Retry(m *qmp.Monitor) error {
	_, state, err := m.Status()
	if err != nil || state != "io-error" {
		return err
	}
	return Cont(m)
}

// Merged reports whether a guest that took over has merged what it wrote into its
// images, as it does in the background. Until then the images alone are of
// no use: the overlays hold the rest.
func Merged(m *qmp.Monitor, disks []Disk) (bool, error) {
	have, err := nodes(m)
	if err != nil {
		return false, err
	}
	for i := range disks {
		if have[activeNode(i)] {
			return false, nil
		}
	}
	return true, nil
}

// Announce has every switch on the way learn where the guest's addresses are now.
func Announce(m *qmp.Monitor) error {
	return m.Execute("announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 50}, nil)
}

// Stop stops the guest's CPUs, when its I/O under way is done.
func Stop(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "stop", nil, nil) }

// Cont lets a guest that was stopped go on.
func Cont(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "cont", nil, nil) }

// Shutdown asks the guest to shut down, as its power button does.
func Shutdown(m *qmp.Monitor) error { return m.Execute("system_powerdown", nil, nil) }

// Quit ends QEMU, with its images written back.
func Quit(m *qmp.Monitor) error { return m.ExecuteWithin(slow, "quit", nil, nil) }

// until asks again and again until it is done, fails or ctx ends.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, context.Cause(ctx))
		}
	}
}
