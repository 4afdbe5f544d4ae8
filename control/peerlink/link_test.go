// SPDX-License-Identifier: Apache-2.0

package peerlink

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/datapath"
)

// patience is for a machine that does many other things.
const patience = 30 * time.Second

func TestSignKeys(t *testing.T) {
	var a [SeedLen]byte
	p2s, s2p := SignKeys(a)
	if q, r := SignKeys(a); q != p2s || r != s2p || p2s == s2p {
		t.Error("signing keys do not follow the seed")
	}
}

// The longest message of each type fits into a line that the peer takes.
func TestMessagesFit(t *testing.T) {
	name := strings.Repeat("n", 32) // as long as the config lets it be
	longest := Party{
		Version: math.MaxInt, VM: name, Node: name, Role: "secondary", Term: math.MaxUint32, QMP: true, Config: strings.Repeat("f", 64),
	}
	for range MaxNICs {
		longest.NICs = append(longest.NICs, "02:00:00:00:00:01")
	}
	disks := slices.Repeat([]int64{math.MaxInt64}, 16)
	keys := new(compare.Keys)
	seed := make([]byte, SeedLen)
	for i, m := range []Message{
		Hello{Party: longest, Fresh: true, Whole: true, Epoch: math.MaxUint32, Connections: math.MaxInt, COLO: true, Disks: disks},
		Session{Party: longest, Epoch: math.MaxUint32, Digest: KeyBytes(keys), Sign: seed, Doubt: true, Record: math.MaxUint64, Pair: true},
		Edges{NIC: MaxNICs - 1, Edges: make([]datapath.Edge, MaxEdges)},
		Rekey{Term: math.MaxUint32, Sign: seed},
		Refuse{Cause: strings.Repeat("\x00", MaxMessage)}, // six bytes each in JSON
		Abort{Epoch: math.MaxUint32, Cause: strings.Repeat("<", MaxMessage)},
		Resumed{Epoch: math.MaxUint32, PauseNS: math.MinInt64},
	} {
		a, b := net.Pipe()
		sent := make(chan error, 1)
		go func() { sent <- New(a, Timing{Silence: patience, Ping: patience}).Write(m) }()
		got, err := New(b, Timing{Silence: patience, Ping: patience}).Read(patience)
		if err != nil || !same(got, m) {
			t.Errorf("message %d, %s: %v", i, m.Type(), err)
		}
		b.Close()
		if err := <-sent; err != nil {
			t.Errorf("message %d, %s: %v", i, m.Type(), err)
		}
		a.Close()
	}
	// What would not fit is this side's mistake, and no puzzle for the peer.
	long := Edges{Edges: make([]datapath.Edge, MaxMessage)}
	if err := New(&bytesConn{}, Timing{}).Write(long); err == nil || !strings.Contains(err.Error(), "longer than the peer takes") {
		t.Errorf("a message that is too long: %v", err)
	}
}

// FuzzMessage: no line brings the reader down, a message comes the same however its bytes are
// cut into packets, and what was read can be sent on.
func FuzzMessage(f *testing.F) {
	for _, m := range []Message{Hello{}, Edges{NIC: 1, Edges: make([]datapath.Edge, 2)}, Overlays{All: []api.OverlayStatus{{Dir: "/o"}}, Cause: "full"}} {
		b, err := json.Marshal(encode(m))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(b, '\n'))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, err := readAll(bytes.NewReader(b))
		pieces, again := readAll(iotest.OneByteReader(bytes.NewReader(b)))
		if !reflect.DeepEqual(whole, pieces) || fmt.Sprint(err) != fmt.Sprint(again) {
			t.Fatalf("at once %v, %v, byte by byte %v, %v", whole, err, pieces, again)
		}
		for _, m := range whole {
			if h, ok := m.(Hello); ok {
				_ = CheckPeer(Party{Version: Version, VM: "web1", Node: "beta", Role: "secondary"}, h.Party, "beta", "secondary")
			}
			w := encode(m)
			if got, err := w.decode(); err != nil || !same(m, got) {
				t.Errorf("%#v becomes %#v, %v", m, got, err)
			}
		}
	})
}

// readAll reads messages until one makes no sense.
func readAll(r io.Reader) (ms []Message, err error) {
	l := New(&bytesConn{Reader: r}, Timing{Silence: time.Hour, Ping: time.Hour})
	for {
		m, err := l.Read(time.Hour)
		if err != nil {
			return ms, err
		}
		ms = append(ms, m)
	}
}

// bytesConn is a connection that brings bytes and has no deadlines.
type bytesConn struct {
	net.Conn
	io.Reader
}

func (c *bytesConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c *bytesConn) SetReadDeadline(time.Time) error { return nil }

// same reports whether b came as a, but for a cause that was too long.
func same(a, b Message) bool {
	x, _ := a.(Edges)
	y, _ := b.(Edges)
	return a != nil && a.Type() == b.Type() && len(x.Edges) == len(y.Edges)
}

// Each message comes as it was sent.
func TestMessages(t *testing.T) {
	party := Party{Version: Version, VM: "web1", Node: "beta", Role: "secondary", Term: 3, NICs: []string{"02:00:00:00:00:01"}}
	for _, m := range []Message{
		Hello{Party: party, Fresh: true, Whole: true, Epoch: 4, Connections: 5, COLO: true, Disks: []int64{6}, Machine: "pc", QEMU: "10.0", PausedNS: 7},
		Session{Party: party, Epoch: 4, Digest: []byte{1}, Sign: []byte{2}, Doubt: true, Record: 7, Pair: true},
		Refuse{"no", true}, OK{}, Prepare{4, 6}, Abort{4, "late", true}, Ready{4}, Stopped{4}, Resumed{4, 5}, Rekey{Term: 3, Sign: []byte{2}},
		Edges{NIC: 1, Edges: []datapath.Edge{{Seq: 8, TS: 9}}}, Covered{7}, Dismiss{}, PoweredOff{}, Refused{"images"},
		Overlays{All: []api.OverlayStatus{{Node: "beta", Dir: "/o"}}, Cause: "full"}, Replica{Point: "p"}, Kept{Point: "p"}, Yield{}, Dead{}, Ping{},
	} {
		b, err := json.Marshal(encode(m))
		if err != nil {
			t.Fatal(err)
		}
		var w wire
		if err := json.Unmarshal(b, &w); err != nil {
			t.Fatal(err)
		}
		if got, err := w.decode(); err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%s: %#v, %v, want %#v", b, got, err, m)
		}
	}
	for want, w := range map[string]wire{
		`"hello" is empty`: {Type: "hello"}, `"session" is empty`: {Type: "session"}, `"rekey" is empty`: {Type: "rekey"},
		`"sing" is unknown`: {Type: "sing"}, "edges that make no sense": {Type: "edges", Edges: make([]byte, 1)},
	} {
		if m, err := w.decode(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, %v, want %s", w, m, err, want)
		}
	}
}
