// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// answers are those that the recorded server gives one after another, in bytes: mostly
// small ones, as of a service, and now and then a file.
var answers = slices.Concat(
	slices.Repeat([]int{180, 700, 180, 3000, 400, 180, 1200, 6000, 180, 20_000}, 10),
	[]int{150_000, 180, 1 << 20},
)

// record transfers the answers over loopback in the calling thread's network namespace,
// and returns what of the server's output carries data, as its stack cut it.
func record() ([]packet, error) {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		// The size of an Ethernet frame, so that a GSO train has segments of one.
		err = errors.Join(netlink.LinkSetMTU(lo, 1500), netlink.LinkSetUp(lo))
	}
	if err != nil {
		return nil, fmt.Errorf("prepare loopback: %w", err)
	}
	fd, err := capture(lo.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("packet socket on loopback: %w", err)
	}
	defer unix.Close(fd)
	port, err := transfer()
	if err != nil {
		return nil, fmt.Errorf("the transfer to record: %w", err)
	}
	var packets []packet
	var next uint32
	for buf := make([]byte, vnetLen+1<<16); ; {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read what was recorded: %w", err)
		}
		if p, seq, ok := dissect(buf[:n], port); ok && (seq == next || packets == nil) {
			packets = append(packets, p)
			next = seq + uint32(len(p.payload))
		}
	}
	total := 0
	for _, p := range packets {
		total += len(p.payload)
	}
	for _, n := range answers {
		total -= n
	}
	if total != 0 {
		return nil, fmt.Errorf("the recorded transfer has %d bytes too many (less than 0: too few)", total)
	}
	return packets, nil
}

// capture opens a packet socket that keeps what arrives, with virtio-net headers.
func capture(index int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1), // loopback shows each frame twice
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: index}),
	)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// transfer has a client ask a server for each answer. It returns the server's port.
func transfer() (port uint16, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	// The sockets are made by this thread; so they are in its namespace.
	client, err := net.DialTimeout("tcp4", l.Addr().String(), patience)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		return 0, err
	}
	defer server.Close()
	for _, c := range []net.Conn{client, server} {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return 0, err
		}
	}
	served := make(chan error, 1)
	go func() {
		request, body := make([]byte, 100), bytes.Repeat([]byte("lockstep"), 1<<17)
		for _, n := range answers {
			if _, err := io.ReadFull(server, request); err != nil {
				served <- err
				return
			}
			if _, err := server.Write(body[:n]); err != nil {
				served <- err
				return
			}
		}
		served <- nil
	}()
	for _, n := range answers {
		if _, err = client.Write(make([]byte, 100)); err != nil {
			break
		}
		if _, err = io.CopyN(io.Discard, client, int64(n)); err != nil {
			break
		}
	}
	return uint16(l.Addr().(*net.TCPAddr).Port), errors.Join(err, <-served)
}

// dissect finds in a captured frame the server's data.
func dissect(b []byte, port uint16) (p packet, seq uint32, ok bool) {
	if len(b) < tcpAt+tcpLen || b[ipAt+9] != unix.IPPROTO_TCP || binary.BigEndian.Uint16(b[tcpAt:]) != port {
		return packet{}, 0, false
	}
	t := b[tcpAt:]
	n := int(t[12] >> 4 * 4)
	end := ipAt + int(binary.BigEndian.Uint16(b[ipAt+2:]))
	if end > len(b) || tcpAt+n >= end {
		return packet{}, 0, false
	}
	p = packet{opts: bytes.Clone(t[tcpLen:n]), payload: bytes.Clone(b[tcpAt+n : end])}
	if b[1] != unix.VIRTIO_NET_HDR_GSO_NONE {
		p.gso = binary.NativeEndian.Uint16(b[4:])
	}
	return p, binary.BigEndian.Uint32(t[4:]), true
}
