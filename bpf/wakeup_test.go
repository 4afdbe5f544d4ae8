// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bpf"
)

// sleeper is a reader of the ring that waits as package ringbuf does.
func (k *kit) sleeper() (woken func(millis int) bool) {
	k.Helper()
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() { unix.Close(ep) })
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, k.LsRing.FD(), &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		k.Fatal(err)
	}
	return func(millis int) bool {
		k.Helper()
		for {
			n, err := unix.EpollWait(ep, make([]unix.EpollEvent, 1), millis)
			if err == nil {
				return n > 0
			}
			if err != unix.EINTR {
				k.Fatal(err)
			}
		}
	}
}

const soon = 2000 // ms, at most: wake-ups come at once

// A reader on P that has read everything is woken by whatever comes next, after
// frames too that found no slot.
func TestWakeupPrimary(t *testing.T) {
	pin(t)
	k := newKit(t)
	k.setMode(hold)
	f := flows["IPv4"]
	for range nslots {
		k.run(k.LsPriOut, input{frame: f.from(seg{flags: ack, payload: []byte("x")})})
	}
	woken := k.sleeper()
	rest := func() {
		t.Helper()
		k.events()
		if woken(0) {
			t.Fatal("woken by nothing")
		}
	}
	rest()
	k.check(k.LsPriOut, f.from(seg{flags: ack, payload: []byte("x")}), drop, "no_slot")
	k.check(k.LsPriOut, f.from(seg{flags: ack}), drop, "held_ack")
	if !woken(soon) {
		t.Error("asleep before a pure ACK")
	}
	rest()
	k.check(k.LsDigestRx, k.fromPeer(randRec(rand.New(rand.NewPCG(1, 1)), data, s2p, 0)), drop, "record_in")
	if !woken(soon) {
		t.Error("asleep before a record")
	}
}

// On S copies let the reader sleep, for a while; questions do not.
func TestWakeupSecondary(t *testing.T) {
	pin(t)
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	woken := k.sleeper()
	send := func() {
		t.Helper()
		k.run(k.LsSecOut, input{frame: f.from(seg{flags: ack, payload: []byte("x")})})
	}
	rest := func() {
		t.Helper()
		for _, e := range k.events() {
			if ev, ok := e.(*bpf.LockstepLsEv); ok {
				k.slot(ev.Slot)
			}
		}
		if woken(0) {
			t.Fatal("woken by nothing")
		}
	}
	rest()
	send()
	if woken(0) {
		t.Error("woken by a copy")
	}
	k.check(k.LsSecIn, k.fromPeer(randRec(rand.New(rand.NewPCG(1, 1)), ask, p2s, 0)), drop, "record_in")
	if !woken(soon) {
		t.Error("asleep before a question")
	}
	rest()
	send()
	k.setMode(park)
	k.check(k.LsSecIn, f.to(seg{flags: ack}), drop, "parked")
	if !woken(soon) {
		t.Error("asleep before a parked frame")
	}
	rest()
	k.setMode(run)
	n := 0
	for send(); !woken(1); send() {
		if n++; n > 200 {
			t.Fatal("asleep for ever")
		}
		rest()
	}
}
