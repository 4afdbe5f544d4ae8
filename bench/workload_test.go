// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Guests and client are processes of their own. They make raw system calls, so that the
// work of Go's scheduler is not measured.

const (
	port    = 7000
	message = 100     // bytes of a request and of a response
	chunk   = 1 << 17 // bytes of a bulk read or write
)

// The client begins a connection with one of these and a count, of exchanges or bytes.
const (
	doEcho   = 'e'
	doSource = 's' // the guest sends
	doSink   = 'k' // the guest receives and sends one byte at the end
)

// job is one measurement: what to do, and the times that the client measured, in ns.
type job struct {
	Do       byte
	Warm, N  int // exchanges; bytes
	Wall     int64
	P50, P99 int64
}

// transfer reads or writes all of b. EOF is an error.
func transfer(call uintptr, fd int, b []byte) error {
	for len(b) > 0 {
		n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return errno
		case n == 0:
			return errors.New("the other side closed the connection")
		default:
			b = b[n:]
		}
	}
	return nil
}

func read(fd int, b []byte) error  { return transfer(unix.SYS_READ, fd, b) }
func write(fd int, b []byte) error { return transfer(unix.SYS_WRITE, fd, b) }

// bulk reads or writes n bytes.
func bulk(call func(int, []byte) error, fd, n int, b []byte) error {
	for ; n > 0; n -= min(n, len(b)) {
		if err := call(fd, b[:min(n, len(b))]); err != nil {
			return err
		}
	}
	return nil
}

func pattern() []byte {
	b := make([]byte, chunk)
	for i := range b {
		b[i] = byte(i*i>>5 + i)
	}
	return b
}

// process prepares this process for measuring.
func process() {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
}

// prepare sets the options of a connection, which fails when it makes no progress for
// that long.
func prepare(fd int, seconds int64) error {
	stuck := unix.Timeval{Sec: seconds}
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &stuck),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &stuck))
}

// serve is the guests' service: one connection after the other, until it is killed.
func serve() error {
	process()
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(l, &unix.SockaddrInet4{Port: port}), unix.Listen(l, 16)); err != nil {
		return err
	}
	fmt.Println("ready")
	b := pattern()
	for {
		fd, _, err := unix.Accept(l)
		if err != nil {
			return err
		}
		// In the baseline nothing is sent again to the SVM, so its connection may hang: it
		// gives up soon.
		if err := prepare(fd, 2); err != nil {
			return err
		}
		_ = answer(fd, b)
		unix.Close(fd)
	}
}

func answer(fd int, b []byte) error {
	var head [9]byte
	if err := read(fd, head[:]); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint64(head[1:]))
	switch head[0] {
	case doEcho:
		for range n {
			if err := read(fd, b[:message]); err != nil {
				return err
			}
			if err := write(fd, b[:message]); err != nil {
				return err
			}
		}
	case doSource:
		if err := bulk(write, fd, n, b); err != nil {
			return err
		}
	case doSink:
		if err := bulk(read, fd, n, b); err != nil {
			return err
		}
		if err := write(fd, b[:1]); err != nil {
			return err
		}
	}
	// The client closes first, so that TIME-WAIT is on its side.
	return read(fd, head[:1])
}

// runJob makes one measurement and prints it.
func runJob(arg string) error {
	process()
	var j job
	if err := json.Unmarshal([]byte(arg), &j); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := prepare(fd, 20); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte(net.ParseIP(lt.Guest4).To4())}); err != nil {
		return fmt.Errorf("connect to the guest: %w", err)
	}
	head := binary.BigEndian.AppendUint64([]byte{j.Do}, uint64(j.Warm+j.N))
	b := pattern()
	took := make([]int64, 0, j.N)
	if j.Do != doEcho {
		took = nil
	}
	began := time.Now()
	if err := write(fd, head); err != nil {
		return err
	}
	switch j.Do {
	case doEcho:
		for i := range j.Warm + j.N {
			if i == j.Warm {
				began = time.Now()
			}
			t := time.Now()
			if err := errors.Join(write(fd, b[:message]), read(fd, b[:message])); err != nil {
				return fmt.Errorf("exchange %d: %w", i, err)
			}
			if i >= j.Warm {
				took = append(took, int64(time.Since(t)))
			}
		}
	case doSource:
		err = bulk(read, fd, j.N, b)
	case doSink:
		err = errors.Join(bulk(write, fd, j.N, b), read(fd, b[:1]))
	}
	if err != nil {
		return err
	}
	j.Wall = int64(time.Since(began))
	if len(took) > 0 {
		slices.Sort(took)
		j.P50, j.P99 = took[len(took)/2], took[len(took)*99/100]
	}
	return json.NewEncoder(os.Stdout).Encode(&j)
}
