// SPDX-License-Identifier: Apache-2.0

package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
	"github.com/lockstep-ft/lockstep/control/qmptest"
)

// short is a deadline that is meant to pass, long one that is not.
const (
	short = 50 * time.Millisecond
	long  = 30 * time.Second
)

func server(t *testing.T) *qmptest.Server {
	t.Helper()
	s, err := qmptest.Listen(filepath.Join(t.TempDir(), "qmp"), "primary")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func dial(t *testing.T, s *qmptest.Server, timeout time.Duration) *qmp.Monitor {
	t.Helper()
	m, err := qmp.Dial(t.Context(), s.Path(), timeout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Disconnect() })
	return m
}

func TestCommands(t *testing.T) {
	s := server(t)
	m := dial(t, s, long)
	if m.Version() != "7.2.22" {
		t.Errorf("version %q", m.Version())
	}
	if running, state, err := m.Status(); err != nil || !running || state != "running" {
		t.Errorf("status: %t, %q, %v", running, state, err)
	}
	if mode, err := m.COLO(); err != nil || mode != "primary" {
		t.Errorf("colo: %q, %v", mode, err)
	}
	if err := m.Checkpoint(); err != nil {
		t.Error(err)
	}
	reqs := s.Requests()
	last := reqs[len(reqs)-1]
	var args map[string]int64
	if err := json.Unmarshal(last.Arguments, &args); err != nil {
		t.Fatal(err)
	}
	if last.Execute != "migrate-set-parameters" || len(args) != 1 || args["x-checkpoint-delay"] != 1<<32-1 {
		t.Errorf("checkpoint asked for by %s %s", last.Execute, last.Arguments)
	}

	err := m.Execute("yank", nil, nil)
	var refused *qmp.Error
	if !errors.As(err, &refused) {
		t.Fatalf("yank: %v", err)
	}
	want := qmp.Error{Command: "yank", Class: "CommandNotFound", Description: "The command yank has not been found"}
	if *refused != want {
		t.Errorf("got %+v, want %+v", *refused, want)
	}
	if m.Err() != nil {
		t.Errorf("a refusal closed the monitor: %v", m.Err())
	}
}

func TestEventsComeWhileCommandsRun(t *testing.T) {
	s := server(t)
	m := dial(t, s, long)
	events, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Nobody reads events meanwhile: commands are answered all the same.
	at := time.UnixMicro(1_700_000_000_123_456)
	for range 100 {
		s.Event("STOP", at)
		if _, _, err := m.Status(); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		e := <-events
		if e.Event != "STOP" || !qmp.Time(e).Equal(at) {
			t.Fatalf("got %s at %v", e.Event, qmp.Time(e))
		}
	}
}

// QEMU may send an event to a client that it has just accepted and not greeted yet.
func TestEventBeforeTheGreeting(t *testing.T) {
	s := server(t)
	s.SetFault(qmptest.Early, 0)
	m := dial(t, s, long)
	if _, _, err := m.Status(); err != nil {
		t.Error(err)
	}
}

func TestTooManyUnreadEvents(t *testing.T) {
	s := server(t)
	m := dial(t, s, long)
	for m.Err() == nil {
		s.Event("BLOCK_JOB_COMPLETED", time.Now())
	}
	if !strings.Contains(m.Err().Error(), "events wait") {
		t.Errorf("closed by %v", m.Err())
	}
}

// Whatever QEMU does, a command ends, the monitor is closed and its events too.
func TestFaults(t *testing.T) {
	for _, tt := range []struct {
		name    string
		fault   qmptest.Fault
		timeout time.Duration
		want    string
	}{
		{"silent", qmptest.Silent, short, qmp.ErrTimeout.Error()},
		{"slow", qmptest.Slow, short, qmp.ErrTimeout.Error()},
		{"garbage", qmptest.Garbage, long, "not QMP"},
		{"huge", qmptest.Huge, long, "token too long"},
		{"hang up", qmptest.HangUp, long, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := server(t)
			m := dial(t, s, tt.timeout)
			s.SetFault(tt.fault, 4*short)
			_, _, err := m.Status()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if m.Err() == nil {
				t.Error("the monitor stayed open")
			}
			if err := m.Checkpoint(); err == nil {
				t.Error("a closed monitor took a command")
			}
			events, _ := m.Events(context.Background())
			for range events {
				t.Error("an event from nowhere")
			}
			s.SetFault(qmptest.None, 0)
			if m := dial(t, s, long); m.Err() != nil {
				t.Errorf("reconnected: %v", m.Err())
			}
		})
	}
}

// A patient owner's connection outlasts commands that are not answered in time, and the replies that come late. Its
// events are not lost. Several in a row close it.
func TestPatience(t *testing.T) {
	s := server(t)
	m := dial(t, s, short)
	m.BePatient(3)
	unanswered := func() {
		t.Helper()
		if _, _, err := m.Status(); !errors.Is(err, qmp.ErrTimeout) {
			t.Errorf("got %v", err)
		}
	}
	for range 2 { // each time so many
		s.SetFault(qmptest.Slow, 2*short)
		unanswered()
		unanswered()
		s.SetFault(qmptest.None, 0)
		s.Event("STOP", time.Now())
		if err := m.ExecuteWithin(long, "query-status", nil, nil); err != nil { // the late replies are in front of its
			t.Fatal(err)
		}
		events, _ := m.Events(t.Context())
		if e := <-events; e.Event != "STOP" {
			t.Errorf("event %+v", e)
		}
	}
	s.SetFault(qmptest.Silent, 0)
	unanswered()
	unanswered()
	if m.Err() != nil {
		t.Errorf("closed by %v", m.Err())
	}
	unanswered()
	if !errors.Is(m.Err(), qmp.ErrHangs) {
		t.Errorf("closed by %v", m.Err())
	}
}

func TestUnaskedReply(t *testing.T) {
	s := server(t)
	m := dial(t, s, long)
	events, _ := m.Events(t.Context())
	s.Raw(`{"return": {}}` + "\r\n")
	for range events {
		t.Error("an event from nowhere")
	}
	if err := m.Err(); err == nil || !strings.Contains(err.Error(), "no command that was sent") {
		t.Errorf("closed by %v", err)
	}
}

func TestHandshakeFaults(t *testing.T) {
	s := server(t)
	s.SetFault(qmptest.Silent, 0)
	if _, err := qmp.Dial(t.Context(), s.Path(), short); !errors.Is(err, qmp.ErrTimeout) {
		t.Errorf("silent: %v", err)
	}
	s.SetFault(qmptest.HangUp, 0)
	if _, err := qmp.Dial(t.Context(), s.Path(), long); err == nil {
		t.Error("hang up: no error")
	}

	for name, greeting := range map[string]string{
		"http": "HTTP/1.1 400 Bad Request\r\n\r\n", "other json": "{}\n", "endless": strings.Repeat("x", 8<<20),
	} {
		path := filepath.Join(t.TempDir(), "qmp")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte(greeting))
			conn.Close()
		}()
		if _, err := qmp.Dial(t.Context(), path, long); err == nil {
			t.Errorf("%s: no error", name)
		}
		ln.Close()
		<-served
	}
	if _, err := qmp.Dial(t.Context(), filepath.Join(t.TempDir(), "nothing"), long); err == nil {
		t.Error("absent: no error")
	}
}
