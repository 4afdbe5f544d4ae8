// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
)

// router is who tells the guest of an error.
var router = map[bool]netip.Addr{true: netip.MustParseAddr("203.0.113.1"), false: netip.MustParseAddr("2001:db8:ff::1")}

// tooBig are type and code of "fragmentation needed" and "packet too big".
func tooBig(v4 bool) (typ, code byte) {
	if v4 {
		return 3, 4
	}
	return 2, 0
}

// icmp is an ICMP error of f that quotes n bytes from the TCP header of the frame quoted
// on. The guest sends it to the remote, or a router to the guest.
func (f flow) icmp(fromGuest bool, typ, code byte, quoted []byte, n int) []byte {
	v4 := f.guest.Addr().Is4()
	src, dst := router[v4], f.guest.Addr()
	if fromGuest {
		src, dst = f.guest.Addr(), f.remote.Addr()
	}
	l4 := 54
	if v4 {
		l4 = 34
	}
	msg := append([]byte{typ, code, 0, 0, 0, 0, 5, 0xdc}, quoted[14:min(l4+n, len(quoted))]...)
	frame := append([]byte{2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2}, map[bool][]byte{true: {8, 0}, false: {0x86, 0xdd}}[v4]...)
	if v4 {
		be.PutUint16(msg[2:], ^onesSum(0, msg))
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, 1
		be.PutUint16(ip[2:], uint16(len(ip)+len(msg)))
		copy(ip[12:], src.AsSlice())
		copy(ip[16:], dst.AsSlice())
		be.PutUint16(ip[10:], ^onesSum(0, ip))
		frame = append(frame, ip...)
	} else {
		be.PutUint16(msg[2:], ^onesSum(58+uint32(len(msg)), append(append(src.AsSlice(), dst.AsSlice()...), msg...)))
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, 58, 64
		be.PutUint16(ip[4:], uint16(len(msg)))
		copy(ip[8:], src.AsSlice())
		copy(ip[24:], dst.AsSlice())
		frame = append(frame, ip...)
	}
	return append(frame, msg...)
}

// inner puts a VLAN tag into the bytes of a frame.
func inner(frame []byte, vlan uint16) []byte {
	if vlan == 0 {
		return frame
	}
	b := append(bytes.Clone(frame[:12]), 0x81, 0)
	return append(be.AppendUint16(b, vlan), frame[12:]...)
}

// quotedLengths are what routers quote of a segment with timestamps and SACK blocks: the
// eight bytes of RFC 792, something in between, the header, all of it.
var quotedLengths = []int{8, 11, 12, 14, 16, 18, 20, 22, 32, 44, 52, 60, 1000}

// quoted are the numbers of a segment that is quoted, as one side knows it.
func quoted(seq, ack, val, ecr, sack uint32) seg {
	opts := append(timestamps(val, ecr), 1, 1, 5, 10)
	return seg{seq: seq, ack: ack, flags: 16, win: 9, opts: be.AppendUint32(be.AppendUint32(opts, sack), sack+7), payload: []byte("what was said")}
}

// TestQuote: the numbers of the guest that an ICMP error quotes become those that its
// receiver knows, of both directions, whatever is quoted of a segment; both checksums
// stay right.
func TestQuote(t *testing.T) {
	k := newKit(t)
	const seq, ts, rseq, rts = 5, 6, isnCli + 7, tsCli + 8 // behind the ISNs; the remote's own
	for family, plain := range flows {
		for _, vlan := range []uint16{0, 5} {
			f := plain
			f.vlan = vlan
			k.TB = t
			k.setMode(run)
			k.conf.Edges = 0
			k.setConf()
			if err := k.LsConn.Put(f.tuple(), &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, IsnSvm: isnSVM}); err != nil {
				t.Fatal(err)
			}
			for _, n := range quotedLengths {
				t.Run(fmt.Sprintf("%s vlan %d quoting %d", family, vlan, n), func(t *testing.T) {
					k.TB = t
					v4 := f.guest.Addr().Is4()
					typ, code := tooBig(v4)
					in := func(seq, ts uint32) []byte {
						return inner(f.icmp(false, typ, code, f.from(quoted(seq, rseq, ts, rts, rseq+50)), n), vlan)
					}
					out := func(ack, ecr uint32) []byte {
						return inner(f.icmp(true, map[bool]byte{true: 3, false: 1}[v4], 3, f.to(quoted(rseq, ack, rts, ecr, ack+50)), n), vlan)
					}
					pvmIn, svmIn := in(isnPVM+seq, tsPVM+ts), in(isnSVM+seq, tsSVM+ts)
					k.expect(counts{"delivered": 1}, func() {
						v, got, mark := k.run(k.LsSecIn, input{frame: pvmIn})
						if v != redirect || mark != markIn || !sameQuote(got, svmIn, n) {
							t.Errorf("verdict %d, frame\n% x, want\n% x", int32(v), got, svmIn)
						}
					})
					if n <= 8 || n >= 12 { // a part of a number cannot be translated
						pvmOut, svmOut := out(isnPVM+seq, tsPVM+ts), out(isnSVM+seq, tsSVM+ts)
						if k.dgramSum(hold, pvmOut) != k.dgramSum(run, svmOut) {
							t.Error("both guests' errors have different sums")
						}
						// The PVM's leaves as it was.
						k.setMode(solo)
						k.expect(counts{"passed": 1}, func() {
							if v, got, _ := k.run(k.LsSecOut, input{frame: svmOut}); v != next || !sameQuote(got, pvmOut, n) {
								t.Errorf("alone: verdict %d, frame\n% x, want\n% x", int32(v), got, pvmOut)
							}
						})
					}
					k.setMode(solo)
					k.expect(counts{"passed": 1}, func() {
						if v, got, _ := k.run(k.LsSecGate, input{frame: pvmIn}); v != next || !sameQuote(got, svmIn, n) {
							t.Errorf("alone: verdict %d, frame\n% x, want\n% x", int32(v), got, svmIn)
						}
					})
					k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS})
					remote := in(isnPVM-edge+seq, tsPVM-edgeTS+ts)
					k.expect(counts{"passed": 2}, func() {
						if v, got, _ := k.run(k.LsSecGate, input{frame: remote}); v != next || !sameQuote(got, svmIn, n) {
							t.Errorf("alone, twice taken over: verdict %d, frame\n% x, want\n% x", int32(v), got, svmIn)
						}
						if v, got, _ := k.run(k.LsMirror, input{frame: remote}); v != next || !sameQuote(got, pvmIn, n) {
							t.Errorf("P's edge: verdict %d, frame\n% x, want\n% x", int32(v), got, pvmIn)
						}
					})
					k.conf.Edges = 0
					k.setMode(run)
				})
			}
		}
	}
	k.TB = t
	k.none()
}

// sameQuote compares two errors that quote n bytes. A quoted checksum answers for all of its
// segment, so what is not quoted may have changed it too; ICMP's own is right always.
func sameQuote(got, want []byte, n int) bool {
	if n >= 52 || len(got) != len(want) {
		return bytes.Equal(got, want)
	}
	got, want = bytes.Clone(got), bytes.Clone(want)
	l3 := 14
	if want[12] == 0x81 {
		l3 = 18
	}
	icmp, ip := l3+20, 20
	sum := onesSum(0, got[icmp:])
	if want[l3]>>4 == 6 {
		icmp, ip = l3+40, 40
		sum = onesSum(58+uint32(len(got)-icmp), append(bytes.Clone(got[l3+8:icmp]), got[icmp:]...))
	}
	for _, b := range [][]byte{got, want} {
		clear(b[icmp+2 : icmp+4])
		if at := icmp + 8 + ip + 16; at < len(b) {
			clear(b[at:min(at+2, len(b))])
		}
	}
	return sum == 0xffff && bytes.Equal(got, want)
}

// dgramSum is the sum that a program tells of a datagram.
func (k *kit) dgramSum(mode bpf.LockstepLsMode, frame []byte) [2]uint64 {
	k.Helper()
	k.setMode(mode)
	if mode == hold {
		k.check(k.LsPriOut, frame, drop, "held")
		ev := one[*bpf.LockstepLsEv](k)
		if got := k.slot(ev.Slot); !bytes.Equal(got, frame) {
			k.Errorf("held\n% x, was\n% x", got, frame)
		}
		return ev.Sum
	}
	var sum [2]uint64
	k.expect(counts{"record_out": 1}, func() {
		_, out, _ := k.run(k.LsSecOut, input{frame: frame})
		at := int(out[16]) | int(out[17])<<8
		rec := (*bpf.LockstepLsRec)(unsafe.Pointer(&append(bytes.Clone(out[at:]), make([]byte, 512)...)[0]))
		sum = rec.Sum
		k.streams[rec.Stream] = rec.StreamNo
	})
	return sum
}

// TestQuoteRule: what leaves uncompared has the numbers that the remote knows, too.
func TestQuoteRule(t *testing.T) {
	k := newKit(t, variable("ls_nrules", 1))
	if err := k.LsRules.Put(uint32(0), &bpf.LockstepLsRule{Proto: 1}); err != nil {
		t.Fatal(err)
	}
	f := flows["IPv4"]
	k.putEdge(f, bpf.LockstepLsConn{Off: edge, TsOff: edgeTS})
	k.setMode(hold)
	out := func(ack, ecr uint32) []byte { return f.icmp(true, 3, 3, f.to(quoted(5, ack, 6, ecr, ack+50)), 1000) }
	ack, ecr := uint32(1000), uint32(2000)
	k.turned(k.LsPriOut, 0, out(ack, ecr), out(ack-edge, ecr-edgeTS), "primary_only")
	k.none()
}

// TestQuoteHalfOpen: an error about the guests' SYN comes before there is a connection.
func TestQuoteHalfOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for family, f := range flows {
		pvm, svm := seg{seq: isnPVM, flags: syn, opts: withTS(tsPVM, 0)}, seg{seq: isnSVM, flags: syn, opts: withTS(tsSVM, 0)}
		k.announce(f, pvm, 0, nil)
		k.svmSends(f, svm, pvm, isnPVM, isnPVM, "record_out")
		typ, code := tooBig(f.guest.Addr().Is4())
		for _, n := range quotedLengths {
			if n == 32 {
				continue // in the middle of the timestamps
			}
			k.expect(counts{"delivered": 1}, func() {
				_, got, _ := k.run(k.LsSecIn, input{frame: f.icmp(false, typ, code, f.from(pvm), n)})
				if want := f.icmp(false, typ, code, f.from(svm), n); !sameQuote(got, want, n) {
					t.Errorf("%s, %d quoted:\n% x, want\n% x", family, n, got, want)
				}
			})
		}
	}
	k.none()
}

// TestQuoteUntouched: what quotes nothing of the guest's TCP that has other numbers comes
// as it is.
func TestQuoteUntouched(t *testing.T) {
	k := newKit(t)
	for family, f := range flows {
		v4 := f.guest.Addr().Is4()
		typ, code := tooBig(v4)
		if err := k.LsConn.Put(f.tuple(), &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, IsnSvm: isnSVM}); err != nil {
			t.Fatal(err)
		}
		output := f.from(seg{seq: isnPVM + 5, flags: ack, payload: []byte("said")})
		changed := func(at int, b byte) []byte {
			c := bytes.Clone(output)
			c[at] = b
			return c
		}
		other := f
		other.remote = netip.AddrPortFrom(f.remote.Addr(), 1)
		query := byte(128) // an echo request, of ICMPv6
		proto, version := 20, 14
		if v4 {
			query, proto = 8, 23
		}
		l3 := 14 + map[bool]int{true: 20, false: 40}[v4] + 8 // of the quote
		short := f.icmp(false, typ, code, output, 8)
		for name, frame := range map[string][]byte{
			"another connection": f.icmp(false, typ, code, other.from(seg{seq: 5, flags: ack}), 20),
			"not TCP":            f.icmp(false, typ, code, changed(proto, 17), 20),
			"another version":    f.icmp(false, typ, code, changed(version, 0x50), 20),
			"no error":           f.icmp(false, query, 0, output, 20),
			"cut in the header":  f.icmp(false, typ, code, output[:40], 20),
			"cut too short":      f.icmp(false, typ, code, output, 7),
			"nothing quoted":     f.icmp(false, typ, code, output[:14], 0),
			"the remote's":       f.icmp(false, typ, code, f.to(seg{seq: 5, flags: ack}), 20),
			"header length 0":    f.icmp(false, typ, code, changed(f.l4(seg{})+12, 0), 20),
			"an empty datagram":  short[:l3],
		} {
			k.setMode(run)
			k.expect(counts{"delivered": 1}, func() {
				if v, got, _ := k.run(k.LsSecIn, input{frame: frame}); v != redirect || !bytes.Equal(got, frame) {
					t.Errorf("%s, %s: verdict %d, frame\n% x, was\n% x", family, name, int32(v), got, frame)
				}
			})
			k.setMode(solo)
			k.check(k.LsSecGate, frame, next, "passed")
			if name != "the remote's" { // which the guest may report
				k.check(k.LsSecOut, frame, next, "passed")
			}
		}
	}
	k.none()
}

// multipath are a SYN's options with MPTCP's among them, and without.
var multipath = map[string][2][]byte{
	"first":       {{30, 4, 1, 0, 2, 4, 5, 0xb4}, {1, 1, 1, 1, 2, 4, 5, 0xb4}},
	"with a key":  {{2, 4, 5, 0xb4, 30, 12, 1, 129, 1, 2, 3, 4, 5, 6, 7, 8}, {2, 4, 5, 0xb4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
	"at odd":      {{1, 30, 12, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0}},
	"two of them": {{30, 3, 1, 30, 3, 2, 0, 0}, {1, 1, 1, 1, 1, 1, 0, 0}},
	"none":        {{2, 4, 5, 0xb4}, {2, 4, 5, 0xb4}},
	"cut":         {{1, 1, 30, 9}, {1, 1, 30, 9}},
	"behind end":  {{0, 30, 3, 1}, {0, 30, 3, 1}},
}

// TestMPTCP: neither guest receives MPTCP options, alone or not, and those that they send in a
// SYN are neither held, announced nor recorded; the config may have it otherwise. What is no
// SYN stays.
func TestMPTCP(t *testing.T) {
	for _, keep := range []uint32{0, 1} {
		k := newKit(t, variable("ls_mptcp", keep))
		for family, f := range flows {
			for name, o := range multipath {
				for _, flags := range []uint8{syn, syn | ack, ack} {
					in := seg{seq: isnCli, ack: isnPVM + 1, flags: flags, opts: o[0]}
					want := in
					if keep == 0 && flags != ack {
						want.opts = o[1]
					}
					k.setMode(solo)
					k.turned(k.LsMirror, 0, f.to(in), f.to(want), "passed")
					k.turned(k.LsSecGate, 0, f.to(in), f.to(want), "passed")
					if flags == ack {
						continue
					}
					k.setMode(hold)
					reason := map[uint8]string{syn: "announced", syn | ack: "announced"}[flags]
					k.expect(counts{reason: 1}, func() {
						_, out, _ := k.run(k.LsPriOut, input{frame: f.from(in)})
						at := int(out[16]) | int(out[17])<<8
						rec := (*bpf.LockstepLsRec)(unsafe.Pointer(&append(bytes.Clone(out[at:]), make([]byte, 512)...)[0]))
						k.streams[rec.Stream] = rec.StreamNo
						if rec.Opts != opts40(want.opts) {
							t.Errorf("%s, %s: announced % x", family, name, rec.Opts)
						}
					})
					ev := one[*bpf.LockstepLsEv](k)
					if got := k.slot(ev.Slot); !bytes.Equal(got, f.from(want)) || !bytes.Equal(ev.Hdr[:ev.HdrLen], f.from(want)) {
						t.Errorf("%s, %s: held\n% x, want\n% x", family, name, got, f.from(want))
					}
					k.setMode(run)
					k.forget(f)
					if flags == syn {
						k.svmSends(f, in, want, 0, 0, "pending")
					}
				}
				if t.Failed() {
					t.Fatalf("%s, %s, MPTCP kept %d", family, name, keep)
				}
			}
		}
		k.none()
	}
}
