// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/bpf"
)

const (
	xdpDrop = 1
	xdpPass = 2
)

// xdp gives the frame to ls_peer_xdp, which leaves it as it is.
func (k *kit) xdp(frame []byte, pass bool) {
	k.Helper()
	want, reason := uint32(xdpDrop), "xdp_dropped"
	if pass {
		want, reason = xdpPass, "xdp_passed"
	}
	k.expect(counts{reason: 1}, func() {
		k.Helper()
		out := make([]byte, 4096)
		opts := &ebpf.RunOptions{Data: frame, DataOut: out}
		got, err := k.LsPeerXdp.Run(opts)
		if err != nil {
			k.Fatal(err)
		}
		if got != want || !bytes.Equal(opts.DataOut, frame) {
			k.Errorf("verdict %d, want %d, frame\n% x, was\n% x", got, want, opts.DataOut, frame)
		}
	})
}

// XDP lets past what ls_digest_rx could take, stream numbers apart, and nothing else.
func TestPeerXDP(t *testing.T) {
	k := newKit(t)
	r := rand.New(rand.NewPCG(41, 42))
	k.setMode(hold)
	for _, typ := range []uint8{data, answer, dgram, neigh, echo} {
		for _, nsum := range []int{0, 1, boundMax} {
			rec := randRec(r, typ, s2p, nsum)
			frame := k.fromPeer(rec)
			k.xdp(frame, true)
			k.xdp(frame, true) // numbers are judged behind it
			k.xdp(append(frame, 1, 2, 3), true)
			for range 200 {
				b := bytes.Clone(frame)
				at := 12 + r.IntN(len(b)-12)
				if at >= 18 && at < 54 {
					continue // between the front and the record nothing means anything
				}
				b[at] ^= 1 << r.IntN(8)
				k.xdp(b, false)
			}
			for _, n := range []int{14, 15, 17, 18, 53, 54, 54 + recBase - 1, len(frame) - 1} {
				k.xdp(frame[:n], false)
			}
			refuse := func(change func(rec *bpf.LockstepLsRec)) {
				t.Helper()
				other := *rec
				change(&other)
				k.xdp(k.fromPeer(&other), false)
			}
			refuse(func(rec *bpf.LockstepLsRec) { rec.KeyGen++ })
			refuse(func(rec *bpf.LockstepLsRec) { rec.KeyGen-- })
			refuse(func(rec *bpf.LockstepLsRec) { rec.Dir = p2s })
			refuse(func(rec *bpf.LockstepLsRec) { rec.Type = ask })
			refuse(func(rec *bpf.LockstepLsRec) { rec.Version-- })
			if typ != echo {
				refuse(func(rec *bpf.LockstepLsRec) { rec.Epoch += 2 })
			}
			k.xdp(peerFrame(make([]byte, 54), 54, sign(rec, k.sipTx), ownMAC, peerMAC), false)
		}
	}
	for _, off := range []int{18, recOffMax} {
		k.xdp(peerFrame(make([]byte, off), off, sign(randRec(r, data, s2p, 1), k.sipRx), ownMAC, peerMAC), true)
	}
	for _, off := range []int{17, recOffMax + 1} {
		k.xdp(peerFrame(make([]byte, off), off, sign(randRec(r, data, s2p, 1), k.sipRx), ownMAC, peerMAC), false)
	}
	for _, s := range samples(false) {
		k.xdp(s.frame, false)
	}
	k.none()
}

// Attached natively, in front of ls_digest_rx.
func TestLivePeerXDP(t *testing.T) {
	l := newLab(t)
	k := l.kit()
	k.setMode(hold)
	xdp, err := link.AttachXDP(link.XDPOptions{Program: k.LsPeerXdp, Interface: l.peerLink.Attrs().Index, Flags: link.XDPDriverMode})
	l.must(err)
	defer xdp.Close()
	l.attach(k.LsDigestRx, l.peerLink, ebpf.AttachTCXIngress)
	r := rand.New(rand.NewPCG(43, 44))
	for _, nsum := range []int{0, boundMax} {
		rec := randRec(r, data, s2p, nsum)
		frame := k.fromPeer(rec)
		k.expect(counts{"xdp_passed": 1, "record_in": 1}, func() { l.write(l.far, vnet{}, frame) })
		one[*bpf.LockstepLsEvRec](k)
		k.expect(counts{"xdp_passed": 1, "peer_replay": 1}, func() { l.write(l.far, vnet{}, frame) })
		frame[60] ^= 1
		k.expect(counts{"xdp_dropped": 1}, func() { l.write(l.far, vnet{}, frame) })
	}
	k.expect(counts{"xdp_dropped": 1}, func() { l.write(l.far, vnet{}, flows["IPv4"].to(seg{flags: ack})) })
	k.none()
}
