// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// FuzzCompare: whatever `qemu-img compare` prints, the progress lies between nothing and all,
// and how it is cut into reads does not matter.
func FuzzCompare(f *testing.F) {
	f.Fuzz(func(t *testing.T, out []byte) {
		var shares []float64
		whole := mismatch(bytes.NewReader(out), func(s float64) { shares = append(shares, s) })
		n := 0
		pieces := mismatch(iotest.OneByteReader(bytes.NewReader(out)), func(float64) { n++ })
		if whole != pieces || n != len(shares) || whole < -1 {
			t.Errorf("at once %d, %d shares; byte by byte %d, %d shares", whole, len(shares), pieces, n)
		}
		for _, s := range shares {
			if !(s >= 0 && s <= 1) {
				t.Errorf("%v of the whole is compared", s)
			}
		}
	})
}

// FuzzWords: nothing in a config, in a version or in what QEMU prints brings its readers down.
func FuzzWords(f *testing.F) {
	f.Fuzz(func(t *testing.T, word, text string) {
		for _, accel := range []string{"kvm", "tcg"} {
			_ = BrokenCOLO(ParseVersion(word), accel)
		}
		if name, known := Machine(word, text); known && !strings.Contains(text, strings.SplitN(name, ",", 2)[0]) {
			t.Errorf("machine %q is not in %q", name, text)
		}
		args := strings.Split(text, "\n")
		if i, err := CheckExtra(append(args, word)); err != nil && (i < 0 || i > len(args)) {
			t.Errorf("argument %d of %d: %v", i, len(args)+1, err)
		}
		if _, err := credential(word + ":" + text); err == nil && (word == "" || text == "") {
			t.Errorf("a user of %q and a group of %q", word, text)
		}
		var info imageInfo
		_ = json.Unmarshal([]byte(text), &info)
	})
}

// FuzzAnswers: a QEMU may answer each command with any JSON: whoever asked gets an error, or a
// value that makes sense. Each line of answers is what one command returns.
func FuzzAnswers(f *testing.F) {
	path := filepath.Join(f.TempDir(), "qmp")
	disks := []Disk{{ID: "disk0"}, {ID: "disk1"}}
	questions := []func(*testing.T, *qmp.Monitor) error{
		func(_ *testing.T, m *qmp.Monitor) error { _, err := Probe(m); return err },
		func(t *testing.T, m *qmp.Monitor) error {
			ids, err := Masked(m, disks)
			known(t, disks, ids)
			return err
		},
		func(t *testing.T, m *qmp.Monitor) error {
			ids, err := Unreplicated(m, disks)
			known(t, disks, ids)
			return err
		},
		func(_ *testing.T, m *qmp.Monitor) error { return detach(m, disks) },
		func(_ *testing.T, m *qmp.Monitor) error { return attach(m, disks) },
		func(_ *testing.T, m *qmp.Monitor) error { return CheckNICs(m, 1) },
		func(_ *testing.T, m *qmp.Monitor) error { _, err := BrokenDevices(m); return err },
		func(_ *testing.T, m *qmp.Monitor) error { _, err := nodes(m); return err },
		func(_ *testing.T, m *qmp.Monitor) error { return setLimits(m, Limits{AutoConverge: true}) },
		func(_ *testing.T, m *qmp.Monitor) error { return setCOLO(m, true) },
		func(_ *testing.T, m *qmp.Monitor) error { return cut(m, disks) },
		func(t *testing.T, m *qmp.Monitor) error {
			jobs, err := mirrors(m, disks)
			if err != nil {
				return err
			}
			var c diskCopy
			for i, j := range jobs {
				if j == nil || j.finished() {
					_ = mirrorFailed(&disks[i], j)
					continue
				}
				p, _ := c.look(time.Unix(int64(i), 0), &disks[i], j, Limits{})
				_ = p.String()
			}
			return nil
		},
		func(t *testing.T, m *qmp.Monitor) error {
			var c memoryCopy
			for i := range int64(2) {
				s, err := migration(m)
				if err != nil {
					return err
				}
				p, _, _ := c.look(time.Unix(i, 0), s, Limits{})
				_ = p.String()
			}
			return nil
		},
	}
	f.Fuzz(func(t *testing.T, question uint8, answers []byte) {
		m := played(t, path, answers)
		_ = questions[int(question)%len(questions)](t, m)
		m.Disconnect()
	})
}

func known(t *testing.T, disks []Disk, ids []string) {
	t.Helper()
	for _, id := range ids {
		if id != disks[0].ID && id != disks[1].ID {
			t.Errorf("there is no disk %q", id)
		}
	}
}

// played is the monitor of a QEMU that returns a line of answers for each command, and hangs
// up when there is none.
func played(t *testing.T, path string, answers []byte) *qmp.Monitor {
	t.Helper()
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}`)
		in := bufio.NewScanner(conn)
		for first := true; in.Scan(); first = false {
			answer := []byte("{}")
			if !first {
				if len(answers) == 0 {
					return
				}
				answer, answers, _ = bytes.Cut(answers, []byte("\n"))
			}
			var c struct{ ID uint64 }
			if json.Unmarshal(in.Bytes(), &c) == nil && c.ID != 0 {
				fmt.Fprintf(conn, `{"return": %s, "id": %d}`+"\n", answer, c.ID)
			}
		}
	}()
	m, err := qmp.Dial(t.Context(), path, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return m
}
