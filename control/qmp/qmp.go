// SPDX-License-Identifier: Apache-2.0

// Package qmp talks to one QEMU over its monitor socket (QMP), with deadlines,
// typed errors and bounds.
//
// [Monitor] implements go-qemu's qmp.Monitor, so that go-qemu's typed commands (qmp/raw)
// run over it. go-qemu's own SocketMonitor cannot be made safe from outside (read at
// v0.0.0-20250212194115): it drops what QEMU sends right after the handshake, so that a
// STOP may be lost; one unexpected reply blocks all events forever; a reply is returned in
// the buffer that the next line overwrites; the class of an error is dropped; lines are
// limited to 64 KiB; nothing has a deadline.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

const (
	// maxLine bounds one line from QEMU. query-qmp-schema, the longest reply
	// known, is about 200 KiB.
	maxLine = 4 << 20
	// maxEvents bounds the events that are queued for the reader.
	maxEvents = 1024
)

// ErrTimeout means that QEMU did not answer in time. The connection is closed then, but
// where its owner is patient ([Monitor.BePatient]).
var ErrTimeout = errors.New("no answer in time")

// ErrHangs means that QEMU did not answer as many commands in a row as its owner had patience for.
var ErrHangs = fmt.Errorf("several commands in a row: %w", ErrTimeout)

// Error is QEMU's refusal of a command.
type Error struct {
	Command     string
	Class       string // "GenericError", "CommandNotFound" ...
	Description string
}

// IsUnknown reports whether err is QEMU's answer to a command that it does not have.
func IsUnknown(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == "CommandNotFound"
}

func (e *Error) Error() string {
	return fmt.Sprintf("qmp %s: %s (%s)", e.Command, e.Description, e.Class)
}

// Event is an asynchronous message of QEMU's.
type Event = qmp.Event

// Time returns when an event happened according to QEMU, by its host's real-time clock.
func Time(e Event) time.Time {
	return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*int64(time.Microsecond))
}

// Monitor is a connection to QEMU's monitor. It does not reconnect, because events may
// have been lost: after a failure it is closed, and its owner dials again.
type Monitor struct {
	conn    *net.UnixConn
	timeout time.Duration
	version qmp.Version
	events  chan Event

	run sync.Mutex // held by the one command under way, but for those out of band

	oob bool // QEMU takes commands out of band

	mu         sync.Mutex
	err        error                 // why it closed
	lastID     uint64                // of commands sent
	waiting    map[uint64]chan reply // by the commands' IDs
	late       map[uint64]bool       // commands that were given up, of which a reply may come still
	patience   int                   // so many commands in a row that are not answered close it
	unanswered int                   // so far
}

var _ qmp.Monitor = (*Monitor)(nil)

type reply struct {
	line []byte
	err  *Error
}

// Dial connects to the monitor socket at path. Commands, the handshake
// included, have to be answered within timeout.
func Dial(ctx context.Context, path string, timeout time.Duration) (*Monitor, error) {
	return DialTo(ctx, path, timeout, func(*net.UnixConn) {})
}

// DialTo is [Dial], and calls connected with the connection before the monitor has
// answered on it, which a monitor that serves another client does not do.
func DialTo(ctx context.Context, path string, timeout time.Duration, connected func(*net.UnixConn)) (*Monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := connect(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	connected(conn)
	m := &Monitor{conn: conn, timeout: timeout, events: make(chan Event, maxEvents), waiting: make(map[uint64]chan reply), late: make(map[uint64]bool), patience: 1}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)

	// This bounds the whole handshake, also one that is answered byte by byte.
	stop := context.AfterFunc(ctx, func() { m.fail(ErrTimeout) })
	defer stop()
	if err := m.greeting(lines); err != nil {
		m.fail(err)
		return nil, fmt.Errorf("qmp greeting: %w", m.Err())
	}
	go m.read(lines)
	var enable any
	if m.oob {
		enable = map[string][]string{"enable": {"oob"}}
	}
	if err := m.Execute("qmp_capabilities", enable, nil); err != nil {
		m.Disconnect()
		return nil, err
	}
	return m, nil
}

// connect dials path, and waits while the socket's queue of connections is full.
func connect(ctx context.Context, path string) (*net.UnixConn, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ErrTimeout
		}
	}
}

// greeting reads QEMU's greeting. What QEMU emits between accepting a connection and greeting
// it, such as RESUME when it starts, comes first; it is not for a client that has not
// negotiated yet (QEMU: monitor_qapi_event_emit), and who connects asks for the state anyway.
func (m *Monitor) greeting(lines *bufio.Scanner) error {
	for lines.Scan() {
		var hello struct {
			Event string
			QMP   *struct {
				Version      qmp.Version `json:"version"`
				Capabilities []string
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &hello); err != nil {
			return fmt.Errorf("not QMP: %w", err)
		}
		if hello.QMP != nil {
			m.version = hello.QMP.Version
			m.oob = slices.Contains(hello.QMP.Capabilities, "oob")
			return nil
		}
		if hello.Event == "" {
			return fmt.Errorf("not QMP: %.100q", lines.Bytes())
		}
	}
	return scanErr(lines)
}

func scanErr(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return io.EOF
}

// Version returns QEMU's version as the monitor's greeting has it, "7.2.0".
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

// line handles one line. The buffer belongs to the scanner, so what is kept is copied.
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
	if l.ID != nil && m.late[*l.ID] {
		delete(m.late, *l.ID)
		return nil
	}
	if l.ID == nil || m.waiting[*l.ID] == nil {
		return errors.New("a reply to no command that was sent")
	}
	m.unanswered = 0
	r := reply{line: bytes.Clone(b)}
	if l.Error != nil {
		r.err = &Error{Class: l.Error.Class, Description: l.Error.Desc}
	}
	m.waiting[*l.ID] <- r
	delete(m.waiting, *l.ID)
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
	for _, w := range m.waiting {
		close(w)
	}
	clear(m.waiting)
}

// BePatient keeps the connection open where a command is not answered in time: the command fails,
// and QEMU may carry it out later. The n-th in a row closes it. So no event is missed of
// a QEMU that stands still for a while.
func (m *Monitor) BePatient(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.patience = n
}

// expired: the command id was not answered in time.
func (m *Monitor) expired(id uint64) {
	m.mu.Lock()
	answer, why := m.waiting[id], ErrTimeout
	if answer == nil {
		m.mu.Unlock()
		return // it was just now
	}
	if m.unanswered++; m.unanswered < m.patience {
		delete(m.waiting, id)
		m.late[id] = true
		m.mu.Unlock()
		close(answer)
		return
	}
	if m.patience > 1 {
		why = ErrHangs
	}
	m.mu.Unlock()
	m.fail(why)
}

// Err returns why the connection was closed; nil: it is open.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Execute runs a command and decodes what it returned into result, when that
// is not nil.
func (m *Monitor) Execute(command string, args, result any) error {
	return m.ExecuteWithin(m.timeout, command, args, result)
}

// ExecuteWithin is Execute with a timeout of its own, for a command that may
// wait for the guest's I/O.
func (m *Monitor) ExecuteWithin(timeout time.Duration, command string, args, result any) error {
	out, err := m.command(timeout, command, args)
	if err != nil {
		return err
	}
	return decode(command, out, result)
}

// PassFile passes QEMU an open file under a name, by which commands that take a
// descriptor may refer to it.
func (m *Monitor) PassFile(name string, f *os.File) error {
	// QEMU keeps the last descriptor it received until getfd names it.
	if _, _, err := m.conn.WriteMsgUnix([]byte("\n"), syscall.UnixRights(int(f.Fd())), nil); err != nil {
		return fmt.Errorf("qmp getfd: %w", err)
	}
	return m.Execute("getfd", map[string]string{"fdname": name}, nil)
}

func decode(command string, line []byte, result any) error {
	if result == nil {
		return nil
	}
	r := struct{ Return any }{result}
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("qmp %s: reply: %w", command, err)
	}
	return nil
}

// request is a command as it is sent.
type request struct {
	Execute string `json:"execute,omitempty"`
	ExecOOB string `json:"exec-oob,omitempty"`
	Args    any    `json:"arguments,omitempty"`
	ID      uint64 `json:"id"`
}

// command runs a command after the one under way and returns the whole line of the reply.
func (m *Monitor) command(timeout time.Duration, command string, args any) ([]byte, error) {
	m.run.Lock()
	defer m.run.Unlock()
	return m.send(timeout, command, request{Execute: command, Args: args})
}

// outOfBand runs a command that QEMU allows out of band, without waiting for the one under
// way, which may hang.
func (m *Monitor) outOfBand(command string, args, result any) error {
	if !m.oob {
		return m.Execute(command, args, result)
	}
	out, err := m.send(m.timeout, command, request{ExecOOB: command, Args: args})
	if err != nil {
		return err
	}
	return decode(command, out, result)
}

func (m *Monitor) send(timeout time.Duration, command string, r request) ([]byte, error) {
	m.mu.Lock()
	if m.err != nil {
		defer m.mu.Unlock()
		return nil, fmt.Errorf("qmp %s: %w", command, m.err)
	}
	m.lastID++
	r.ID = m.lastID
	answer := make(chan reply, 1)
	m.waiting[r.ID] = answer
	m.mu.Unlock()

	b, err := json.Marshal(r)
	if err != nil {
		m.mu.Lock()
		delete(m.waiting, r.ID)
		m.mu.Unlock()
		return nil, fmt.Errorf("qmp %s: arguments: %w", command, err)
	}
	// The timer bounds the write too, where it closes the socket. Else that has room for so few commands.
	expired := time.AfterFunc(timeout, func() { m.expired(r.ID) })
	defer expired.Stop()
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		m.fail(err)
	}
	got, ok := <-answer
	if !ok {
		err := m.Err()
		if err == nil {
			err = ErrTimeout
		}
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	if got.err != nil {
		got.err.Command = command
		return nil, got.err
	}
	return got.line, nil
}

// Run runs a command given as JSON and returns the whole reply. It is part of go-qemu's
// interface.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	var c struct {
		Execute   string
		Arguments json.RawMessage
	}
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, fmt.Errorf("qmp command: %w", err)
	}
	if c.Arguments == nil {
		return m.command(m.timeout, c.Execute, nil)
	}
	return m.command(m.timeout, c.Execute, c.Arguments)
}

// Conn is the connection itself, which tells whose monitor it is. Nobody else reads or
// writes on it.
func (m *Monitor) Conn() *net.UnixConn { return m.conn }

// Connect does nothing, since [Dial] has connected. It is part of go-qemu's interface.
func (m *Monitor) Connect() error { return m.Err() }

// Disconnect closes the connection.
func (m *Monitor) Disconnect() error {
	m.fail(net.ErrClosed)
	return nil
}

// Events returns the channel of QEMU's events, which is closed with the connection.
// Events come whether commands run or not. If the reader lets too many wait, the
// connection is closed: a lost event would be worse.
func (m *Monitor) Events(context.Context) (<-chan Event, error) { return m.events, nil }
