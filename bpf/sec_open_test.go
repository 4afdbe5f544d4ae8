// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
)

// A connection that a remote opens, from its SYN to both FINs.
func TestPassiveOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for family, f := range flows {
		for _, announcedFirst := range []bool{true, false} {
			name := family + " SVM first"
			if announcedFirst {
				name = family + " announced first"
			}
			t.Run(name, func(t *testing.T) {
				k.TB = t
				k.forget(f)
				clientSyn := seg{seq: isnCli, flags: syn, opts: withTS(tsCli, 0)}
				k.svmReceives(f, clientSyn, clientSyn)
				if announcedFirst {
					k.announce(f, pvmSynAck, 0, nil)
					k.announce(f, pvmSynAck, 0, nil)
					k.svmSends(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
				} else {
					k.check(k.LsSecOut, f.from(svmSynAck), drop, "pending")
					k.check(k.LsSecOut, f.from(seg{seq: isnSVM + 1, ack: isnCli + 1, flags: ack, payload: []byte("early")}), drop, "pending")
					k.announce(f, pvmSynAck, isnPVM, &svmSynAckP)
				}
				k.announce(f, pvmSynAck, isnPVM, &svmSynAckP)                 // repeated
				k.svmSends(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out") // repeated
				later := pvmSynAck                                            // the PVM's clock goes on, the offset does not
				later.opts = withTS(tsPVM+100, tsCli)                         //
				k.announce(f, later, isnPVM, &svmSynAckP)                     //
				early := seg{seq: isnSVM + 1, ack: isnCli + 1, flags: ack}    // before the remote's first ack
				early.payload = []byte("greeting")                            //
				earlyP := early                                               //
				earlyP.seq = isnPVM + 1                                       //
				k.svmSends(f, early, earlyP, isnPVM, isnPVM, "record_out")    //
				k.wantConn(f, nil)                                            //
				stale := seg{seq: isnCli + 1, ack: isnPVM, flags: ack}        // acks nothing: translated, not believed
				k.svmReceives(f, stale, seg{seq: isnCli + 1, ack: isnSVM, flags: ack})
				k.wantConn(f, nil)

				k.svmReceives(f, seg{seq: isnCli + 1, ack: isnPVM + 9, flags: ack, opts: timestamps(tsCli+1, tsPVM)},
					seg{seq: isnCli + 1, ack: isnSVM + 9, flags: ack, opts: timestamps(tsCli+1, tsSVM)})
				want := &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS, CliAck: isnPVM + 9, IsnSvm: isnSVM}
				k.wantConn(f, want)
				k.announce(f, pvmSynAck, 0, nil)                              // confirmed long ago
				k.svmSends(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out") // its ACK was lost on the way to the SVM

				// The stream goes over the wrap in PVM numbering.
				k.svmSends(f, seg{seq: isnSVM + 9, ack: isnCli + 1, flags: ack | psh, win: 9, opts: timestamps(tsSVM+5, tsCli), payload: make([]byte, 5000-1500)},
					seg{seq: isnPVM + 9, ack: isnCli + 1, flags: ack | psh, win: 9, opts: timestamps(tsPVM+5, tsCli), payload: make([]byte, 5000-1500)},
					isnPVM, isnPVM+9, "record_out")
				k.svmReceives(f, seg{seq: isnCli + 1, ack: 2000, flags: ack, payload: []byte("request")}, seg{seq: isnCli + 1, ack: 2000 + off, flags: ack, payload: []byte("request")})
				k.svmReceives(f, seg{seq: isnCli + 1, ack: 1999, flags: ack}, seg{seq: isnCli + 1, ack: 1999 + off, flags: ack}) // overtaken
				want.CliAck = 2000
				k.wantConn(f, want)

				// Pure ACKs and FINs are recorded and not copied.
				k.svmSends(f, seg{seq: 3000 + off, ack: isnCli + 8, flags: ack}, seg{seq: 3000, ack: isnCli + 8, flags: ack}, isnPVM, 2000, "record_out")
				k.svmSends(f, seg{seq: 3000 + off, ack: isnCli + 8, flags: fin | ack}, seg{seq: 3000, ack: isnCli + 8, flags: fin | ack}, isnPVM, 2000, "record_out")
				want.State |= stGFIN | stUnacked
				k.wantConn(f, want)
				k.svmReceives(f, seg{seq: isnCli + 8, ack: 2500, flags: ack}, seg{seq: isnCli + 8, ack: 2500 + off, flags: ack}) // it has crossed
				want.State, want.CliAck = want.State&^stUnacked, 2500
				k.wantConn(f, want)
				again := seg{seq: 2500, ack: isnCli + 8, flags: ack | psh, payload: make([]byte, 500)}
				fromSVM := again
				fromSVM.seq += off
				k.svmSends(f, fromSVM, again, isnPVM, 2500, "record_out")
				want.State |= stUnacked
				k.wantConn(f, want)
				k.svmReceives(f, seg{seq: isnCli + 8, ack: 3001, flags: fin | ack}, seg{seq: isnCli + 8, ack: 3001 + off, flags: fin | ack})
				want.State, want.CliAck = want.State&^stUnacked|stRFIN, 3001
				k.wantConn(f, want)
			})
		}
	}
}

// RSTs end a connection, unless the guest does not believe them.
func TestReset(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	want := k.conn(f)

	k.svmReceives(f, seg{seq: 1, flags: rst}, seg{seq: 1, flags: rst}) // without ACK nothing is translated
	want.State |= stRST
	k.wantConn(f, want)
	k.svmSends(f, seg{seq: isnSVM + 1, ack: 2, flags: ack}, seg{seq: isnPVM + 1, ack: 2, flags: ack}, isnPVM, 0, "record_out")
	want.State &^= stRST
	k.wantConn(f, want)
	k.svmReceives(f, seg{seq: 1, ack: isnPVM + 2, flags: rst | ack}, seg{seq: 1, ack: isnSVM + 2, flags: rst | ack})
	want.State, want.CliAck = want.State|stRST, isnPVM+2
	k.wantConn(f, want)
	k.svmSends(f, seg{seq: isnSVM + 1, flags: rst}, seg{seq: isnPVM + 1, flags: rst}, isnPVM, 0, "record_out")
	k.wantConn(f, want)

	// A refusal has sequence number 0 and is of no incarnation.
	refusal := seg{ack: isnCli + 1, flags: rst | ack}
	k.svmSends(f, refusal, refusal, 0, 0, "record_out")
	other := f
	other.remote = flows["IPv6"].remote
	other.guest = flows["IPv6"].guest
	k.svmSends(other, refusal, refusal, 0, 0, "record_out")
}

// A connection that the guests open.
func TestActiveOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	pvm := seg{seq: isnPVM, flags: syn, win: 1, opts: withTS(tsPVM, 0)}
	svm := seg{seq: isnSVM, flags: syn, win: 2, opts: withTS(tsSVM, 0)}
	reported := seg{seq: isnPVM, flags: syn, win: 2, opts: withTS(tsPVM, 0)}
	for family, f := range flows {
		t.Run(family, func(t *testing.T) {
			k.TB = t
			k.svmSends(f, svm, svm, 0, 0, "pending") // P sees what the SVM opens
			k.announce(f, pvm, isnPVM, &reported)
			k.svmSends(f, svm, reported, isnPVM, 0, "record_out")

			// The remote's SYN|ACK is for the SVM's SYN too.
			k.svmReceives(f, seg{seq: isnCli, ack: isnPVM + 1, flags: syn | ack, opts: withTS(tsCli, tsPVM)},
				seg{seq: isnCli, ack: isnSVM + 1, flags: syn | ack, opts: withTS(tsCli, tsSVM)})
			k.wantConn(f, &bpf.LockstepLsConn{Off: off, TsOff: tsOff, Inc: isnPVM, State: stTS | stActive, CliAck: isnPVM + 1, IsnSvm: isnSVM})

			// The same ports again. ISNs that were used for a pair are not used for another.
			again := svm
			again.seq = 0x5000
			k.svmSends(f, again, again, 0, 0, "pending")
			k.wantConn(f, nil)
			k.announce(f, pvm, 0, nil) // repeated, of the first connection
			k.svmSends(f, again, again, 0, 0, "pending")
			pvm2 := pvm
			pvm2.seq = 0x9000
			reported2 := reported
			reported2.seq = 0x9000
			k.announce(f, pvm2, 0x9000, &reported2)
			k.svmReceives(f, seg{seq: 1, ack: 0x9001, flags: syn | ack}, seg{seq: 1, ack: 0x5001, flags: syn | ack})
			if c := k.conn(f); c == nil || c.Inc != 0x9000 {
				t.Errorf("connection %+v", c)
			}

			// A third time, announced before the SVM opens it.
			pvm3, svm3, reported3 := pvm, svm, reported
			pvm3.seq, reported3.seq, svm3.seq = 77, 77, 99
			k.announce(f, pvm3, 0, nil)
			k.svmSends(f, svm3, reported3, 77, 0, "record_out")
		})
	}
}

// A refused connect is no connection.
func TestActiveRefused(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv4"]
	k.announce(f, seg{seq: isnPVM, flags: syn}, 0, nil)
	k.svmSends(f, seg{seq: isnSVM, flags: syn}, seg{seq: isnPVM, flags: syn}, isnPVM, 0, "record_out")
	k.svmReceives(f, seg{ack: isnPVM + 1, flags: rst | ack}, seg{ack: isnSVM + 1, flags: rst | ack})
	k.wantConn(f, nil)
}

// Both ends open at once: the SYN|ACKs repeat the SYNs' numbers.
func TestSimultaneousOpen(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := flows["IPv6"]
	k.announce(f, seg{seq: isnPVM, flags: syn}, 0, nil)
	k.svmSends(f, seg{seq: isnSVM, flags: syn}, seg{seq: isnPVM, flags: syn}, isnPVM, 0, "record_out")
	k.svmReceives(f, seg{seq: isnCli, flags: syn}, seg{seq: isnCli, flags: syn})
	k.announce(f, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, &seg{seq: isnPVM, flags: syn})
	k.svmSends(f, seg{seq: isnSVM, ack: isnCli + 1, flags: syn | ack}, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, 0, "record_out")
	k.announce(f, seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack}, isnPVM, &seg{seq: isnPVM, ack: isnCli + 1, flags: syn | ack})
	k.svmReceives(f, seg{seq: isnCli + 1, ack: isnPVM + 1, flags: ack}, seg{seq: isnCli + 1, ack: isnSVM + 1, flags: ack})
	if k.conn(f) == nil {
		t.Error("no connection")
	}
}

// The tuple is used again: another SYN of the remote, other ISNs (R8).
func TestIncarnations(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	pvm, svm, reported := pvmSynAck, svmSynAck, svmSynAckP
	pvm.seq, reported.seq, svm.seq = 10, 10, 20
	pvm.ack, reported.ack, svm.ack = 31, 31, 31

	// The announcement of the old one, repeated late, is not for the new one.
	k.check(k.LsSecOut, f.from(svm), drop, "pending")
	k.wantConn(f, nil)
	k.announce(f, pvmSynAck, 0, nil)
	k.check(k.LsSecOut, f.from(svm), drop, "pending")
	k.announce(f, pvm, 10, &reported)
	k.svmReceives(f, seg{ack: 11, flags: ack}, seg{ack: 21, flags: ack})
	if c := k.conn(f); c == nil || c.Inc != 10 || c.Off != 10 {
		t.Errorf("connection %+v", c)
	}

	// While the old connection lives, the new one's announcement does not disturb it.
	k.announce(f, pvmSynAck, 0, nil)
	k.svmReceives(f, seg{ack: 12, flags: ack}, seg{ack: 22, flags: ack})
	k.svmSends(f, svmSynAck, svmSynAckP, isnPVM, 0, "record_out")
	k.wantConn(f, nil)
}

// A connection went once from ls_half to ls_conn: after its removal late segments
// are still translated, without a new entry.
func TestLateSegments(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	f := k.opened(flows["IPv4"])
	if err := k.LsConn.Delete(f.tuple()); err != nil {
		t.Fatal(err)
	}
	k.svmReceives(f, seg{ack: isnPVM + 2, flags: ack}, seg{ack: isnSVM + 2, flags: ack})
	k.svmSends(f, seg{seq: isnSVM + 2, flags: ack}, seg{seq: isnPVM + 2, flags: ack}, isnPVM, 0, "record_out")
	k.wantConn(f, nil)
}

// The PVM's SYN|ACK alone is known: P announced it again after a checkpoint. What an SVM
// transmits that is through with the handshake has an offset of 0.
func TestInheritedHalf(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for _, f := range flows {
		k.announce(f, pvmSynAck, 0, nil)
		s := seg{seq: isnPVM + 1, ack: isnCli, flags: ack, opts: timestamps(tsSVM, tsCli), payload: []byte("going on")}
		k.svmSends(f, s, s, 0, s.seq-1<<30, "record_out")
		in := seg{seq: isnCli, ack: isnPVM + 5, flags: ack, opts: timestamps(tsCli, tsSVM)}
		k.svmReceives(f, in, in)
		k.svmSends(f, s, s, 0, isnPVM+5, "record_out")
		s = seg{seq: isnPVM + 1, flags: rst}
		k.svmSends(f, s, s, 0, isnPVM+5, "record_out")
	}
}

// While input is parked nothing is answered: the SVM that sent the SYN becomes the PVM's copy, in
// an epoch that may have begun already, and P would take its SYN for the copy's.
func TestAnnouncedWhileParked(t *testing.T) {
	k := newKit(t)
	for _, f := range flows {
		k.setMode(run)
		k.check(k.LsSecOut, f.from(svmSynAck), drop, "pending")
		k.setMode(park)
		k.announce(f, pvmSynAck, 0, nil)
		k.setMode(run) // no checkpoint was made
		k.announce(f, pvmSynAck, isnPVM, &svmSynAckP)
	}
}

// Nothing known of a connection: it came with a checkpoint, and both guests number it alike.
func TestInherited(t *testing.T) {
	k := newKit(t)
	k.setMode(run)
	for _, f := range flows {
		s := seg{seq: 1000, ack: isnCli, flags: ack, opts: timestamps(tsSVM, tsCli), payload: []byte("going on")}
		k.svmSends(f, s, s, 0, 1<<32-1<<30+1000, "record_out")
		in := seg{seq: isnCli, ack: 2000, flags: ack, opts: timestamps(tsCli, tsSVM)}
		k.svmReceives(f, in, in)
		k.wantConn(f, nil)
		// From now on copies know what the remote has.
		s.seq, s.payload = 2000, []byte("and on")
		k.svmSends(f, s, s, 0, 2000, "record_out")
	}
}
