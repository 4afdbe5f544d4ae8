// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"math"
	"slices"
	"time"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/control/state"
	"github.com/lockstep-ft/lockstep/sim/kernel"
	"github.com/lockstep-ft/lockstep/sim/tcp"
)

// frozen counts the reasons why something does not run.
type frozen struct{ reasons int }

func (f *frozen) isFrozen() bool { return f.reasons > 0 }

// host is one machine.
type host struct {
	w     *world
	id    int
	name  string
	alive bool
	frozen
	offset int64   // of its boottime
	rate   float64 // of its clock

	nic     *kernel.NIC // nil: nothing is pinned
	daemon  *daemon     // nil: none runs
	qemu    *qemu       // the newest; nil: there was none yet
	monitor *monitor    // the daemon's connection to it
	disk    *disk
	state   state.State // on disk
	replies int64       // when the last frame to the peer arrives

	replaced int64 // when its daemon learnt that the arbiter names the other host; 0: it did not
}

var names = [2]string{"alpha", "beta"}

func (h *host) other() *host { return h.w.hosts[1-h.id] }

// clock is the host's boottime.
func (h *host) clock() int64 { return h.offset + int64(float64(h.w.now)*h.rate) }

// until is how long the host's clock takes to be at, in the world's time.
func (h *host) until(at int64) int64 {
	return max(int64(math.Ceil(float64(at-h.offset)/h.rate))-h.w.now, 0)
}

func (h *host) works() bool { return h.alive && !h.isFrozen() }

// newNIC makes the kernel's tables anew.
func (h *host) newNIC(role datapath.Role) {
	h.dropNIC()
	opts := h.w.sc.kernel(role, h.mac())
	opts.Mutation = programs[h.w.mutation]
	h.nic = kernel.New(kernel.Host{
		Now:     h.clock,
		ToGuest: func(f []byte) { h.toGuest(f) },
		ToWire:  func(f []byte) { h.toWire(f) },
		ToPeer:  func(f []byte) { h.toPeer(f) },
		Rand:    h.w.rnd(rndKeys),
		Timer:   h.timer,
		InDoubt: h.w.inDoubt,
	}, opts)
}

// timer is one of the kernel's, which stand still with the host.
func (h *host) timer(at int64, f func()) {
	h.w.after(h.until(at), func() {
		switch {
		case !h.alive:
		case h.isFrozen():
			h.timer(at+int64(time.Millisecond), f)
		default:
			f()
			h.turn()
		}
	})
}

// dropNIC: the tables are gone.
func (h *host) dropNIC() {
	if h.nic != nil {
		for what, why := range map[string]bpf.LockstepLsReason{
			"fast path: held": bpf.LockstepLsReasonLS_R_fastHeld, "fast path: passed": bpf.LockstepLsReasonLS_R_fastPassed,
			"fast path: sent": bpf.LockstepLsReasonLS_R_fastOut, "fast path: record": bpf.LockstepLsReasonLS_R_fastIn,
		} {
			h.w.reached[what] += int(h.nic.Count(why))
		}
		h.nic.Release()
		h.nic = nil
	}
}

// pinned is what a daemon finds.
func (h *host) pinned() datapath.Pinned {
	if h.nic == nil {
		return datapath.Pinned{}
	}
	return h.nic.Pinned()
}

func (h *host) toGuest(frame []byte) {
	if h.qemu != nil && h.qemu.alive {
		h.qemu.arrive(frame)
	}
}

// fromGuest takes frames that this host's guest sends.
func (h *host) fromGuest(frames [][]byte) {
	switch {
	case len(frames) == 0:
		return
	case h.nic == nil: // a tap that no program is at
		for _, f := range frames {
			h.toWire(f)
		}
		return
	case h.w.sc.GSO:
		for _, l := range offload(frames) {
			if l.gso > 0 {
				h.w.reach("large frame")
			}
			h.nic.FromGuest(l.frame, l.gso)
		}
	default:
		for _, f := range frames {
			h.nic.FromGuest(f, 0)
		}
	}
	h.turn()
}

// toWire is a frame that leaves the host: from here on it counts.
func (h *host) toWire(frame []byte) {
	w := h.w
	w.left(h, frame)
	w.port = h.id
	w.client.receive(frame)
}

// fromWire is a frame of a client's.
func (h *host) fromWire(frame []byte) {
	if !h.works() {
		return
	}
	if h.nic == nil {
		h.toGuest(frame)
		return
	}
	h.nic.FromWire(frame)
	h.turn()
}

// toPeer sends a frame to the other host's peer device.
func (h *host) toPeer(frame []byte) {
	w, sc := h.w, h.w.sc
	if w.cut.peer > 0 || w.chance(rndPeer, sc.PeerLoss) {
		return
	}
	times := 1
	if w.chance(rndPeer, sc.PeerDup) {
		times = 2
	}
	for i := range times {
		again := frame
		if i > 0 {
			again = slices.Clone(frame) // each is the other host's, which changes it
		}
		d := w.between(rndPeer, 15*us, 60*us)
		if w.chance(rndPeer, sc.PeerReorder) {
			d += w.between(rndPeer, 50*us, 3*ms)
		} else if at := w.now + d; at < h.replies {
			d = h.replies - w.now
		}
		h.replies = max(h.replies, w.now+d)
		w.after(d, func() {
			o := h.other()
			if w.cut.peer == 0 && o.works() && o.nic != nil {
				o.nic.FromPeer(again)
				o.turn()
			}
		})
	}
}

// turn has the daemon look at what the kernel has for it, soon.
func (h *host) turn() {
	if h.daemon != nil {
		h.daemon.turnWithin(h.w.between(rndDaemon+h.id, 5*us, 60*us))
	}
}

// guestConfig is the guests' stack. Both are the same machine; what they draw at random is not.
func (w *world) guestConfig() tcp.Config {
	c := w.sc.stack()
	c.MAC, c.PeerMAC = [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	c.Addr = w.sc.guestAddr()
	c.Secret = w.rnd(rndQEMU).Uint64()
	return c
}

// startQEMU starts a QEMU: one that boots a guest, or one that waits for a migration.
func (h *host) startQEMU(waits bool) {
	w := h.w
	if !waits && h.state.Off {
		w.failf("power-off", "%s boots the guest, which powered off", h.name)
	}
	w.qemus++
	q := &qemu{w: w, h: h, id: w.qemus, alive: true, state: "prelaunch", colo: "none"}
	if waits {
		q.state = "inmigrate"
	} else {
		q.another, w.booted = w.booted, true
		q.guest = newGuest(w.guestConfig(), w.rnd(rndQEMU).Uint64(), w.sc.Announce, h.clock())
	}
	h.disk.checkpoint() // its overlays are new
	if !waits {
		w.remembers(h)
	}
	q.wakeUp.do = q.runGuest
	h.qemu = q
	w.logf("%v starts, %s", q, q.state)
}

// lose is the host's end: power is gone.
func (h *host) lose() {
	if !h.alive {
		return
	}
	h.alive = false
	if h.qemu != nil {
		h.qemu.die()
	}
	if h.daemon != nil {
		h.daemon.kill(false)
	}
	h.dropNIC() // nothing that was pinned is there after a boot
	h.monitor = nil
	h.reasons = 0
	h.w.logf("host %s is lost", h.name)
}

// freeze and thaw: the host stands still, its clock does not.
func (h *host) freeze() { h.reasons++ }

func (h *host) thaw() {
	if h.reasons == 0 {
		return // it was lost meanwhile
	}
	if h.reasons--; h.reasons == 0 {
		h.wakeAll()
	}
}

// wakeAll has what stood still go on.
func (h *host) wakeAll() {
	if h.qemu != nil && h.qemu.running() {
		h.qemu.wake(0)
	}
	if h.daemon != nil {
		h.daemon.wake()
	}
}
