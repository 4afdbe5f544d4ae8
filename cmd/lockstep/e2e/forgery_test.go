// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Where things stand in peer frames (struct ls_pre and ls_rec of abi.h).
const (
	ethRecord = 0x88b5
	preOff    = 16 // u16: where the record stands
	recTag    = 8  // bytes of the tag, which the rest follows
	recType   = 9
	recLen    = 12 // u16: bytes of the record
	recBase   = 160
)

// record is the authenticated part of a peer frame; nil: it is no peer frame.
func record(frame []byte) []byte {
	if len(frame) < preOff+2 || binary.BigEndian.Uint16(frame[12:]) != ethRecord {
		return nil
	}
	off := int(binary.LittleEndian.Uint16(frame[preOff:]))
	if len(frame) < off+recBase {
		return nil
	}
	n := int(binary.LittleEndian.Uint16(frame[off+recLen:]))
	return frame[off : off+n]
}

// samples are authentic peer frames, one of each type.
func samples(w *lt.Wire) map[uint8][]byte {
	out := make(map[uint8][]byte)
	for _, f := range w.Frames(func(f []byte) bool { return record(f) != nil }) {
		typ := record(f)[recType]
		if old := out[typ]; old == nil || len(record(f)) > len(record(old)) {
			out[typ] = f
		}
	}
	return out
}

// refusals are the reasons for dropping peer frames.
var refusals = []string{"peer_junk", "peer_short", "peer_version", "peer_type", "peer_tag", "peer_term", "peer_epoch", "peer_replay"}

func refused(s *api.Status) (n uint64) {
	for _, reason := range refusals {
		n += s.Counters[reason]
	}
	return n
}

// forgeries are wrong in one way each.
func forgeries(frame []byte) (out [][]byte) {
	f := func(change func(frame []byte) []byte) { out = append(out, change(slices.Clone(frame))) }
	for i := range record(frame) { // the tag, and every byte of every field
		f(func(b []byte) []byte {
			record(b)[i] ^= 1 << (i % 8)
			return b
		})
	}
	off := len(frame) - len(record(frame))
	for _, n := range []int{preOff, preOff + 1, preOff + 2, off, off + 1, off + recTag, off + recLen + 1, off + recBase/2, len(frame) - 1} {
		f(func(b []byte) []byte { return b[:n] })
	}
	for _, at := range []uint16{0, 1, 17, uint16(off - 1), uint16(off + 1), 281, 0xffff} {
		f(func(b []byte) []byte {
			return append(b[:preOff], append(binary.LittleEndian.AppendUint16(nil, at), b[preOff+2:]...)...)
		})
	}
	f(func(b []byte) []byte { b[preOff-2] ^= 1; return b })      // magic
	f(func(b []byte) []byte { return b })                        // played again
	f(func(b []byte) []byte { return append(b, "more"...) })     // and with something behind it
	f(func(b []byte) []byte { clear(record(b)); return b })      // nothing
	f(func(b []byte) []byte { clear(b[off : off+8]); return b }) // no tag
	return out
}

// TestForgery: whoever reaches the peer link, and whatever the guests send, makes
// nothing leave, stops no daemon, and costs no connection a checkpoint.
func TestForgery(t *testing.T) {
	q := qemuPair(t)
	p := newPair(t, lt.Impaired, q.Primary.Path(), q.Secondary.Path(), "compare: {timeout: 60s}\ncheckpoint: {period: 1h}")
	p.await("alpha", ready)
	toP, toS := lt.OpenWire(t, p.Mid, lt.MidP), lt.OpenWire(t, p.Mid, lt.MidS)
	pvm, svm, seen := lt.OpenWire(t, p.PVM, "eth0"), lt.OpenWire(t, p.SVM, "eth0"), lt.OpenWire(t, p.Client, "eth0")

	// What is sent to S comes by at toP, and the other way round.
	p.serveUDP(p.PVM, "udp", portUDP, nil, echoUDP)
	p.serveUDP(p.SVM, "udp", portUDP, nil, echoUDP)
	p.ask(p.dialUDP(lt.Guest4, portUDP, nil), []byte("a datagram"), []byte("a datagram"))
	p.source(lt.Guest4, 1_000_000)
	p.cuts(lt.Guest6) // sums are asked for
	p.Impair.Drop(t, lt.S2P, lt.Filter{Types: []uint8{1}}, 1)
	p.keepAlive(lt.Guest6, 100) // and a record that was lost
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets == 0 })
	ofS, ofP := samples(toS), samples(toP)
	for who, x := range map[string]struct {
		got   map[uint8][]byte
		types []uint8
	}{"S": {ofS, []uint8{1, 4, 5, recEcho}}, "P": {ofP, []uint8{2, 3, 7, recEcho}}} {
		for _, typ := range x.types {
			if x.got[typ] == nil {
				t.Errorf("no frame of type %d was seen from %s", typ, who)
			}
		}
	}

	// Something waits to be let out.
	pvm.Send(t, eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 1, 0, udpBody(false, 1, 2, []byte("nobody confirms this")))))
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets > 0 })
	seen.Forget()

	forge := func(what string, forged map[string][][]byte) {
		t.Helper()
		for node, w := range map[string]*lt.Wire{"alpha": toP, "beta": toS} {
			before := p.status(node)
			for _, f := range forged[node] {
				w.Send(t, f)
			}
			want := uint64(len(forged[node]))
			// More may be: S repeats its newest records while something is held (R6).
			s := p.await(node, func(s *api.Status) bool { return refused(s)-refused(before) >= want })
			by := ""
			for _, reason := range refusals {
				if n := s.Counters[reason] - before.Counters[reason]; n > 0 {
					by += fmt.Sprintf(" %d %s", n, reason)
				}
			}
			t.Logf("%s to %s: refused%s", what, node, by)
		}
	}
	forged := make(map[string][][]byte)
	again := make(map[string][][]byte)
	for _, f := range ofS {
		forged["alpha"] = append(forged["alpha"], forgeries(f)...)
		forged["beta"] = append(forged["beta"], f) // sent back
		again["alpha"] = append(again["alpha"], f)
	}
	for _, f := range ofP {
		forged["beta"] = append(forged["beta"], forgeries(f)...)
		forged["alpha"] = append(forged["alpha"], f)
		again["beta"] = append(again["beta"], f)
	}
	for _, ethertype := range []uint16{0, 1, 0x88b6, unix.ETH_P_IP, unix.ETH_P_IPV6, unix.ETH_P_ARP, 0xffff} {
		forged["alpha"] = append(forged["alpha"], eth(ethertype, bytes.Repeat([]byte("junk"), 30)))
	}
	taken := map[string]uint64{"alpha": p.status("alpha").Counters["record_in"], "beta": p.status("beta").Counters["record_in"]}
	forge("forgeries", forged)
	for node, n := range taken {
		if now := p.status(node).Counters["record_in"]; now != n {
			t.Errorf("%s took %d records while nothing was sent", node, now-n)
		}
	}

	t.Log("malformed frames of the guests")
	before := map[string]*api.Status{"alpha": p.status("alpha"), "beta": p.status("beta")}
	for who, w := range map[string]*lt.Wire{"pvm": pvm, "svm": svm} {
		for _, f := range mutants(who, 1500) {
			w.Send(t, f)
		}
	}
	for node, s := range before {
		p.await(node, func(now *api.Status) bool { return now.Counters["malformed"] > s.Counters["malformed"] })
	}
	for _, f := range seen.Frames(func(f []byte) bool { return !linkOnly(f) }) {
		t.Fatalf("a frame came to the client:\n%x\n%+v", f, p.status("alpha").Causes)
	}
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
	p.keepAlive(lt.Guest4, 100) // whatever followed the first of them has come, too
	if n := seen.Count("mutant "); n != 0 {
		t.Errorf("%d of them came to the client", n)
	}

	// A checkpoint, and everything authentic is of another epoch.
	c := p.mustDial(lt.Guest4, portDiffer)
	fmt.Fprintln(c, "who are you?")
	p.await("alpha", func(s *api.Status) bool { return s.CheckpointsDone == 1 && s.State == "replicating" })
	p.await("beta", func(s *api.Status) bool { return s.State == "replicating" })
	p.expectText(c, "answer of guest pvm\n")
	forge("frames of an old epoch", again)

	// And of another term.
	p.kill("beta")
	p.await("alpha", func(s *api.Status) bool { return !s.Peer.Connected })
	p.daemon("beta", p.HostS, "secondary")
	p.await("alpha", func(s *api.Status) bool { return ready(s) && s.Peer.Connected })
	p.await("beta", func(s *api.Status) bool { return s.State == "replicating" })
	forge("frames of an old term", again)

	// All of it left no trace.
	for _, node := range []string{"alpha", "beta"} {
		if log := p.log(node); strings.Contains(log, "level=ERROR") || strings.Contains(log, "panic") {
			t.Errorf("%s logged errors:\n%s", node, log)
		}
	}
	requested := p.status("alpha").CheckpointsRequested
	p.source(lt.Guest4, 5_000_000)
	p.sink(lt.Guest6, 5_000_000)
	p.keepAlive(lt.Guest6, 100)
	if s := p.status("alpha"); s.CheckpointsRequested != requested {
		t.Errorf("%d checkpoints requested afterwards: %+v", s.CheckpointsRequested-requested, s.Causes)
	}
}

// mutants are n frames of a guest's that were valid before some bytes of them
// changed. No two guests send the same ones.
func mutants(who string, n int) (out [][]byte) {
	r := rand.New(rand.NewPCG(uint64(len(who)), uint64(who[0])))
	for i := range n {
		text := fmt.Appendf(nil, "mutant %d of the %s", i, who)
		// Of connections of their own: different bytes of the same one would diverge.
		tcp := append([]byte{who[0], byte(i), 0x30, 0x3a, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 0x18, 1, 0, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}, text...)
		valid := [][]byte{
			eth(unix.ETH_P_IP, ip4(unix.IPPROTO_TCP, 1, 0, tcp)),
			eth(unix.ETH_P_IPV6, ip6(unix.IPPROTO_TCP, tcp)),
			eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 1, 0, udpBody(false, 7400, 7401, text))),
			eth(unix.ETH_P_IPV6, ip6(unix.IPPROTO_UDP, udpBody(true, 7400, 7401, text))),
			eth(unix.ETH_P_IP, ip4(unix.IPPROTO_ICMP, 1, 0, append([]byte{0, 0, 0, 0, 1, 2, 0, 1}, text...))),
			eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 1, 0x2000, udpBody(false, 7400, 7401, text))),
			eth(unix.ETH_P_IPV6, fragment6(unix.IPPROTO_UDP, 1, 0, true, udpBody(true, 7400, 7401, text))),
			eth(unix.ETH_P_IPV6, ip6(unix.IPPROTO_HOPOPTS, append([]byte{unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}, tcp...))),
			tagged(eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 1, 0, udpBody(false, 7400, 7401, text))), qinq700, vlan42),
		}
		f := valid[i%len(valid)]
		for range 1 + r.IntN(4) {
			at := 12 + r.IntN(60)%(len(f)-12)
			if flags := bytes.Index(f, tcp) + 13; flags >= 13 && at == flags {
				continue // SYNs would be connections that one guest alone opens
			}
			f[at] = byte(r.Uint32())
		}
		if r.IntN(4) == 0 {
			f = f[:14+r.IntN(len(f)-14)]
		}
		out = append(out, f)
	}
	return out
}

// linkOnly reports whether a frame is of those that leave from the PVM uncompared
// (R20 alone applies).
func linkOnly(f []byte) bool {
	for len(f) >= 18 && (f[12] == 0x81 && f[13] == 0 || f[12] == 0x88 && f[13] == 0xa8) {
		f = slices.Delete(slices.Clone(f), 12, 16)
	}
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP, 0x8035, 0x88cc:
		return true
	case unix.ETH_P_IP:
		return len(f) > 23 && f[23] == unix.IPPROTO_IGMP
	case unix.ETH_P_IPV6:
		return len(f) > 54 && (f[20] == unix.IPPROTO_ICMPV6 || f[54] == unix.IPPROTO_ICMPV6)
	}
	return false
}
