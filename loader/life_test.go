// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/datapath"
	"github.com/lockstep-ft/lockstep/loader/core"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Pins on a bpffs that init does not see vanish with the process.
func TestCheckBPFFSPrivate(t *testing.T) {
	lt.NeedRoot(t)
	runtime.LockOSThread() // for ever: the thread takes its mount namespace along
	check(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	wantError(t, CheckBPFFS(mountBPFFS(t)), "private", "nsenter --net=")
}

func TestWake(t *testing.T) {
	h := newHosts(t)
	start := time.Now()
	h.p.Wake() // before the wait: the next one ends early
	if evs, err := h.p.Poll(time.Minute, nil); err != nil || len(evs) != 0 {
		t.Errorf("events %v, %v", evs, err)
	}
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		h.p.Wake()
	}()
	if evs, err := h.p.Poll(time.Minute, nil); err != nil || len(evs) != 0 {
		t.Errorf("events %v, %v", evs, err)
	}
	<-woken
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("woken after %v", took)
	}
	// An event that is there is not lost to a wake.
	newWire(t, "guestP").send(segment(false, 0, 1, compare.ACK, nil, nil))
	counts(t, h.p, "held_ack", 1)
	h.p.Wake()
	var got int
	for range 2 {
		evs, err := h.p.Poll(10*time.Millisecond, nil)
		check(t, err)
		got += len(evs)
	}
	if got != 1 {
		t.Errorf("%d events, want the ACK", got)
	}
}

func TestDrainTap(t *testing.T) {
	h := newHosts(t)
	client, guestS := newWire(t, "client"), newWire(t, "guestS")
	frame := segment(false, 0, 1, compare.ACK, nil, randomBytes(100))
	client.send(frame)
	guestS.recv()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	check(t, h.s.DrainTap(ctx))
	// A frame that the tap has not counted: the wait ends with its context.
	h.s.tapDrain.base++
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if err := h.s.DrainTap(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("drained: %v", err)
	}
	// It is never read: then it goes, once.
	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	check(t, h.s.DrainTap(ctx))
	check(t, h.s.DrainTap(t.Context()))
	if c, err := h.s.Counters(); err != nil || c["tap_unread"] != 1 {
		t.Errorf("%d frames unread, %v", c["tap_unread"], err)
	}
}

// What a tap's reader does not take goes with emptyQueue, and what comes later is read.
func TestEmptyQueue(t *testing.T) {
	lt.NewNetns(t)
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP, Queues: 1, NonPersist: true}
	check(t, netlink.LinkAdd(tap))
	defer tap.Fds[0].Close()
	check(t, netlink.LinkSetUp(tap))
	out := newWire(t, "tap0")
	for range 10 {
		out.send(segment(false, 0, 1, compare.ACK, nil, randomBytes(100)))
	}
	check(t, emptyQueue(tap.Attrs().Index))
	last := segment(false, 7, 1, compare.ACK, nil, randomBytes(100))
	out.send(last)
	b := make([]byte, 1<<16)
	n, err := tap.Fds[0].Read(b)
	check(t, err)
	if !bytes.HasSuffix(b[:n], last) {
		t.Errorf("read\n%x\nwant\n%x", b[:n], last)
	}
}

func TestConnections(t *testing.T) {
	h := newHosts(t)
	const second = int64(time.Second)
	now := h.s.Now()
	fins := uint32(bpf.LockstepLsConnBitLS_CONN_GFIN | bpf.LockstepLsConnBitLS_CONN_RFIN)
	put := func() {
		t.Helper()
		for i, c := range []bpf.LockstepLsConn{
			{Off: 1, TsOff: 2, Inc: 3, Last: uint64(now - 5*second)},
			{State: fins, Last: uint64(now - 5*second)},
			{State: uint32(bpf.LockstepLsConnBitLS_CONN_RST), Last: uint64(now)},
			{State: uint32(bpf.LockstepLsConnBitLS_CONN_GFIN), Last: uint64(now - 100*second)},
		} {
			k := askTuple
			k.RemotePort = uint16(i)
			key := core.ToTuple(k)
			check(t, h.s.objs.LsConn.Put(&key, &c))
		}
	}
	offsets := func() map[uint16]datapath.Offset {
		m := make(map[uint16]datapath.Offset)
		check(t, h.s.Offsets(func(k compare.Tuple, o datapath.Offset) {
			if k.Guest != askTuple.Guest || k.VLAN != askTuple.VLAN || k.Proto != core.ProtoTCP {
				t.Errorf("tuple %+v", k)
			}
			m[k.RemotePort] = o
		}))
		return m
	}
	put()
	got := offsets()
	if want := (datapath.Offset{Seq: 1, TS: 2, Incarnation: 3, Last: now - 5*second, State: "open"}); got[0] != want {
		t.Errorf("offset %+v, want %+v", got[0], want)
	}
	if got[1].State != "closing" || got[2].State != "reset" || got[3].State != "closing" {
		t.Errorf("states %v", got)
	}
	// Closed for longer than linger, or idle: gone. One FIN alone is not closed.
	if n, err := h.s.Sweep(4*time.Second, 60*time.Second); err != nil || n != 2 {
		t.Errorf("swept %d, %v", n, err)
	}
	got = offsets()
	if _, ok := got[0]; !ok || len(got) != 2 {
		t.Errorf("left %v, want 0 and 2", got)
	}
	put()
	key, half := core.ToTuple(askTuple), bpf.LockstepLsHalf{}
	check(t, h.s.objs.LsHalf.Put(&key, &half))
	check(t, h.s.ResetOffsets())
	if got := offsets(); len(got) != 0 {
		t.Errorf("left after reset: %v", got)
	}
	if err := h.s.objs.LsHalf.Lookup(&key, &half); err == nil {
		t.Error("a half-open connection is left after reset")
	}
}

// A tap whose reader takes no large frames: they are cut up behind the gate, and still
// the SVM counts as having read everything when it has, and not before (R13).
func TestDrainTapSegments(t *testing.T) {
	for _, c := range []struct {
		name     string
		offloads int
		frames   int // that the tap's reader gets of one of 20000 bytes
	}{
		{"no offloads", 0, 15},
		{"checksums alone", unix.TUN_F_CSUM, 15},
		{"TSO4", unix.TUN_F_CSUM | unix.TUN_F_TSO4, 1},
		{"TSO6 alone", unix.TUN_F_CSUM | unix.TUN_F_TSO6, 15},
	} {
		t.Run(c.name, func(t *testing.T) {
			devices(t)
			check(t, netlink.LinkDel(linkOf(t, "tapS")))
			tap := newTap(t, "tapS", c.offloads)
			h := openHosts(t)
			for _, tci := range []uint16{0, 5} {
				read := func(n int) {
					t.Helper()
					for range n {
						tap.read(t)
					}
				}
				drained := func() bool {
					t.Helper()
					ctx, cancel := context.WithCancel(t.Context())
					cancel()
					err := h.s.DrainTap(ctx)
					if err != nil && !errors.Is(err, context.Canceled) {
						t.Fatal(err)
					}
					return err == nil
				}
				sendGSO(t, "client", tci, randomBytes(20000))
				for i := range c.frames {
					counts(t, h.s, "let_in", uint64(c.frames)*uint64(1+tci/5)) // it is there
					if drained() {
						t.Fatalf("tag %d: drained after %d of %d frames", tci, i, c.frames)
					}
					read(1)
				}
				if !drained() {
					t.Errorf("tag %d: not drained after all %d frames", tci, c.frames)
				}
			}
			if c, err := h.s.Counters(); err != nil || c["tap_unread"] != 0 {
				t.Errorf("%d frames were dropped, %v", c["tap_unread"], err)
			}
			// Counts that cannot be right: whatever waits goes, and they are right again.
			sendGSO(t, "client", 0, randomBytes(20000))
			counts(t, h.s, "let_in", uint64(3*c.frames))
			h.s.tapDrain.base -= 1000
			check(t, h.s.DrainTap(t.Context()))
			if n, err := unix.Read(tap.fd, make([]byte, 1<<17)); err != unix.EAGAIN {
				t.Errorf("%d bytes were left in the tap (%v)", n, err)
			}
			check(t, h.s.DrainTap(t.Context()))
			if h.s.tapDrain.base == 0 {
				t.Error("the base was not mended")
			}
		})
	}
}

// userTap is a tap with a reader.
type userTap struct{ fd int }

func newTap(t testing.TB, name string, offloads int) userTap {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	ifr, err := unix.NewIfreq(name)
	check(t, err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	check(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
	check(t, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads))
	check(t, netlink.LinkSetUp(linkOf(t, name)))
	return userTap{fd}
}

// read takes a frame, its virtio-net header in front, which must come.
func (u userTap) read(t testing.TB) []byte {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(patience/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if check(t, err); n == 0 {
			t.Fatal("no frame came to the tap")
		}
		break
	}
	b := make([]byte, 1<<17)
	n, err := unix.Read(u.fd, b)
	check(t, err)
	return b[:n]
}
