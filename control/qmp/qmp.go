// SPDX-License-Identifier: Apache-2.0

// Package qmp talks to one QEMU over its monitor socket (QMP), with deadlines,
// typed errors and bounds.
//
// [Monitor] is a go-qemu qmp.Monitor, so go-qemu's typed commands (qmp/raw) run
// over it, but it is not go-qemu's SocketMonitor. That one cannot be made safe
// from outside (read at v0.0.0-20250212194115): it drops what QEMU sends behind
// the handshake, so a STOP may be lost; one unasked reply blocks all events
// for good; a reply is handed out in the buffer that the next line overwrites;
// an error's class is thrown away; lines end at 64 KiB; nothing has a deadline.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
)

const (
	// maxLine bounds one line from QEMU. query-qmp-schema, the longest reply
	// known, is about 200 KiB.
	maxLine = 4 << 20
	// maxEvents bounds the events that wait for their reader.
	maxEvents = 1024

	// noPeriod is x-checkpoint-delay's maximum, 49 days: QEMU makes no
	// checkpoint of its own (R12).
	noPeriod = math.MaxUint32
)

// ErrTimeout means that QEMU did not answer in time. The connection is closed
// then, because a late reply must not be taken for the next one's.
var ErrTimeout = errors.New("no answer in time")

// Error is QEMU's refusal of a command.
type Error struct {
	Command     string
	Class       string // "GenericError", "CommandNotFound" ...
	Description string
}

func (e *Error) Error() string {
	return fmt.Sprintf("qmp %s: %s (%s)", e.Command, e.Description, e.Class)
}

// Event is something that QEMU tells unasked.
type Event = qmp.Event

// Time is when QEMU says it happened, by the host's clock.
func Time(e Event) time.Time {
	return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*int64(time.Microsecond))
}

// Monitor is a connection to QEMU's monitor. It does not reconnect: after any
// failure it is closed and its owner dials again, because events may be lost.
type Monitor struct {
	conn    net.Conn
	timeout time.Duration
	version qmp.Version
	events  chan Event

	run sync.Mutex // one command at a time

	mu      sync.Mutex
	err     error      // why it closed
	lastID  uint64     // of commands sent
	waiting chan reply // of command lastID; nil: none
}

var _ qmp.Monitor = (*Monitor)(nil)

type reply struct {
	line []byte
	err  *Error
}

// Dial connects to the monitor socket at path. Commands, the handshake
// included, have to be answered within timeout.
func Dial(ctx context.Context, path string, timeout time.Duration) (*Monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	m := &Monitor{conn: conn, timeout: timeout, events: make(chan Event, maxEvents)}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)

	// The context also ends a handshake that QEMU answers byte by byte.
	stop := context.AfterFunc(ctx, func() { m.fail(ErrTimeout) })
	defer stop()
	if err := m.greeting(lines); err != nil {
		m.fail(err)
		return nil, fmt.Errorf("qmp greeting: %w", m.Err())
	}
	go m.read(lines)
	if err := m.Execute("qmp_capabilities", nil, nil); err != nil {
		m.Disconnect()
		return nil, err
	}
	return m, nil
}

func (m *Monitor) greeting(lines *bufio.Scanner) error {
	if !lines.Scan() {
		return scanErr(lines)
	}
	var hello struct {
		QMP *struct {
			Version qmp.Version `json:"version"`
		}
	}
	if err := json.Unmarshal(lines.Bytes(), &hello); err != nil {
		return fmt.Errorf("not QMP: %w", err)
	}
	if hello.QMP == nil {
		return errors.New("not QMP")
	}
	m.version = hello.QMP.Version
	return nil
}

func scanErr(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return io.EOF
}

// Version is what QEMU said of itself, "7.2.0".
func (m *Monitor) Version() string { return m.version.String() }

// read takes lines in until the connection closes.
func (m *Monitor) read(lines *bufio.Scanner) {
	defer close(m.events)
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		if err := m.line(lines.Bytes()); err != nil {
			m.fail(err)
			return
		}
	}
	m.fail(scanErr(lines))
}

// line handles one line. The line is the scanner's: what stays is copied.
func (m *Monitor) line(b []byte) error {
	var l struct {
		Event string
		ID    *uint64
		Error *struct{ Class, Desc string }
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return fmt.Errorf("not QMP: %w", err)
	}
	if l.Event != "" {
		var e Event
		if err := json.Unmarshal(b, &e); err != nil {
			return fmt.Errorf("event %s: %w", l.Event, err)
		}
		select {
		case m.events <- e:
			return nil
		default:
			return fmt.Errorf("%d events wait to be read", maxEvents)
		}
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting == nil || l.ID == nil || *l.ID != m.lastID {
		return errors.New("a reply to nothing that was asked")
	}
	r := reply{line: bytes.Clone(b)}
	if l.Error != nil {
		r.err = &Error{Class: l.Error.Class, Description: l.Error.Desc}
	}
	m.waiting <- r
	m.waiting = nil
	return nil
}

// fail closes the connection; the first reason given is kept.
func (m *Monitor) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	m.conn.Close()
	if m.waiting != nil {
		close(m.waiting)
		m.waiting = nil
	}
}

// Err tells why the connection closed; nil while it is open.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Execute runs a command and decodes what it returned into result, when that
// is not nil.
func (m *Monitor) Execute(command string, args, result any) error {
	out, err := m.command(command, args)
	if err != nil {
		return err
	}
	if result == nil {
		return nil
	}
	r := struct{ Return any }{result}
	if err := json.Unmarshal(out, &r); err != nil {
		return fmt.Errorf("qmp %s: reply: %w", command, err)
	}
	return nil
}

// command returns the whole line of the reply.
func (m *Monitor) command(command string, args any) ([]byte, error) {
	m.run.Lock()
	defer m.run.Unlock()

	m.mu.Lock()
	if m.err != nil {
		defer m.mu.Unlock()
		return nil, fmt.Errorf("qmp %s: %w", command, m.err)
	}
	m.lastID++
	id := m.lastID
	answer := make(chan reply, 1)
	m.waiting = answer
	m.mu.Unlock()

	b, err := json.Marshal(struct {
		qmp.Command
		ID uint64 `json:"id"`
	}{qmp.Command{Execute: command, Args: args}, id})
	if err != nil {
		return nil, fmt.Errorf("qmp %s: arguments: %w", command, err)
	}
	// The timer guards the write as well: closing the socket ends it.
	expired := time.AfterFunc(m.timeout, func() { m.fail(ErrTimeout) })
	defer expired.Stop()
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		m.fail(err)
	}
	r, ok := <-answer
	if !ok {
		return nil, fmt.Errorf("qmp %s: %w", command, m.Err())
	}
	if r.err != nil {
		r.err.Command = command
		return nil, r.err
	}
	return r.line, nil
}

// Run is go-qemu's way in: a whole command as JSON, the whole reply out.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	var c struct {
		Execute   string
		Arguments json.RawMessage
	}
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, fmt.Errorf("qmp command: %w", err)
	}
	if c.Arguments == nil {
		return m.command(c.Execute, nil)
	}
	return m.command(c.Execute, c.Arguments)
}

// Connect is part of go-qemu's interface; Dial did it.
func (m *Monitor) Connect() error { return m.Err() }

// Disconnect closes the connection.
func (m *Monitor) Disconnect() error {
	m.fail(net.ErrClosed)
	return nil
}

// Events is where QEMU's events come out, whether commands run or not; it is
// closed with the connection. A reader that lets too many wait loses the
// connection: a lost event would be worse.
func (m *Monitor) Events(context.Context) (<-chan Event, error) { return m.events, nil }

// Status asks whether the guest runs, and for QEMU's word for its state.
func (m *Monitor) Status() (running bool, state string, err error) {
	// Not raw.QueryStatus: that refuses states which a newer QEMU may add.
	var s struct {
		Running bool
		Status  string
	}
	err = m.Execute("query-status", nil, &s)
	return s.Running, s.Status, err
}

// COLO asks for the COLO mode: "primary", "secondary" or "none".
func (m *Monitor) COLO() (mode string, err error) {
	var s struct{ Mode string }
	err = m.Execute("query-colo-status", nil, &s)
	return s.Mode, err
}

// Checkpoint makes a primary in COLO state take a checkpoint now. That is what
// setting its period does, and the period set is endless (R12).
func (m *Monitor) Checkpoint() error {
	delay := int64(noPeriod)
	return raw.NewMonitor(m).MigrateSetParameters(&raw.MigrateSetParameters{XCheckpointDelay: &delay})
}
