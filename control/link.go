// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"lockstep/compare"
	"lockstep/control/api"
	"lockstep/control/config"
)

// The control link: one TCP connection, which the secondary makes, and JSON
// lines both ways.
//
//	S → P  hello      who I am, what state my tables are in
//	P → S  session    the term, its keys, the epoch; or refuse, with the reason
//	S → P  ok         installed
//	P → S  prepare, abort
//	S → P  ready, stopped, resumed, abort
//	P → S  rekey      the next term and its signing keys; S answers ok
//	P → S  edges      connections that were taken over earlier: S has to know them before it is covered
//	P → S  covered    S may take over from now on (R18); over: P goes on without S; off: the guest powered off
//	P → S  refused    why replication does not begin, "" when it is tried again
//	S → P  overlays   what room they have, and in Cause why P should make a checkpoint
//	S → P  yield      fall silent and say dead: S takes over because an operator wants it to
//	both   dead       my QEMU is dead, my gates are shut
//	both   ping       now and then
const (
	// Version is the protocol's: both nodes need the same.
	Version    = 4
	maxMessage = 64 << 10 // a line; TestMessagesFit has the longest of each type
	maxQueue   = 1024     // messages that wait to be written
	maxEdges   = 1000     // in one message
	maxNICs    = 256
	maxCause   = 1 << 10 // bytes of a cause: a sixth of what JSON may make of it
)

// message is one line.
type message struct {
	Type    string   `json:"type"`
	Epoch   uint32   `json:"epoch,omitempty"` // prepare, abort, ready, stopped, resumed
	Cause   string   `json:"cause,omitempty"` // refuse, abort, refused, overlays
	PauseNS int64    `json:"pause_ns,omitempty"`
	Hello   *hello   `json:"hello,omitempty"`
	Session *session `json:"session,omitempty"`
	Rekey   *rekey   `json:"rekey,omitempty"`
	Record  uint64   `json:"record,omitempty"` // covered: term of the arbiter's record
	NIC     int      `json:"nic,omitempty"`    // edges
	Edges   []byte   `json:"edges,omitempty"`  // Edge's fields, little-endian

	Overlays []api.OverlayStatus `json:"overlays,omitempty"`

	written chan struct{} // closed when the message was; nil: nobody waits
}

// party is what each side tells of itself.
type party struct {
	Version int      `json:"version"`
	VM      string   `json:"vm"`
	Node    string   `json:"node"`
	Role    string   `json:"role"`
	Term    uint32   `json:"term"`
	QMP     bool     `json:"qmp"`    // configured
	Config  string   `json:"config"` // digest of what both configs must agree on
	NICs    []string `json:"nics"`   // MAC of each NIC's peer device, in the config's order
}

type hello struct {
	party
	Fresh       bool   `json:"fresh"`       // the tables were made at this start
	Whole       bool   `json:"whole"`       // the offsets are those of the SVM as it is
	Epoch       uint32 `json:"epoch"`       // the one that S is in
	Connections int    `json:"connections"` // with an offset

	COLO  bool    `json:"colo,omitempty"`  // the SVM follows a PVM; else its QEMU waits for one
	Disks []int64 `json:"disks,omitempty"` // their sizes
	// The guest's machine with its version, and QEMU's.
	Machine string `json:"machine,omitempty"`
	QEMU    string `json:"qemu,omitempty"`
}

type session struct {
	party
	Epoch  uint32 `json:"epoch"`
	Digest []byte `json:"digest"` // digest keys, compare.Keys' words, little-endian: they outlive a daemon
	Sign   []byte `json:"sign"`   // seed of the keys that peer frames are signed with
	Doubt  bool   `json:"doubt"`  // stay parked until a checkpoint

	Record uint64 `json:"record,omitempty"` // term of the arbiter's record
	Pair   bool   `json:"pair,omitempty"`   // the pair that there was goes on
}

type rekey struct {
	Term uint32 `json:"term"`
	Sign []byte `json:"sign"` // as in session
}

const seedLen = 32

// keyBytes are digest keys as a session carries them.
func keyBytes(k *compare.Keys) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, k)
	if err != nil {
		panic(err) // a struct of words has a size
	}
	return b
}

// signKeys are the keys of a seed: P's towards S, S's towards P.
func signKeys(seed [seedLen]byte) (p2s, s2p [2]uint64) {
	var b [32]byte
	rand.NewChaCha8(seed).Read(b[:]) // cannot fail
	for i := range p2s {
		p2s[i] = binary.LittleEndian.Uint64(b[8*i:])
		s2p[i] = binary.LittleEndian.Uint64(b[16+8*i:])
	}
	return p2s, s2p
}

// checkPeer compares what the peer says of itself with what this side knows.
func checkPeer(own, peer party, peerNode, peerRole string) error {
	switch {
	case peer.Version != Version:
		return fmt.Errorf("control protocol %d here, %d there: run the same version of lockstep on both nodes", Version, peer.Version)
	case peer.VM != own.VM:
		return fmt.Errorf("vm %q here, %q there: the config or the address is another pair's", own.VM, peer.VM)
	case peer.Node != peerNode:
		return fmt.Errorf("the peer of %q is %q, but %q is there", own.Node, peerNode, peer.Node)
	case peer.Role != peerRole:
		return fmt.Errorf("role %q here, %q there: one is to be primary, one secondary", own.Role, peer.Role)
	case peer.Config != own.Config:
		in := strings.Join(config.DifferHex(own.Config, peer.Config), ", ")
		return fmt.Errorf("the two nodes' configs differ in what both must agree on (%s): give both the same file; docs/CONFIG.md says under \"Changing a setting\" how a pair that runs gets another", cmp.Or(in, "what, the versions do not tell"))
	case len(peer.NICs) != len(own.NICs):
		return fmt.Errorf("%d NICs here, %d there", len(own.NICs), len(peer.NICs))
	case peer.QMP != own.QMP:
		return errors.New("qmp is configured on one node only: without the other's QEMU no checkpoint can be followed")
	}
	for _, mac := range peer.NICs {
		if a, err := net.ParseMAC(mac); err != nil || len(a) != 6 {
			return fmt.Errorf("peer device address %q is no MAC address", mac)
		}
	}
	return nil
}

// timing of the control link; tests shorten it.
type linkTiming struct {
	handshake time.Duration // hello to session-ok, each step
	silence   time.Duration // a link that says nothing for so long is dead
	ping      time.Duration // between two words, though there is nothing to say
	retry     time.Duration // between attempts to connect, growing to retryMax
	retryMax  time.Duration
}

const (
	handshake = 5 * time.Second
	retryMax  = 2 * time.Second
)

var defaultLinkTiming = linkTiming{
	handshake: handshake, silence: 3 * time.Second, ping: time.Second, retry: 50 * time.Millisecond, retryMax: retryMax,
}

// MaxRejoin is how long after a daemon's start a healthy peer's session with it may
// take: the last wait between two attempts, and one attempt.
const MaxRejoin = retryMax + handshake

// link is an established connection to the peer.
type link struct {
	conn  net.Conn
	lines *bufio.Scanner
	quiet time.Duration
	ping  time.Duration
	out   chan message
	bulk  chan message // is written when nothing is in out
	done  chan struct{}
	once  sync.Once
	err   error // why it closed; set before done closes
}

func newLink(conn net.Conn, t linkTiming) *link {
	l := &link{
		conn: conn, lines: bufio.NewScanner(conn), quiet: t.silence, ping: t.ping,
		out: make(chan message, maxQueue), bulk: make(chan message), done: make(chan struct{}),
	}
	l.lines.Buffer(nil, maxMessage)
	l.lines.Split(func(b []byte, atEOF bool) (int, []byte, error) {
		if len(b) > 0 && b[0] == tlsHandshake {
			return 0, nil, errSpeaksTLS // a greeting without a line's end: it would be waited for
		}
		return bufio.ScanLines(b, atEOF)
	})
	return l
}

// tlsHandshake begins a TLS connection; no control message begins so.
const tlsHandshake = 22

var errSpeaksTLS = errors.New("it speaks TLS")

// read gives the next message that comes within d.
func (l *link) read(d time.Duration) (message, error) {
	if err := l.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		return message{}, err
	}
	if !l.lines.Scan() {
		err := l.lines.Err()
		if err == nil {
			err = io.EOF
		}
		return message{}, err
	}
	var m message
	if err := json.Unmarshal(l.lines.Bytes(), &m); err != nil {
		return message{}, fmt.Errorf("not a control message: %w", err)
	}
	return m, nil
}

// write sends a message at once.
func (l *link) write(m message) error {
	m.Cause = m.Cause[:min(len(m.Cause), maxCause)] // it may quote what somebody else said
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) >= maxMessage {
		return fmt.Errorf("a message %q of %d bytes is longer than the peer takes", m.Type, len(b))
	}
	if err := l.conn.SetWriteDeadline(time.Now().Add(l.quiet)); err != nil {
		return err
	}
	_, err = l.conn.Write(append(b, '\n'))
	return err
}

// send queues a message. A peer that does not read them loses the link.
func (l *link) send(m message) {
	select {
	case l.out <- m:
	case <-l.done:
	default:
		l.close(errors.New("the peer does not read"))
	}
}

// stream writes messages as fast as the peer takes them, between those that are sent
// meanwhile, and reports whether all were written before the link closed.
func (l *link) stream(ms iter.Seq[message]) bool {
	for m := range ms {
		m.written = make(chan struct{})
		select {
		case l.bulk <- m:
		case <-l.done:
			return false
		}
		select {
		case <-m.written:
		case <-l.done:
			return false
		}
	}
	return true
}

// flush waits, not for long, until what was queued is written.
func (l *link) flush() {
	written := make(chan struct{})
	l.send(message{Type: "ping", written: written})
	late := time.NewTimer(l.ping)
	defer late.Stop()
	select {
	case <-written:
	case <-l.done:
	case <-late.C:
	}
}

// close ends the link; the first reason counts.
func (l *link) close(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.done)
		l.conn.Close()
	})
}

// pump writes what is queued, and pings, until the link closes.
func (l *link) pump() {
	ping := time.NewTicker(l.ping)
	defer ping.Stop()
	for {
		m := message{Type: "ping"}
		select {
		case m = <-l.out:
		default:
			select {
			case m = <-l.out:
			case m = <-l.bulk:
			case <-ping.C:
			case <-l.done:
				return
			}
		}
		if err := l.write(m); err != nil {
			l.close(err)
			return
		}
		if m.written != nil {
			close(m.written)
		}
	}
}

// backoff waits between attempts, longer each time.
type backoff struct {
	first, last, next time.Duration
}

// take is how long to wait now.
func (b *backoff) take() time.Duration {
	b.next = min(max(2*b.next, b.first), b.last)
	return b.next
}

// wait returns false when ctx ends first.
func (b *backoff) wait(ctx context.Context) bool { return b.waitUnless(ctx, nil) }

// waitUnless is wait, but no longer than until sooner is closed.
func (b *backoff) waitUnless(ctx context.Context, sooner <-chan struct{}) bool {
	t := time.NewTimer(b.take())
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-sooner:
		return true
	case <-ctx.Done():
		return false
	}
}

func (b *backoff) reset() { b.next = 0 }
