// SPDX-License-Identifier: Apache-2.0

// Package workload is what the guests' service and the client do while the benchmark
// measures. Both are processes of their own with one thread, which wait by raw system calls,
// so that the work of Go's scheduler is not measured. What the service sends depends on
// nothing but what the client has sent.
package workload

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Do is a kind of job.
type Do byte

// Kinds of job.
const (
	Echo    Do = 'e' // requests and responses, one at a time on each connection
	Connect Do = 'c' // connect, one exchange, close, one after the other
	Source  Do = 's' // the guest sends
	Fetch   Do = 'f' // connect, the guest sends FetchSize bytes, close, one after the other
	Sink    Do = 'k' // the guest receives, and sends one byte at the end
	UDP     Do = 'u' // datagrams that the guest sends back, several under way
	Hold    Do = 'h' // connect, one exchange; the connection stays for the jobs that follow
	Pick    Do = 'p' // exchanges on held connections, each on one that is chosen at random
	Drop    Do = 'd' // reset all held connections
	HTTP    Do = 'G' // as Fetch, by GET
	Differ  Do = 'x' // as Echo, but some of the responses are no other guest's
	// Pipeline: several requests under way on each connection, each of which the guest answers by
	// writes of its own, a response of AnswerSize bytes, without TCP_NODELAY.
	Pipeline Do = 'q'
	Dirty    Do = 'm' // from now on the guest writes to N bytes of its memory a second, page by page
)

// Job is one measurement.
type Job struct {
	Do    Do
	Conns int           // connections at the same time; UDP: datagrams under way; Hold: being opened; Pick: exchanges under way
	N     int           // Echo, Connect, Fetch, HTTP, Differ, UDP, Pick: exchanges; Hold: connections; Source, Sink: bytes; of all connections together
	Size  int           // bytes of a request and response, of a datagram, of each of the guest's writes
	Share int           // Differ: percent of the exchanges
	Under int           // Pipeline: requests under way on each connection
	Nagle bool          // Pipeline: the client has no TCP_NODELAY either
	Piece int           // Pipeline: bytes of each of the guest's writes; 0: a response is one
	Stall time.Duration // the job has stalled when there was no progress for so long
	Limit time.Duration // the job ends then, with what is done
}

// Result is what came of a job.
type Result struct {
	Done    int           // as Job.N
	Lost    int           // datagrams; Hold: connections that were given up
	Wall    time.Duration // from the first request to the last response
	Took    []int64       // ns of each exchange
	Stalled string        // why it ended early, as "no progress for 5s"
}

// Port is where the service listens; where there are more, each further one has the next.
const Port = 7000

const chunk = 1 << 17 // bytes of a bulk read or write

// Message is the size of requests, responses, datagrams and small writes in bytes.
const Message = 100

// FetchSize is how many bytes the guest sends in each exchange of [Fetch] and [HTTP].
const FetchSize = 1 << 20

// AnswerSize is the size of a response of [Pipeline] in bytes.
const AnswerSize = 96

// The client begins a connection with a head: the job, the size of writes, bytes to transfer.
const headLen = 1 + 4 + 8

func head(j *Job, bytes int) []byte {
	what := j.Do
	if what == Fetch {
		what = Source
	}
	b := binary.BigEndian.AppendUint32([]byte{byte(what)}, uint32(j.Size))
	return binary.BigEndian.AppendUint64(b, uint64(bytes))
}

// get is a request for a page of so many bytes.
const get = "GET /%d HTTP/1.0\r\n\r\n"

// page is what comes before a page of so many bytes: no date, which would differ between the guests.
func page(bytes int) []byte {
	return fmt.Appendf(nil, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n", bytes)
}

// A request that begins so has a response with the guest's clock in it: eight bytes from clockAt on.
const (
	differs = 1
	clockAt = 8
)

// Memory that the guest writes to, in bytes: less than a small guest has.
const (
	dirtied  = 32 << 20
	pageSize = 4096
)

// pattern is two chunks, so that a chunk can begin anywhere in the first.
func pattern() []byte {
	b := make([]byte, 2*chunk)
	for i := range b {
		at := i % chunk
		b[i] = byte(at*at>>5 + at)
	}
	return b
}

// process prepares this process for measuring.
func process() {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(512 << 20) // it collects then
}

// poller waits for sockets.
type poller struct {
	fd     int
	events [128]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll instance: %w", err)
	}
	return &poller{fd: fd}, nil
}

// watch has wait return fd when it is ready for events; op is EPOLL_CTL_ADD or _MOD.
func (p *poller) watch(op, fd int, events uint32) error {
	if err := unix.EpollCtl(p.fd, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("watch a socket: %w", err)
	}
	return nil
}

// wait returns what is ready, or nothing after the timeout.
func (p *poller) wait(timeout time.Duration) ([]unix.EpollEvent, error) {
	for end := time.Now().Add(timeout); ; timeout = max(time.Until(end), 0) { // signals, as the Go runtime's, are no progress
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(timeout.Milliseconds()), 0, 0)
		switch errno {
		case 0:
			return p.events[:n], nil
		case unix.EINTR:
		default:
			return nil, fmt.Errorf("wait for a socket: %w", errno)
		}
	}
}

// tcp makes a socket that does not block and sends small writes at once.
func tcp() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	return fd, nil
}

// delay has a socket wait with small writes as Nagle's algorithm does.
func delay(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 0) }

// reset has a connection end with a reset, so that nothing of it is sent later.
func reset(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// abort closes a connection with a reset.
func abort(fd int) {
	_ = reset(fd) // or it is closed as any other
	unix.Close(fd)
}
