// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// mutationEnv names the rule that the tests in this file do without.
const mutationEnv = "LOCKSTEP_COMPARE_MUTATION"

// Without its rule each of these tests fails: it would see the rule broken.
func TestHeaderMutations(t *testing.T) {
	if os.Getenv(mutationEnv) != "" {
		return // this is the mutated run
	}
	for name, rule := range map[string]string{"TestUrgent": "URG", "TestSealed": "sealed", "TestSealedSYN": "sealed"} {
		cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$")
		cmd.Env = append(os.Environ(), mutationEnv+"="+rule)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "--- FAIL: "+name) {
			t.Errorf("%s does not fail without %s (%v):\n%s", name, rule, err, out)
		}
	}
}

// midstream is a connection met in mid-stream of which both guests transmit segments.
type midstream struct {
	testing.TB
	p    *Primary
	keys *Keys
	at   Tuple
	slot Slot
	now  int64
}

func newMidstream(t testing.TB) *midstream {
	keys, err := NewKeys(rand.NewChaCha8([32]byte{1}))
	if err != nil {
		t.Fatal(err)
	}
	p := NewPrimary(Config{}, keys)
	p.mutate(map[string]mutation{"URG": mutURG, "sealed": mutSealed}[os.Getenv(mutationEnv)])
	return &midstream{TB: t, keys: keys, p: p, at: Tuple{GuestPort: 80, RemotePort: 4000, Proto: 6}, now: 1}
}

// step has a guest transmit s, of which payload, sum and slot are filled in, and returns what leaves.
func (x *midstream) step(kind EventKind, s Segment) (sent []Effect) {
	x.Helper()
	s.Tuple, s.Win, s.At, s.Inherited, s.Slot = x.at, 1000, x.now, true, NoSlot
	b := make([]byte, s.Len)
	for i := range b {
		b[i] = byte(s.PayloadStart() + uint32(i))
	}
	s.Sum = x.keys.Sum(s.PayloadStart(), b)
	if kind == EvPVM {
		s.Payload, s.Header = b, make([]byte, 34)
		if s.Len > 0 || s.Flags&(SYN|FIN|RST) != 0 {
			x.slot++
			s.Slot = x.slot
		}
	}
	return x.do(Event{Kind: kind, Seg: s})
}

func (x *midstream) do(ev Event) (sent []Effect) {
	for _, e := range x.p.Step(x.now, &ev, nil) {
		if e.Op == OpSend {
			sent = append(sent, e)
		}
	}
	return sent
}

// open has both guests acknowledge what the remote transmitted so far.
func (x *midstream) open(seq uint32) {
	x.Helper()
	x.step(EvPVM, Segment{Seq: seq, Ack: 1, Flags: ACK})
	x.step(EvSVM, Segment{Seq: seq, Ack: 1, Flags: ACK})
}

// pass lets the time come at which a verified part leaves alone.
func (x *midstream) pass() []Effect {
	x.now = x.p.NextDeadline()
	return x.do(Event{Kind: EvTick})
}

func (x *midstream) one(sent []Effect) Effect {
	x.Helper()
	if len(sent) != 1 {
		x.Fatalf("%d frames left: %+v", len(sent), sent)
	}
	return sent[0]
}

// TestUrgent: wherever a frame is cut, the urgent byte stays the one that the PVM meant:
// R4 and R5. The pointer points behind it (RFC 6093).
func TestUrgent(t *testing.T) {
	seq, n := uint32(0xffffff00), uint32(300) // wraps
	for _, c := range []struct {
		name       string
		urg        uint16
		cut        uint32 // the SVM's first segment ends here
		urg1, urg2 uint16 // 0: not urgent any more
	}{
		{"behind the cut", 250, 100, 250, 150},
		{"before the cut", 50, 100, 50, 0},
		{"at the cut", 100, 100, 100, 0},
		{"behind the frame", 1000, 100, 1000, 900},
		{"as far as can be", 0xffff, 100, 0xffff, 0xffff - 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newMidstream(t)
			x.open(seq)
			check := func(e Effect, from uint32, urg uint16) {
				t.Helper()
				if flag := e.Flags&URG != 0; e.Seq != seq+from || e.Urg != urg || flag != (urg != 0) {
					t.Errorf("from %d: position %#x, flags %#x, pointer %d, want %d", from, e.Seq, e.Flags, e.Urg, urg)
				}
			}
			frame := Segment{Seq: seq, Len: n, Ack: 1, Flags: ACK | PSH | URG, Urg: c.urg}
			x.step(EvPVM, frame)
			if sent := x.step(EvSVM, Segment{Seq: seq, Len: c.cut, Ack: 1, Flags: ACK}); len(sent) != 0 {
				t.Fatalf("left at once: %+v", sent)
			}
			check(x.one(x.pass()), 0, c.urg1)
			check(x.one(x.step(EvSVM, Segment{Seq: seq + c.cut, Len: n - c.cut, Ack: 1, Flags: ACK})), c.cut, c.urg2)
			check(x.one(x.step(EvPVM, frame)), 0, c.urg1) // transmitted again
			// A repetition with something new behind it.
			frame.Len += 10
			check(x.one(x.step(EvPVM, frame)), 0, c.urg1)
			want := c.urg
			if uint32(want) <= n {
				want = 0
			} else {
				want -= uint16(n)
			}
			check(x.one(x.step(EvSVM, Segment{Seq: seq + n, Len: 10, Ack: 1, Flags: ACK})), n, want)
		})
	}
}

// TestUrgentACK: a probe that reports urgent data keeps its pointer, and what is made
// of it points to the same byte.
func TestUrgentACK(t *testing.T) {
	x := newMidstream(t)
	x.open(1000)
	x.step(EvPVM, Segment{Seq: 1000, Len: 100, Ack: 1, Flags: ACK})
	x.one(x.step(EvSVM, Segment{Seq: 1000, Len: 100, Ack: 1, Flags: ACK}))
	probe := x.one(x.step(EvPVM, Segment{Seq: 1099, Ack: 1, Flags: ACK | URG, Urg: 50}))
	if probe.Seq != 1099 || probe.Flags != ACK|URG || probe.Urg != 50 {
		t.Errorf("the probe left as %+v", probe)
	}
	x.step(EvSVM, Segment{Seq: 1100, Ack: 9, Flags: ACK})
	x.step(EvPVM, Segment{Seq: 1099, Ack: 1, Flags: ACK | URG, Urg: 50})
	x.step(EvPVM, Segment{Seq: 1100, Ack: 5, Flags: ACK | URG, Urg: 49})
	e := x.one(x.step(EvPVM, Segment{Seq: 1100, Ack: 9, Flags: ACK | URG, Urg: 49}))
	if e.Seq != 1100 || e.Ack != 9 || e.Flags&URG == 0 || e.Urg != 49 {
		t.Errorf("the ACK left as %+v", e)
	}
}

// TestHeaderBits: every flag and reserved bit is the PVM's in what leaves whole and in
// pure ACKs, where those remain that mean something without data. CWR is the first
// part's alone, unless AccECN counts with it.
func TestHeaderBits(t *testing.T) {
	for bit := FIN; bit <= 1<<11; bit <<= 1 {
		x := newMidstream(t)
		x.open(1000)
		if bit != FIN && bit != SYN && bit != RST {
			x.step(EvPVM, Segment{Seq: 1000, Len: 10, Ack: 1, Flags: ACK | bit, Urg: 7})
			if e := x.one(x.step(EvSVM, Segment{Seq: 1000, Len: 10, Ack: 1, Flags: ACK})); e.Flags != ACK|bit || e.Urg != 7 {
				t.Errorf("bit %#x: a frame left with %#x, pointer %d", bit, e.Flags, e.Urg)
			}
			want := ACK | bit
			if bit == PSH {
				want = ACK // R2: nothing is pushed
			}
			x.step(EvSVM, Segment{Seq: 1010, Ack: 5, Flags: ACK})
			if e := x.one(x.step(EvPVM, Segment{Seq: 1010, Ack: 5, Flags: ACK | bit, Urg: 7})); e.Flags != want || e.Urg != 7 {
				t.Errorf("bit %#x: an ACK left with %#x, pointer %d", bit, e.Flags, e.Urg)
			}
		}
	}
	for _, accurate := range []bool{false, true} {
		x := newMidstream(t)
		x.open(1000)
		flags, second := ACK|CWR, ACK
		if accurate {
			flags, second = ACK|CWR|AE, ACK|CWR|AE
		}
		x.step(EvPVM, Segment{Seq: 1000, Len: 300, Ack: 1, Flags: flags})
		x.step(EvSVM, Segment{Seq: 1000, Len: 100, Ack: 1, Flags: ACK})
		if e := x.one(x.pass()); e.Flags != flags {
			t.Errorf("AccECN %v: the first part has %#x", accurate, e.Flags)
		}
		if e := x.one(x.step(EvSVM, Segment{Seq: 1100, Len: 200, Ack: 1, Flags: ACK})); e.Flags != second {
			t.Errorf("AccECN %v: the second part has %#x, want %#x", accurate, e.Flags, second)
		}
	}
}

// TestAckOptions: a pure ACK has the options of the PVM's, in their places; only the
// SACK blocks are those that both guests have.
func TestAckOptions(t *testing.T) {
	ts := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	accECN := []byte{172, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1}
	sack := func(l, r byte) []byte { return []byte{1, 1, 5, 10, 0, 0, 0, l, 0, 0, 0, r} }
	for _, c := range []struct {
		name           string
		template, want []byte
		blocks         []block
	}{
		{"as they are", slices.Concat(ts, accECN), slices.Concat(ts, accECN), nil},
		{"nothing", nil, nil, nil},
		{"broken", []byte{8, 1, 0, 0}, []byte{8, 1, 0, 0}, nil},
		{"one block in another's place", slices.Concat(ts, sack(1, 2), accECN), slices.Concat(ts, accECN, sack(3, 4)), []block{{3, 4}}},
		{"none left", slices.Concat(ts, sack(1, 2), accECN), slices.Concat(ts, accECN), nil},
		{"unknown ones stay", slices.Concat([]byte{254, 4, 7, 8}, ts), slices.Concat([]byte{254, 4, 7, 8}, ts, sack(3, 4)), []block{{3, 4}}},
		{"no room", slices.Concat(ts, accECN, accECN), slices.Concat(ts, accECN, accECN), []block{{3, 4}}},
		{"behind the end", []byte{254, 3, 7, 0, 5, 10, 0, 0, 0, 0, 0, 0}, slices.Concat([]byte{254, 3, 7, 1}, sack(3, 4)), []block{{3, 4}}},
	} {
		var o options
		o.ackOptions(c.template, c.blocks)
		if !bytes.Equal(o.bytes(), c.want) {
			t.Errorf("%s:\n% x, want\n% x", c.name, o.bytes(), c.want)
		}
	}
}

var md5 = slices.Concat([]byte{1, 1, 19, 18}, make([]byte, 16))

// TestSealed: what carries a digest over its header leaves exactly as it was captured, or
// not at all: not cut, and not before the SVM has acknowledged as much.
func TestSealed(t *testing.T) {
	for name, opts := range map[string][]byte{"TCP-MD5": md5, "TCP-AO": {29, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}} {
		t.Run(name, func(t *testing.T) {
			x := newMidstream(t)
			asItWas := func(e Effect, s Segment) {
				t.Helper()
				if e.Seq != s.Seq || e.From != 0 || e.To != s.Len || e.Ack != s.Ack || e.Win != 1000 || e.Flags != s.Flags || e.Urg != s.Urg ||
					!bytes.Equal(e.Opts[:e.OptLen], opts) {
					t.Errorf("left as %+v, was %+v", e, s)
				}
			}
			frame := Segment{Seq: 1000, Len: 300, Ack: 50, Flags: ACK | PSH | CWR | URG, Urg: 9, Opts: opts}
			if sent := x.step(EvPVM, frame); len(sent) != 0 {
				t.Fatalf("left before the SVM transmitted it: %+v", sent)
			}
			x.step(EvSVM, Segment{Seq: 1000, Len: 100, Ack: 40, Flags: ACK})
			if sent := x.pass(); len(sent) != 0 {
				t.Fatalf("cut: %+v", sent)
			}
			if sent := x.step(EvSVM, Segment{Seq: 1100, Len: 200, Ack: 49, Flags: ACK}); len(sent) != 0 {
				t.Fatalf("left with an ACK that the SVM has not confirmed: %+v", sent)
			}
			asItWas(x.one(x.step(EvSVM, Segment{Seq: 1300, Ack: 50, Flags: ACK})), frame)
			asItWas(x.one(x.step(EvPVM, frame)), frame)

			ack := Segment{Seq: 1300, Ack: 60, Flags: ACK, Opts: opts}
			if sent := x.step(EvPVM, ack); len(sent) != 0 {
				t.Fatalf("an ACK left: %+v", sent)
			}
			if sent := x.step(EvSVM, Segment{Seq: 1300, Ack: 55, Flags: ACK}); len(sent) != 0 {
				t.Fatalf("an ACK was changed: %+v", sent)
			}
			asItWas(x.one(x.step(EvSVM, Segment{Seq: 1300, Ack: 61, Flags: ACK})), ack)

			// One that repeats and adds leaves whole, once all of it was transmitted.
			more := Segment{Seq: 1200, Len: 150, Ack: 60, Flags: ACK, Opts: opts}
			if sent := x.step(EvPVM, more); len(sent) != 0 {
				t.Fatalf("cut: %+v", sent)
			}
			asItWas(x.one(x.step(EvSVM, Segment{Seq: 1300, Len: 50, Ack: 61, Flags: ACK})), more)
		})
	}
}

// TestSealedSYN: the digests of two ISNs differ, so the connection waits for the
// checkpoint that makes them one; then the handshake goes on.
func TestSealedSYN(t *testing.T) {
	x := newMidstream(t)
	mine, other := slices.Clone(md5), slices.Clone(md5)
	mine[10], other[10] = 1, 2
	syn := Segment{Seq: 1000, Ack: 50, Flags: SYN | ACK, Opts: mine}
	if sent := x.step(EvPVM, syn); len(sent) != 0 {
		t.Fatalf("left: %+v", sent)
	}
	s := Segment{Tuple: x.at, Seq: 1000, Ack: 50, Win: 1000, Flags: SYN | ACK, Opts: other, Inc: 1000, Slot: NoSlot}
	if sent := x.do(Event{Kind: EvSVM, Seg: s}); len(sent) != 0 {
		t.Fatalf("left: %+v", sent)
	}
	if n := x.p.Stats().Checkpoints[ReasonSealed]; n != 1 {
		t.Errorf("%d checkpoints asked for", n)
	}
	e := x.one(x.do(Event{Kind: EvCommit, Epoch: 1, At: x.now + 1}))
	if e.Seq != 1000 || e.Ack != 50 || e.Flags != SYN|ACK || !bytes.Equal(e.Opts[:e.OptLen], mine) {
		t.Errorf("left as %+v", e)
	}
}
