// SPDX-License-Identifier: Apache-2.0

package loadertest

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Transmitters notes at which port the guest's frames come in, by the kernel's time of
// arrival.
type Transmitters struct {
	mu     sync.Mutex
	frames []sighting
}

type sighting struct {
	at   time.Time
	port string
	text string
}

// Turn is a time in which one port alone sent them.
type Turn struct {
	Port   string
	Begin  time.Time
	End    time.Time
	Frames int
	First  string // its first frame
}

func (t Turn) String() string {
	return fmt.Sprintf("%s %s to %s: %d frames, first %s", t.Port, t.Begin.Format("05.000"), t.End.Format("05.000"), t.Frames, t.First)
}

// WatchTransmitters watches the ports of namespace ns.
func WatchTransmitters(t testing.TB, ns string, ports ...string) *Transmitters {
	t.Helper()
	guest, err := net.ParseMAC(GuestMAC)
	if err != nil {
		t.Fatal(err)
	}
	s := new(Transmitters)
	for _, port := range ports {
		fd := packetSocket(t, ns, Index(t, ns, port))
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
			t.Fatalf("packet socket: %v", err)
		}
		receive(t, fd, false, func(frame, oob []byte) {
			if len(frame) < 14 || !bytes.Equal(frame[6:12], guest) {
				return
			}
			x := sighting{at: stamp(oob), port: port, text: fmt.Sprintf("%x", frame[12:min(len(frame), 54)])}
			s.mu.Lock()
			s.frames = append(s.frames, x)
			s.mu.Unlock()
		}, func() {})
	}
	return s
}

func stamp(oob []byte) time.Time {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err == nil {
		for _, m := range msgs {
			if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
				return time.Unix((*unix.Timespec)(unsafe.Pointer(&m.Data[0])).Unix())
			}
		}
	}
	panic("a frame without its time")
}

// Turns are those so far: as many as the guest changed its host, plus one. Two hosts
// that transmit at the same time make more.
func (s *Transmitters) Turns() []Turn {
	s.mu.Lock()
	frames := slices.Clone(s.frames)
	s.mu.Unlock()
	slices.SortStableFunc(frames, func(a, b sighting) int { return a.at.Compare(b.at) })
	var turns []Turn
	for _, f := range frames {
		if n := len(turns); n > 0 && turns[n-1].Port == f.port {
			turns[n-1].End = f.at
			turns[n-1].Frames++
			continue
		}
		turns = append(turns, Turn{Port: f.port, Begin: f.at, End: f.at, Frames: 1, First: f.text})
	}
	return turns
}
