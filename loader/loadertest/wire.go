// SPDX-License-Identifier: Apache-2.0

package loadertest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const ethAll = 0x0003

// Wire is a packet socket on a device: it sends frames as they are and keeps
// those that come in, VLAN tags in their place.
type Wire struct {
	fd, index int

	mu     sync.Mutex
	frames [][]byte
}

// OpenWire opens a Wire on a device of namespace ns. It is closed with the test.
func OpenWire(t testing.TB, ns, device string) *Wire {
	t.Helper()
	return openWire(t, ns, device, false)
}

// OpenSent is a Wire whose frames are those that the device's own host sends.
func OpenSent(t testing.TB, ns, device string) *Wire {
	t.Helper()
	return openWire(t, ns, device, true)
}

func openWire(t testing.TB, ns, device string, sent bool) *Wire {
	t.Helper()
	w := &Wire{index: Index(t, ns, device)}
	w.fd = packetSocket(t, ns, w.index)
	if err := unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	receive(t, w.fd, sent, func(frame, oob []byte) {
		f := WithTag(bytes.Clone(frame), oob)
		w.mu.Lock()
		w.frames = append(w.frames, f)
		w.mu.Unlock()
	}, func() {})
	return w
}

// packetSocket is a raw one that takes every frame of a device.
func packetSocket(t testing.TB, ns string, index int) (fd int) {
	t.Helper()
	In(t, ns, func() {
		var err error
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	})
	tv := unix.Timeval{Usec: 50_000}
	for _, err := range []error{
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ethAll << 8, Ifindex: index}),
	} {
		if err != nil {
			t.Fatalf("packet socket: %v", err)
		}
	}
	return fd
}

// receive calls f for every frame that comes in, or that is sent, until the test ends;
// then it calls last and closes the socket.
func receive(t testing.TB, fd int, sent bool, f func(frame, oob []byte), last func()) {
	done := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		buf, oob := make([]byte, 1<<17), make([]byte, 256)
		for {
			select {
			case <-done:
				return
			default:
			}
			n, noob, _, from, err := unix.Recvmsg(fd, buf, oob, 0)
			if err != nil {
				continue // the time-out, which lets done be seen
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && (ll.Pkttype == unix.PACKET_OUTGOING) == sent {
				f(buf[:n], oob[:noob])
			}
		}
	})
	t.Cleanup(func() {
		close(done)
		reader.Wait()
		last()
		unix.Close(fd)
	})
}

// WithTag puts back a VLAN tag that the kernel reported beside the frame.
func WithTag(frame, oob []byte) []byte {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(frame) < 12 {
		return frame
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < int(unsafe.Sizeof(unix.TpacketAuxdata{})) {
			continue
		}
		aux := (*unix.TpacketAuxdata)(unsafe.Pointer(&m.Data[0]))
		if aux.Status&unix.TP_STATUS_VLAN_VALID == 0 {
			continue
		}
		tpid := uint16(unix.ETH_P_8021Q)
		if aux.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
			tpid = aux.Vlan_tpid
		}
		tag := binary.BigEndian.AppendUint16(nil, tpid)
		tag = binary.BigEndian.AppendUint16(tag, aux.Vlan_tci)
		frame = slices.Insert(frame, 12, tag...)
	}
	return frame
}

// Send sends a frame from the Wire's device.
func (w *Wire) Send(t testing.TB, frame []byte) {
	t.Helper()
	for {
		switch err := unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.index}); {
		case err == nil:
			return
		case !errors.Is(err, unix.ENOBUFS): // the receiver's queue is full; it drains
			t.Fatalf("send a frame of %d bytes: %v", len(frame), err)
		}
		runtime.Gosched()
	}
}

// Frames are those that came in since the last Forget and pass; nil: all.
func (w *Wire) Frames(pass func([]byte) bool) (out [][]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.frames {
		if pass == nil || pass(f) {
			out = append(out, f)
		}
	}
	return out
}

// Count is the number of frames that hold text.
func (w *Wire) Count(text string) int {
	return len(w.Frames(func(f []byte) bool { return bytes.Contains(f, []byte(text)) }))
}

// Forget drops the frames that came in so far.
func (w *Wire) Forget() {
	w.mu.Lock()
	w.frames = nil
	w.mu.Unlock()
}
