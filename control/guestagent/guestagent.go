// SPDX-License-Identifier: Apache-2.0

// Package guestagent reads and sets a guest's clock by QEMU's guest agent (qemu-ga), over the socket that QEMU has for
// the agent's end in the guest. The guest is not trusted, and may not answer: what it sends is bounded, and everything
// ends with its context.
package guestagent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

// maxAnswer bounds what is read of an agent.
const maxAnswer = 64 << 10

// Agent is a connection to an agent that has answered.
type Agent struct {
	conn net.Conn
	in   *bufio.Reader
	stop func() bool
}

// Dial connects to the agent behind the socket at path. The connection is for a few commands, until ctx ends: while it
// is there nobody else can use the socket, and the guest sees that it is.
func Dial(ctx context.Context, path string) (*Agent, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("guest agent: %w", err)
	}
	a := &Agent{conn: conn, in: bufio.NewReader(io.LimitReader(conn, maxAnswer))}
	a.stop = context.AfterFunc(ctx, func() { conn.Close() })
	if err := a.sync(); err != nil {
		a.Close()
		if ctx.Err() != nil {
			err = errors.New("no answer in time: is qemu-guest-agent running in the guest?")
		}
		return nil, fmt.Errorf("guest agent: %w", err)
	}
	return a, nil
}

// Close ends the connection.
func (a *Agent) Close() {
	a.stop()
	a.conn.Close()
}

// delimiter is no part of JSON. The agent drops what it has of a command when it reads one, and sends one before
// its answer to guest-sync-delimited.
const delimiter = 0xff

// sync passes over what the agent still sends to whoever asked before.
func (a *Agent) sync() error {
	if _, err := a.conn.Write([]byte{delimiter}); err != nil {
		return err
	}
	id := rand.Int64N(1 << 53) // JSON's numbers
	if err := a.send("guest-sync-delimited", map[string]int64{"id": id}); err != nil {
		return err
	}
	for {
		if _, err := a.in.ReadBytes(delimiter); err != nil {
			return err
		}
		var got int64
		if err := a.receive("guest-sync-delimited", &got); err != nil {
			return err
		}
		if got == id {
			return nil
		}
	}
}

// Time is the guest's clock at some moment during the call.
func (a *Agent) Time() (time.Time, error) {
	var ns int64
	if err := a.call("guest-get-time", nil, &ns); err != nil {
		return time.Time{}, err
	}
	return time.Unix(0, ns), nil
}

// SetTime sets the guest's clock. After an error it may be set, or be set later.
func (a *Agent) SetTime(t time.Time) error {
	return a.call("guest-set-time", map[string]int64{"time": t.UnixNano()}, nil)
}

func (a *Agent) call(command string, args, result any) error {
	err := a.send(command, args)
	if err == nil {
		err = a.receive(command, result)
	}
	if err != nil {
		return fmt.Errorf("guest agent: %w", err)
	}
	return nil
}

func (a *Agent) send(command string, args any) error {
	b, err := json.Marshal(struct {
		Execute string `json:"execute"`
		Args    any    `json:"arguments,omitempty"`
	}{command, args})
	if err == nil {
		_, err = a.conn.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

func (a *Agent) receive(command string, result any) error {
	line, err := a.in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	var r struct {
		Return json.RawMessage
		Error  *struct{ Class, Desc string }
	}
	switch err := json.Unmarshal(bytes.TrimSpace(line), &r); {
	case err != nil:
		return fmt.Errorf("%s: the answer is none: %w", command, err)
	case r.Error != nil:
		return fmt.Errorf("%s: %q (%q)", command, r.Error.Desc, r.Error.Class)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fmt.Errorf("%s: the answer is none: %w", command, err)
	}
	return nil
}
