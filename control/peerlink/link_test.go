// SPDX-License-Identifier: Apache-2.0

package peerlink

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"lockstep/compare"
	"lockstep/control/datapath"
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
	b, err := binary.Append(nil, binary.LittleEndian, make([]datapath.Edge, MaxEdges))
	if err != nil {
		t.Fatal(err)
	}
	seed := make([]byte, SeedLen)
	for i, m := range []Message{
		{Type: "hello", Hello: &Hello{Party: longest, Fresh: true, Whole: true, Epoch: math.MaxUint32, Connections: math.MaxInt, COLO: true, Disks: disks}},
		{Type: "session", Session: &Session{Party: longest, Epoch: math.MaxUint32, Digest: KeyBytes(keys), Sign: seed, Doubt: true, Record: math.MaxUint64, Pair: true}},
		{Type: "edges", NIC: MaxNICs - 1, Edges: b},
		{Type: "rekey", Rekey: &Rekey{Term: math.MaxUint32, Sign: seed}},
		{Type: "refuse", Cause: strings.Repeat("\x00", MaxMessage)}, // six bytes each in JSON
		{Type: "abort", Epoch: math.MaxUint32, Cause: strings.Repeat("<", MaxMessage)},
		{Type: "resumed", Epoch: math.MaxUint32, PauseNS: math.MinInt64},
	} {
		a, b := net.Pipe()
		sent := make(chan error, 1)
		go func() { sent <- New(a, Timing{Silence: patience, Ping: patience}).Write(m) }()
		got, err := New(b, Timing{Silence: patience, Ping: patience}).Read(patience)
		if err != nil || got.Type != m.Type || len(got.Edges) != len(m.Edges) {
			t.Errorf("message %d, %s: %v", i, m.Type, err)
		}
		b.Close()
		if err := <-sent; err != nil {
			t.Errorf("message %d, %s: %v", i, m.Type, err)
		}
		a.Close()
	}
	// What would not fit is this side's mistake, and no puzzle for the peer.
	long := Message{Type: "edges", Edges: make([]byte, MaxMessage)}
	if err := New(&bytesConn{}, Timing{}).Write(long); err == nil || !strings.Contains(err.Error(), "longer than the peer takes") {
		t.Errorf("a message that is too long: %v", err)
	}
}

// FuzzMessage: no line brings the reader down.
func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"type":"hello","hello":{"version":1,"nics":["02:00:00:00:00:01"]}}`))
	f.Add([]byte(`{"type":"session","session":{"digest":"AAAA"}}`))
	f.Add([]byte("{\"type\":\"ping\"}\nnull\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := New(&bytesConn{Reader: bytes.NewReader(b)}, Timing{Silence: time.Hour, Ping: time.Hour})
		for {
			m, err := l.Read(time.Hour)
			if err != nil {
				return
			}
			if m.Hello != nil {
				_ = CheckPeer(Party{Version: Version, VM: "web1", Node: "beta", Role: "secondary"}, m.Hello.Party, "beta", "secondary")
			}
			_ = fmt.Sprint(m)
		}
	})
}

// bytesConn is a connection that brings bytes and has no deadlines.
type bytesConn struct {
	net.Conn
	*bytes.Reader
}

func (c *bytesConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c *bytesConn) SetReadDeadline(time.Time) error { return nil }
