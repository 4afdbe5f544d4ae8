// SPDX-License-Identifier: Apache-2.0

package qmp_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// FuzzReader: whatever stands in place of the answer to a command, the command ends, the
// monitor closes when its connection does, and packets' boundaries do not matter.
func FuzzReader(f *testing.F) {
	path := filepath.Join(f.TempDir(), "qmp")
	f.Fuzz(func(t *testing.T, answer []byte, piece uint8) {
		if len(answer) > 8<<10 {
			return // more events than are queued end the monitor, and when is a race
		}
		whole := ask(t, path, answer, len(answer))
		if pieces := ask(t, path, answer, int(piece)); !reflect.DeepEqual(whole, pieces) {
			t.Errorf("at once: %+v\nin pieces of %d bytes: %+v", whole, piece, pieces)
		}
	})
}

// outcome is what became of a command.
type outcome struct {
	Status, Err, Closed string
	Events              []qmp.Event
}

// ask sends query-status to a QEMU that answers as told, in pieces of so many bytes (0 stands
// for 1), and hangs up.
func ask(t *testing.T, path string, answer []byte, piece int) (o outcome) {
	t.Helper()
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		fmt.Fprint(conn, `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}`+"\n")
		if _, err = in.ReadString('\n'); err == nil {
			fmt.Fprint(conn, `{"return": {}, "id": 1}`+"\n")
			_, err = in.ReadString('\n')
		}
		for rest := answer; len(rest) > 0 && err == nil; {
			n := min(max(piece, 1), len(rest))
			if _, err := conn.Write(rest[:n]); err != nil {
				break // the monitor has closed
			}
			rest = rest[n:]
		}
		served <- err
	}()
	m, err := qmp.Dial(t.Context(), path, long)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Disconnect()
	running, state, err := m.Status()
	o.Status, o.Err = fmt.Sprint(running, state), fmt.Sprint(err)
	events, _ := m.Events(t.Context())
	for e := range events {
		o.Events = append(o.Events, e)
	}
	o.Closed = fmt.Sprint(m.Err())
	if err := <-served; err != nil {
		t.Error(err)
	}
	return o
}
