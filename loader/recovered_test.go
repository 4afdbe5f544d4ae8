// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// linkIDs are the links that hold a NIC's programs.
func linkIDs(n *NIC) map[string]link.ID {
	ids := make(map[string]link.ID)
	for _, g := range n.attached {
		ids[g.name] = g.id
	}
	return ids
}

// wantFree fails unless every slot is free.
func wantFree(t testing.TB, n *NIC) {
	t.Helper()
	for i := range len(n.frames.Small) / core.SlotSize {
		if got := slotState(n, compare.Slot(i)); got != bpf.LockstepLsSlotStateLS_SLOT_FREE {
			t.Errorf("slot %d is in state %d", i, got)
		}
	}
	for i := range len(n.frames.Large) / core.LargeSize {
		if got := slotState(n, compare.Slot(i)|compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)); got != bpf.LockstepLsSlotStateLS_SLOT_FREE {
			t.Errorf("GSO slot %d is in state %d", i, got)
		}
	}
}

// TestAdoptPrimary: a daemon dies with frames held and events unread; the next one
// goes on from its tables.
func TestAdoptPrimary(t *testing.T) {
	h := newHosts(t)
	guest, client := newWire(t, "guestP"), newWire(t, "client")
	frame := segment(false, 0, 1000, compare.ACK|compare.PSH, nil, randomBytes(100))
	guest.send(frame)
	if s := event(t, h.p, compare.EvPVM); slotState(h.p, s.Slot) != bpf.LockstepLsSlotStateLS_SLOT_READY {
		t.Fatal("not held")
	}
	now := h.p.Now()
	for port, c := range map[uint16]bpf.LockstepLsCli{
		1: {At: uint64(now), Ack: 77, TcpFlags: uint8(compare.ACK | compare.PSH)},
		2: {At: uint64(now), Ack: 78, TcpFlags: uint8(compare.SYN | compare.ACK)},
		3: {At: uint64(now), Ack: 79, TcpFlags: uint8(compare.RST | compare.ACK)},
		4: {At: uint64(now), TcpFlags: uint8(compare.SYN)},
		5: {At: uint64(now), Ack: 80},
	} {
		tuple := askTuple
		tuple.RemotePort = port
		key := core.ToTuple(tuple)
		check(t, h.p.objs.LsCli.Put(&key, &c))
	}
	if h.p.Recovered() != nil {
		t.Error("new tables count as recovered ones")
	}
	ids, digest := linkIDs(h.p), h.at[h.p].Digest
	h.die(h.p)

	// The programs go on without a daemon.
	guest.send(segment(false, 0, 1100, compare.ACK, nil, randomBytes(50)))
	n := h.open(options(h.pins, "a.lab", Primary))
	a := n.Recovered()
	if a == nil {
		t.Fatal("nothing adopted")
	}
	if a.Term != 7 || a.Epoch != 40 || a.Mode != datapath.ModeHold || a.Digest != digest {
		t.Errorf("adopted term %d, epoch %d, mode %d, the digest keys: %v", a.Term, a.Epoch, a.Mode, a.Digest == digest)
	}
	acks := make(map[uint16]uint32)
	for _, r := range a.Remotes {
		acks[r.RemotePort] = r.Ack
		if r.At != now || r.Guest != askTuple.Guest {
			t.Errorf("remote %+v", r)
		}
	}
	if len(acks) != 2 || acks[1] != 77 || acks[2] != 78 {
		t.Errorf("remotes %v, want those of ports 1 and 2", acks)
	}
	for port, want := range map[uint16]uint32{1: 77, 2: 78, 3: 0, 4: 0, 9: 0} {
		tuple := askTuple
		tuple.RemotePort = port
		if ack, ok := n.Acked(tuple); ok != (want != 0) || ok && ack != want {
			t.Errorf("port %d acknowledged %d, %v; want %d", port, ack, ok, want)
		}
	}
	if n.conf.Mode != uint32(datapath.ModeShut) {
		t.Errorf("mode %d, want shut", n.conf.Mode)
	}
	wantAttached(t, "tapP", "ls_pri_out", "ls_mirror")
	wantAttached(t, "peerP", "ls_digest_rx")
	for name, id := range linkIDs(n) {
		if id != ids[name] {
			t.Errorf("%s has link %d, had %d: a moment without it", name, id, ids[name])
		}
	}
	wantFree(t, n)
	if evs, err := n.Poll(0, nil); err != nil || len(evs) != 0 {
		t.Errorf("events of the dead daemon's time: %+v, %v", evs, err)
	}
	counts(t, n, "held", 2) // they survive

	// It works, with marks of its own.
	check(t, n.SetMode(datapath.ModeHold))
	guest.send(frame)
	s := event(t, n, compare.EvPVM)
	if s.Sum != digest.Sum(1000, randomBytes(100)) {
		t.Error("digested with other keys")
	}
	apply(t, n, release(s))
	if got := client.recv(); !bytes.Equal(got, frame) {
		t.Errorf("released % x, was % x", got, frame)
	}
}

// TestAdoptSecondary: offsets survive, and what is on its way to the SVM counts on.
func TestAdoptSecondary(t *testing.T) {
	h := newHosts(t)
	client, guest := newWire(t, "client"), newWire(t, "guestS")
	client.send(segment(false, 0, 1, compare.ACK, nil, randomBytes(100)))
	guest.recv()
	conn := bpf.LockstepLsConn{Off: 1, TsOff: 2, Inc: 3, Last: uint64(h.s.Now())}
	key, half := core.ToTuple(askTuple), bpf.LockstepLsHalf{IsnPvm: 4}
	check(t, h.s.objs.LsConn.Put(&key, &conn))
	check(t, h.s.objs.LsHalf.Put(&key, &half))
	base := h.s.tapDrain.base
	check(t, h.s.SetMode(datapath.ModePark))
	h.die(h.s)
	n := h.open(options(h.pins, "b.lab", Secondary))
	if a := n.Recovered(); a == nil || a.Mode != datapath.ModePark || a.Term != 7 || a.Epoch != 40 || a.Remotes != nil {
		t.Fatalf("adopted %+v", a)
	}
	offsets := 0
	check(t, n.Offsets(func(k compare.Tuple, o datapath.Offset) {
		if offsets++; k != askTuple || o.Seq != 1 || o.TS != 2 || o.Incarnation != 3 {
			t.Errorf("offset %+v of %v", o, k)
		}
	}))
	if offsets != 1 {
		t.Errorf("%d offsets survived", offsets)
	}
	if err := n.objs.LsHalf.Lookup(&key, &half); err != nil || half.IsnPvm != 4 {
		t.Errorf("half-open connection: %+v, %v", half, err)
	}
	if n.tapDrain.base != base {
		t.Errorf("the tap's count began at %d, now at %d", base, n.tapDrain.base)
	}
	check(t, n.SetMode(datapath.ModeRun))
	client.send(segment(false, 0, 2, compare.ACK, nil, randomBytes(100)))
	guest.recv()
	counts(t, n, "let_in", 2)
	check(t, n.DrainTap(t.Context()))
}

// TestAdoptUnderLoad: frames come all the time; when the new daemon begins, nothing
// of the old one's is left in a slot.
func TestAdoptUnderLoad(t *testing.T) {
	h := newHosts(t)
	guest := newWire(t, "guestP")
	frame := segment(false, 0, 1000, compare.ACK|compare.PSH, nil, randomBytes(1000))
	stop := make(chan struct{})
	var sender sync.WaitGroup
	sender.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				guest.send(frame)
			}
		}
	})
	n, before := h.p, uint64(0)
	for range 5 {
		check(t, n.SetMode(datapath.ModeHold))
		held := before
		for held == before {
			c, err := n.Counters()
			check(t, err)
			held = c["held"]
		}
		before = held
		h.die(n)
		n = h.open(options(h.pins, "a.lab", Primary))
		wantFree(t, n)
	}
	close(stop)
	sender.Wait()
}

func TestAdoptRefuses(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "a", Primary)
	o.Version, o.ConfigHash = "v1.2", [32]byte{1, 2, 3, 4}
	n, err := Open(o)
	check(t, err)
	check(t, n.SetMode(datapath.ModeHold))
	check(t, n.Close())
	untouched := func() {
		t.Helper()
		wantAttached(t, "tapP", "ls_pri_out", "ls_mirror")
		if n, err := pinnedMode(nicDir(pins, o.VM, o.Node, 0)); err != nil || n != datapath.ModeHold {
			t.Errorf("mode %d, %v: a refused daemon changed it", n, err)
		}
	}
	const fix = `run lockstep v1.2 with the config it had; docs/CONFIG.md says under "Changing a setting"`
	for name, c := range map[string]struct {
		change func(*Options)
		want   []string
	}{
		"config": {func(o *Options) { o.ConfigHash[0] = 0xff }, []string{"config 01020304", "config ff020304"}},
		"setting": {func(o *Options) {
			o.ConfigHash[0] = 0xff
			o.Differ = func(pinned [32]byte, alone bool) []string {
				if pinned[0] != 1 || alone {
					t.Errorf("pinned %x, alone: %v", pinned, alone)
				}
				return []string{"heartbeat", "qemu"}
			}
		}, []string{"another heartbeat, another qemu", "this heartbeat, this qemu"}},
		"role":        {func(o *Options) { o.Role = Secondary }, []string{"role primary", "role secondary"}},
		"connections": {func(o *Options) { o.MaxConnections = 65 }, []string{"max_connections 64", "max_connections 65"}},
		"slots":       {func(o *Options) { o.Slots = 9 }, []string{"slots 8", "slots 9"}},
		"GSO slots":   {func(o *Options) { o.GSOSlots = 3; o.Slots = 9 }, []string{"slots 8, gso_slots 2", "slots 9, gso_slots 3"}},
	} {
		other := o
		other.Version = "v1.3"
		c.change(&other)
		want := append(c.want, "pinned by lockstep v1.2", "this is lockstep v1.3", fix)
		_, err := Open(other)
		t.Log(name, err)
		wantError(t, err, want...)
		if name != "role" {
			_, err = CheckUpgrade(other)
			wantError(t, err, want...)
		}
		untouched()
	}

	// What is found does not have to fit.
	found, err := Pinned(o)
	if want := (datapath.Pinned{Role: datapath.RolePrimary, Mode: datapath.ModeHold}); err != nil || found != want {
		t.Errorf("found %+v, %v", found, err)
	}
	other := o
	other.ConfigHash[0], other.Slots, other.MaxConnections = 0xff, 9, 65
	if f, err := Pinned(other); err != nil || f != found {
		t.Errorf("found %+v, %v", f, err)
	}

	// What would fit, whatever the role is called: nothing changes.
	other = o
	other.Version, other.Role = "v1.3", 0
	if v, err := CheckUpgrade(other); err != nil || v != "v1.2" {
		t.Errorf("upgrade from %q, %v", v, err)
	}
	untouched()
	other.Node = "c"
	_, err = CheckUpgrade(other)
	wantError(t, err, "nothing to take over")

	// A map of another shape, and another ABI, whose other fields are not read.
	dir := nicDir(pins, o.VM, o.Node, 0)
	rules := dir.path(bpf.LockstepMapLsRules)
	check(t, os.Remove(rules))
	_, err = Open(o)
	wantError(t, err, "no map ls_rules", "this is lockstep v1.2 with map ls_rules")
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ls_rules", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	check(t, err)
	check(t, m.Pin(rules))
	check(t, m.Close())
	_, err = Open(o)
	wantError(t, err, "another map ls_rules", "ValueSize: 4 changed to 8")
	meta, err := ebpf.LoadPinnedMap(dir.path(bpf.LockstepMapLsMeta), nil)
	check(t, err)
	m1 := metaOf(&o)
	m1.Abi, m1.Slots = 1, 4711
	check(t, meta.Put(uint32(0), &m1))
	check(t, meta.Close())
	_, err = Open(o)
	wantError(t, err, "with ABI 1;", fmt.Sprintf("with ABI %d:", bpf.LockstepLsConstLS_ABI_VERSION))
	untouched()
	check(t, os.Remove(dir.path(bpf.LockstepMapLsMeta)))
	_, err = Open(o)
	wantError(t, err, "did not write down what it is for", "end the guest and run `lockstep unload`")
	untouched()
	check(t, Unload(pins, o.VM, o.Node, false))
}

// TestAdoptOtherSettings: settings that fit the tables are accepted, and noted there for
// the next daemon; which ones fit may depend on whether the guest transmits alone.
func TestAdoptOtherSettings(t *testing.T) {
	devices(t)
	o := options(mountBPFFS(t), "a", Primary)
	o.Differ = func(_ [32]byte, alone bool) []string {
		if alone {
			return nil
		}
		return []string{"heartbeat"}
	}
	n, err := Open(o)
	check(t, err)
	check(t, n.SetMode(datapath.ModeHold))
	check(t, n.Close())
	old := o
	o.ConfigHash[0] = 1
	_, err = Open(o)
	wantError(t, err, "another heartbeat")
	n, err = Open(old)
	check(t, err)
	check(t, n.SetMode(datapath.ModeSolo))
	check(t, n.Close())
	n, err = Open(o)
	check(t, err)
	check(t, n.SetMode(datapath.ModeHold))
	check(t, n.Close())
	_, err = Open(old)
	wantError(t, err, "another heartbeat")
	n, err = Open(o)
	check(t, err)
	check(t, n.Close())
	check(t, Unload(o.PinDir, o.VM, o.Node, false))
}

// TestAdoptOtherDevices: a new peer device gets its program again; a new tap has another
// guest, so its tables are made anew too.
func TestAdoptOtherDevices(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "a", Primary)
	n, err := Open(o)
	check(t, err)
	check(t, n.SetEpoch(5))
	check(t, n.Close())

	check(t, netlink.LinkDel(linkOf(t, "peerP")))
	veth(t, "peerP", "peerS")
	n, err = Open(o)
	check(t, err)
	if a := n.Recovered(); a == nil || a.Epoch != 5 {
		t.Errorf("adopted %+v", a)
	}
	wantAttached(t, "peerP", "ls_digest_rx")
	if intruder, _, err := n.CheckOrder(); intruder != "" || err != nil {
		t.Errorf("order: %s, %v", intruder, err)
	}
	check(t, n.Close())
	n, err = Open(o) // from the new link
	check(t, err)
	if n.Recovered() == nil {
		t.Error("nothing adopted")
	}
	check(t, n.Close())

	// Another tap, while the first one is guarded.
	veth(t, "tapQ", "guestQ")
	other := o
	other.Tap = "tapQ"
	_, err = Open(other)
	wantError(t, err, "tap tapQ", "the pinned programs guard device", "lockstep unload")
	wantAttached(t, "tapQ")
	wantAttached(t, "tapP", "ls_pri_out", "ls_mirror")

	check(t, netlink.LinkDel(linkOf(t, "tapP")))
	veth(t, "tapP", "guestP")
	n, err = Open(o)
	check(t, err)
	if a := n.Recovered(); a != nil {
		t.Errorf("adopted the tables of a guest that is gone: %+v", a)
	}
	wantAttached(t, "tapP", "ls_pri_out", "ls_mirror")
	wantAttached(t, "peerP", "ls_digest_rx")
	check(t, n.Close())
	check(t, Unload(pins, o.VM, o.Node, false))
	wantAttached(t, "peerP")
}

// TestUnloadPromoted: a secondary that took over has the only guest that transmits.
func TestUnloadPromoted(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	o := options(pins, "b", Secondary)
	n, err := Open(o)
	check(t, err)
	check(t, n.SetLeaseUntil(math.MaxInt64))
	check(t, n.SetMode(datapath.ModeSolo))
	check(t, n.Close())
	wantError(t, Unload(pins, o.VM, o.Node, false), "the secondary was promoted", "those connections break", "--force")
	wantAttached(t, "tapS", "ls_sec_out", "ls_sec_gate")
	check(t, Unload(pins, o.VM, o.Node, true))
	wantAttached(t, "tapS")
	if up(t, "tapS") {
		t.Error("the guest was let loose")
	}
}

// TestUnloadMutes: when the programs are gone, nothing of the guest's is seen on the bridge;
// it would be, were the tap not set down before.
func TestUnloadMutes(t *testing.T) {
	for name, x := range map[string]struct {
		unload func(pinDir, vm, node string, force bool) error
		passes bool
	}{"unload": {Unload, false}, "without the rule": {Detach, true}} {
		for _, role := range []Role{Primary, Secondary} {
			t.Run(fmt.Sprintf("%s, %v", name, role), func(t *testing.T) {
				devices(t)
				pins := mountBPFFS(t)
				o, end := options(pins, "a", Primary), "guestP"
				if role == Secondary {
					o, end = options(pins, "b", Secondary), "guestS"
					check(t, netlink.LinkSetMaster(linkOf(t, "tapS"), linkOf(t, "br")))
				}
				veth(t, "other", "elsewhere")
				check(t, netlink.LinkSetMaster(linkOf(t, "other"), linkOf(t, "br")))
				n, err := Open(o)
				check(t, err)
				check(t, n.Close())
				guest, elsewhere, client := newWire(t, end), newWire(t, "elsewhere"), newWire(t, "client")
				sent, last := segment(false, 0, 1, compare.ACK, nil, randomBytes(100)), segment(false, 7, 1, compare.ACK, nil, randomBytes(100))
				check(t, x.unload(pins, o.VM, o.Node, false))
				_, _ = unix.Write(guest.fd, sent) // fails, or does not, on a cable that is cut
				elsewhere.send(last)
				got := client.recv()
				if passes := bytes.Equal(got, sent); passes != x.passes || !passes && !bytes.Equal(got, last) {
					t.Errorf("received % x; the guest sent % x", got, sent)
				}
			})
		}
	}
}

// TestLetGo: a guest that may transmit without the programs keeps its tap up.
func TestLetGo(t *testing.T) {
	devices(t)
	pins := mountBPFFS(t)
	for _, o := range []Options{options(pins, "a", Primary), options(pins, "b", Secondary)} {
		n, err := Open(o)
		check(t, err)
		check(t, n.SetMode(datapath.ModeSolo))
		check(t, n.Close())
		check(t, Detach(pins, o.VM, o.Node, true))
		wantAttached(t, o.Tap)
		if !up(t, o.Tap) {
			t.Errorf("%s was set down", o.Tap)
		}
	}
}

// TestUnloadElsewhere: whose tap is not to be found is not let loose, with force neither.
func TestUnloadElsewhere(t *testing.T) {
	devices(t)
	home, err := netns.Get()
	check(t, err)
	defer home.Close()
	pins := mountBPFFS(t)
	for _, o := range []Options{options(pins, "a", Primary), options(pins, "b", Secondary)} {
		n, err := Open(o)
		check(t, err)
		check(t, n.Close())
		elsewhere, err := netns.New()
		check(t, err)
		wantError(t, Unload(pins, o.VM, o.Node, true), "not in this network namespace")
		check(t, elsewhere.Close())
		check(t, netns.Set(home))
		if names := entries(t, nodeDir(pins, o.VM, o.Node)); len(names) == 0 {
			t.Error("the pins are gone")
		}
		check(t, Unload(pins, o.VM, o.Node, true))
	}
}
