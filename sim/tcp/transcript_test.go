// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// script is one stack whose peer is a transcript: what it sends is written there segment by
// segment, what it receives is the answer. Sequence numbers and timestamps are relative.
type script struct {
	t       *testing.T
	s       *Stack
	peer    *Stack // only makes frames
	now     int64
	id      ID
	own     uint16 // port
	remote  uint16 // the peer's
	state   State
	holdTX  bool
	to      netip.Addr // where the peer sends
	noDelay bool
	sent    [][]byte // since somebody looked
	out     strings.Builder
}

const (
	peerISN = 5000000
	peerTS  = 70000
)

// TestTranscripts: testdata has a file for each behaviour. Write the answers anew with -rewrite, and read the difference.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		k := &script{t: t}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			k.t = t
			k.out.Reset()
			if d.Cmd == "stack" {
				k.start(d.CmdArgs)
			}
			if d.Cmd == "run" {
				for line := range strings.Lines(d.Input) {
					k.line(strings.TrimSpace(line))
				}
			}
			return k.out.String()
		})
	})
}

func number(t *testing.T, s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (k *script) start(args []datadriven.CmdArg) {
	cfg := Config{MAC: macA, PeerMAC: macB, Addr: addrA}
	for _, a := range args {
		name, v := a.Key, strings.Join(a.Vals, "")
		flags := map[string]*bool{"noscale": &cfg.NoScale, "nosack": &cfg.NoSACK, "nots": &cfg.NoTimestamps, "ecn": &cfg.ECN,
			"autocork": &cfg.Autocork, "nonagle": &cfg.NoNagle, "notlp": &cfg.NoTLP, "nofrto": &cfg.NoFRTO}
		durations := map[string]*time.Duration{"keepalive": &cfg.Keepalive, "usertimeout": &cfg.UserTimeout, "timewait": &cfg.TimeWait}
		numbers := map[string]*int{"mss": &cfg.MSS, "rcvbuf": &cfg.RcvBuf, "sndbuf": &cfg.SndBuf, "backlog": &cfg.Backlog}
		switch {
		case flags[name] != nil:
			*flags[name] = true
		case numbers[name] != nil:
			*numbers[name] = number(k.t, v)
		case durations[name] != nil:
			d, err := time.ParseDuration(v)
			if err != nil {
				k.t.Fatal(err)
			}
			*durations[name] = d
		default:
			k.t.Fatalf("no setting %q", name)
		}
	}
	*k = script{t: k.t, now: 1e9, own: port, remote: 4000, s: New(cfg, 1)}
	k.peer, k.to = New(Config{MAC: macB, PeerMAC: macA, Addr: addrB}, 2), addrA
	k.s.Listen(port)
}

// conn is the connection that the transcript is about: the newest one.
func (k *script) conn() *conn {
	if len(k.s.conns) == 0 {
		return nil
	}
	return k.s.conns[len(k.s.conns)-1]
}

// line does one thing, and then prints what the stack sent.
func (k *script) line(line string) {
	cmd, arg, _ := strings.Cut(line, " ")
	fmt.Fprintf(&k.out, "%s\n", line)
	if c := k.conn(); c != nil {
		k.id = c.id
	}
	size := func() []byte { return make([]byte, number(k.t, arg)) }
	switch cmd {
	case "dial":
		k.id = k.s.Dial(k.now, netip.AddrPortFrom(addrB, k.remote), 3000)
		k.own = 3000
	case "accept":
		id, ok := k.s.Accept(port)
		fmt.Fprintf(&k.out, "    %v %v\n", id, ok)
	case "in":
		k.in(arg)
	case "write":
		if n := k.s.Write(k.now, k.id, size()); n != number(k.t, arg) {
			fmt.Fprintf(&k.out, "    wrote %d\n", n)
		}
	case "urgent":
		k.s.WriteUrgent(k.now, k.id, size())
	case "read":
		n, eof := k.s.Read(k.now, k.id, size())
		end, isUrgent := k.s.Urgent(k.id)
		fmt.Fprintf(&k.out, "    read %d", n)
		if isUrgent {
			fmt.Fprintf(&k.out, ", urgent data ends in %d", end)
		}
		if eof {
			fmt.Fprint(&k.out, ", end")
		}
		fmt.Fprintln(&k.out)
	case "nodelay":
		k.s.NoDelay(k.id, true)
	case "shutdown":
		k.s.CloseWrite(k.now, k.id)
	case "close":
		k.s.Close(k.now, k.id)
	case "abort":
		k.s.Abort(k.now, k.id)
	case "hold":
		k.holdTX = true
	case "take":
		k.holdTX = false
	case "wait":
		k.wait(arg)
	default:
		k.t.Fatalf("no command %q", line)
	}
	k.flush("")
	if cmd == "take" && k.s.NextDeadline() <= k.now {
		k.s.Tick(k.now)
		k.flush("")
	}
	if c := k.conn(); c != nil && c.state != k.state {
		k.state = c.state
		fmt.Fprintf(&k.out, "    %v", c.state)
		if c.err != nil {
			fmt.Fprintf(&k.out, ": %v", c.err)
		}
		fmt.Fprintln(&k.out)
	}
}

// wait lets time pass, and prints when the stack sent what.
func (k *script) wait(arg string) {
	d, err := time.ParseDuration(arg)
	if err != nil {
		k.t.Fatal(err)
	}
	start := k.now
	for until := k.now + int64(d); ; {
		k.now = min(until, max(k.now, k.s.NextDeadline()))
		k.s.Tick(k.now)
		k.flush(fmt.Sprintf("+%v ", time.Duration(k.now-start).Round(time.Microsecond)))
		if k.now == until {
			return
		}
	}
}

func (k *script) bases() (iss, ts uint32) {
	if c := k.conn(); c != nil {
		return c.iss, c.tsOffset + uint32(1000) // the clock begins at 1 s
	}
	return 0, 0
}

var flagLetters = "FSRP.UEW"

// in is a segment of the peer's.
func (k *script) in(arg string) {
	iss, ts := k.bases()
	k.s.Input(k.now, k.segment(arg, iss, ts))
}

// segment makes a segment of the peer's: "S. seq=0 ack=1 len=10 win=1000 mss=1460 sackok ts=1:2 ws=7 sack=1:2,3:4 urg=1 ce".
func (k *script) segment(arg string, iss, ts uint32) []byte {
	fields := strings.Fields(arg)
	h := header{wnd: 65535}
	for _, l := range fields[0] {
		h.flags |= 1 << strings.IndexRune(flagLetters, l)
	}
	var opts []byte
	n := 0
	for _, f := range fields[1:] {
		name, v, _ := strings.Cut(f, "=")
		pair := func(s string) (uint32, uint32) {
			a, b, _ := strings.Cut(s, ":")
			return uint32(number(k.t, a)), uint32(number(k.t, b))
		}
		switch name {
		case "seq":
			h.seq = peerISN + uint32(number(k.t, v))
		case "ack":
			h.ack = iss + uint32(number(k.t, v))
		case "len":
			n = number(k.t, v)
		case "win":
			h.wnd = uint16(number(k.t, v))
		case "urg":
			h.urg = uint16(number(k.t, v))
		case "ce":
			h.tos = ecnCE
		case "mss":
			opts = be.AppendUint16(append(opts, optMSS, 4), uint16(number(k.t, v)))
		case "ws":
			opts = append(opts, optNOP, optScale, 3, uint8(number(k.t, v)))
		case "sackok":
			opts = append(opts, optNOP, optNOP, optPermitted, 2)
		case "ts":
			val, ecr := pair(v)
			opts = appendTimestamp(opts, peerTS+val, ts+ecr)
		case "sack":
			var blocks []span
			for b := range strings.SplitSeq(v, ",") {
				from, to := pair(b)
				blocks = append(blocks, span{iss + from, iss + to})
			}
			opts = appendSACK(opts, blocks)
		case "port":
			k.remote = uint16(number(k.t, v))
		case "to":
			k.own = uint16(number(k.t, v))
		default:
			k.t.Fatalf("no field %q", f)
		}
	}
	r := k.peer.route(k.to, protoTCP)
	k.peer.transmit(&r, k.remote, k.own, h, opts, make([]byte, n))
	return k.peer.Take()[0]
}

// flush prints what was sent.
func (k *script) flush(at string) {
	if k.holdTX {
		return
	}
	iss, ts := k.bases()
	for _, f := range k.s.Take() {
		k.sent = append(k.sent, f)
		fmt.Fprintf(&k.out, "    %s%s\n", at, k.show(f, iss, ts))
	}
}

func (k *script) show(frame []byte, iss, ts uint32) string {
	var p packet
	var g segment
	if !k.peer.parsePacket(frame, &p) || fold(sum(p.payload, p.pseudo)) != 0 || !g.parse(&p) {
		k.t.Fatalf("the stack sent %x", frame)
	}
	var b strings.Builder
	for i, l := range flagLetters {
		if g.has(1 << i) {
			b.WriteRune(l)
		}
	}
	rel := g.seq - iss
	if g.has(rst) && !g.has(ack) && g.seq == 0 {
		rel = 0
	}
	fmt.Fprintf(&b, " %d:%d", int32(rel), int32(rel)+int32(len(g.data)))
	if g.has(ack) {
		fmt.Fprintf(&b, " ack %d", int32(g.ack-peerISN))
	}
	fmt.Fprintf(&b, " win %d", g.wnd)
	if g.has(urg) {
		fmt.Fprintf(&b, " urg %d", g.urg)
	}
	if tos := frame[etherLen+1]; tos != 0 {
		fmt.Fprintf(&b, " tos %d", tos)
	}
	if g.mss > 0 {
		fmt.Fprintf(&b, " mss %d", g.mss)
	}
	if g.sackPermitted {
		b.WriteString(" sackok")
	}
	if g.timestamps {
		ecr := g.tsEcr
		if ecr != 0 {
			ecr -= peerTS
		}
		fmt.Fprintf(&b, " ts %d:%d", int32(g.tsVal-ts), ecr)
	}
	if g.scale > 0 {
		fmt.Fprintf(&b, " ws %d", g.scale)
	}
	for _, s := range g.blocks[:g.sacks] {
		fmt.Fprintf(&b, " sack %d:%d", int32(s.from-peerISN), int32(s.to-peerISN))
	}
	return b.String()
}
