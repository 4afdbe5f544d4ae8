// SPDX-License-Identifier: Apache-2.0

package peerlink

import (
	"bufio"
	"cmp"
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

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/config"
)

// Bounds of the protocol.
const (
	// Version is the protocol's: both nodes need the same.
	Version    = 5
	MaxMessage = 64 << 10 // a line; TestMessagesFit has the longest of each type
	maxQueue   = 1024     // messages that wait to be written
	MaxEdges   = 900      // in one message
	MaxNICs    = 256
	maxCause   = 1 << 10 // bytes of a cause: a sixth of what JSON may make of it
)

// Party is what each side reports of itself.
type Party struct {
	Version int      `json:"version"`
	VM      string   `json:"vm"`
	Node    string   `json:"node"`
	Role    string   `json:"role"`
	Term    uint32   `json:"term"`
	QMP     bool     `json:"qmp"`    // configured
	Config  string   `json:"config"` // digest of what both configs must agree on
	NICs    []string `json:"nics"`   // MAC of each NIC's peer device, in the config's order
}

// SeedLen is the length of the seed of the signing keys, bytes.
const SeedLen = 32

// KeyBytes are digest keys as a session carries them.
func KeyBytes(k *compare.Keys) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, k)
	if err != nil {
		panic(err) // a struct of words has a size
	}
	return b
}

// SignKeys are the keys of a seed: P's towards S, S's towards P.
func SignKeys(seed [SeedLen]byte) (p2s, s2p [2]uint64) {
	var b [32]byte
	rand.NewChaCha8(seed).Read(b[:]) // cannot fail
	for i := range p2s {
		p2s[i] = binary.LittleEndian.Uint64(b[8*i:])
		s2p[i] = binary.LittleEndian.Uint64(b[16+8*i:])
	}
	return p2s, s2p
}

// CheckPeer compares what the peer reports of itself with what this side knows.
func CheckPeer(own, peer Party, peerNode, peerRole string) error {
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
type Timing struct {
	Handshake time.Duration // hello to session-ok, each step
	Silence   time.Duration // a link without a message for so long is dead
	Ping      time.Duration // between two messages, though there is nothing to send
	Retry     time.Duration // between attempts to connect, growing to retryMax
	RetryMax  time.Duration
}

const (
	handshake = 5 * time.Second
	retryMax  = 2 * time.Second
)

var DefaultTiming = Timing{
	Handshake: handshake, Silence: 3 * time.Second, Ping: time.Second, Retry: 50 * time.Millisecond, RetryMax: retryMax,
}

// MaxRejoin is how long after a daemon's start a healthy peer's session with it may
// take: the last wait between two attempts, and one attempt.
const MaxRejoin = retryMax + handshake

// queued is a message that waits to be written.
type queued struct {
	Message
	written chan struct{} // closed when it was; nil: nobody waits
}

// Link is an established connection to the peer.
type Link struct {
	conn  net.Conn
	lines *bufio.Scanner
	quiet time.Duration
	ping  time.Duration
	out   chan queued
	bulk  chan queued // is written when nothing is in out
	done  chan struct{}
	once  sync.Once
	err   error // why it closed; set before done closes
}

func New(conn net.Conn, t Timing) *Link {
	l := &Link{
		conn: conn, lines: bufio.NewScanner(conn), quiet: t.Silence, ping: t.Ping,
		out: make(chan queued, maxQueue), bulk: make(chan queued), done: make(chan struct{}),
	}
	l.lines.Buffer(nil, MaxMessage)
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
func (l *Link) Read(d time.Duration) (Message, error) {
	if err := l.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		return nil, err
	}
	if !l.lines.Scan() {
		err := l.lines.Err()
		if err == nil {
			err = io.EOF
		}
		return nil, err
	}
	var w wire
	if err := json.Unmarshal(l.lines.Bytes(), &w); err != nil {
		return nil, fmt.Errorf("not a control message: %w", err)
	}
	return w.decode()
}

// write sends a message at once.
func (l *Link) Write(m Message) error {
	b, err := json.Marshal(encode(m))
	if err != nil {
		return err
	}
	if len(b) >= MaxMessage {
		return fmt.Errorf("a message %q of %d bytes is longer than the peer takes", m.Type(), len(b))
	}
	if err := l.conn.SetWriteDeadline(time.Now().Add(l.quiet)); err != nil {
		return err
	}
	_, err = l.conn.Write(append(b, '\n'))
	return err
}

// send queues a message. A peer that does not read them loses the link.
func (l *Link) Send(m Message) { l.queue(queued{Message: m}) }

func (l *Link) queue(m queued) {
	select {
	case l.out <- m:
	case <-l.done:
	default:
		l.Close(errors.New("the peer does not read"))
	}
}

// stream writes messages as fast as the peer takes them, between those that are sent
// meanwhile, and reports whether all were written before the link closed.
func (l *Link) Stream(ms iter.Seq[Message]) bool {
	for m := range ms {
		written := make(chan struct{})
		select {
		case l.bulk <- queued{m, written}:
		case <-l.done:
			return false
		}
		select {
		case <-written:
		case <-l.done:
			return false
		}
	}
	return true
}

// flush waits, not for long, until what was queued is written.
func (l *Link) Flush() {
	written := make(chan struct{})
	l.queue(queued{Ping{}, written})
	late := time.NewTimer(l.ping)
	defer late.Stop()
	select {
	case <-written:
	case <-l.done:
	case <-late.C:
	}
}

// close ends the link; the first reason counts.
func (l *Link) Close(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.done)
		l.conn.Close()
	})
}

// RemoteAddr is the peer's address.
func (l *Link) RemoteAddr() net.Addr { return l.conn.RemoteAddr() }

// Queued is how many messages wait to be written.
func (l *Link) Queued() int { return len(l.out) }

// Done is closed when the link is.
func (l *Link) Done() <-chan struct{} { return l.done }

// Err is why the link closed, once it has.
func (l *Link) Err() error { return l.err }

// pump writes what is queued, and pings, until the link closes.
func (l *Link) Pump() {
	ping := time.NewTicker(l.ping)
	defer ping.Stop()
	for {
		m := queued{Message: Ping{}}
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
		if err := l.Write(m.Message); err != nil {
			l.Close(err)
			return
		}
		if m.written != nil {
			close(m.written)
		}
	}
}
