// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Lengths of headers, and where their fields are.
const (
	vnetLen = 10 // struct virtio_net_hdr
	ethLen  = 14
	ipLen   = 20
	tcpLen  = 20

	ipAt  = vnetLen + ethLen // in the head of a frame
	tcpAt = ipAt + ipLen
	seqAt = tcpAt + 4
)

// TCP flags.
const (
	flagSYN = 0x02
	flagPSH = 0x08
	flagACK = 0x10
)

const (
	guestPort = 80
	clientISN = 1 << 20
	optMSS    = 2
)

var (
	guestAddr, clientAddr = []byte{10, 77, 0, 2}, []byte{10, 77, 0, 1}
	guestMAC, clientMAC   = []byte{2, 0, 0, 0, 0x77, 2}, []byte{2, 0, 0, 0, 0x77, 1}
)

// packet is a segment of a stream, without what makes it one of a connection.
type packet struct {
	opts    []byte // TCP options
	payload []byte
	gso     uint16 // segment size of a GSO train; 0: it is none
}

// stream is what a guest sends on each of its connections: the packets, over and over.
type stream struct {
	name    string
	packets []packet
	window  int // frames that may be unreleased, of all connections
	batch   int // frames that are handed over at once when there is room
	acks    int // frames of a connection after which the client acknowledges
}

// Far below 1024, beyond which colo-compare drops frames of a connection.
const window = 512

const mss = 1460

// synthetic are the streams of frames of one size.
func synthetic() []*stream {
	one := func(name string, payload int, gso uint16, w int) *stream {
		b := make([]byte, payload)
		for i := range b {
			b[i] = byte('a' + i%26)
		}
		return newStream(name, []packet{{payload: b, gso: gso}}, w)
	}
	return []*stream{
		one("64 B", 64, 0, window),
		one("512 B", 512, 0, window),
		one("1460 B", mss, 0, window),
		one("GSO trains of 64 KB", 44*mss, mss, window/8),
	}
}

// newStream has a sixteenth of its window handed over at once, and an ACK of the client
// for twice as many frames.
func newStream(name string, p []packet, window int) *stream {
	return &stream{name: name, packets: p, window: window, batch: window / 16, acks: window / 8}
}

// segment describes a TCP segment between the guest and the client.
type segment struct {
	fromClient bool
	port       uint16 // the client's
	seq, ack   uint32
	flags      byte
	opts       []byte // a multiple of four bytes
	payload    int    // bytes
	gso        uint16
}

// head makes the segment's virtio-net, Ethernet, IPv4 and TCP headers. As a guest with
// checksum offload does, it leaves the TCP checksum to the device.
func (s *segment) head() []byte {
	tcp := tcpLen + len(s.opts)
	h := make([]byte, tcpAt+tcp)
	src, dst, from, to := guestAddr, clientAddr, guestMAC, clientMAC
	sport, dport := uint16(guestPort), s.port
	if s.fromClient {
		src, dst, from, to, sport, dport = dst, src, to, from, dport, sport
	}

	h[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	if s.gso != 0 {
		h[1] = unix.VIRTIO_NET_HDR_GSO_TCPV4
		binary.NativeEndian.PutUint16(h[2:], uint16(len(h)-vnetLen))
		binary.NativeEndian.PutUint16(h[4:], s.gso)
	}
	binary.NativeEndian.PutUint16(h[6:], tcpAt-vnetLen)
	binary.NativeEndian.PutUint16(h[8:], 16) // the checksum's place in the TCP header

	copy(h[vnetLen:], to)
	copy(h[vnetLen+6:], from)
	binary.BigEndian.PutUint16(h[vnetLen+12:], unix.ETH_P_IP)

	ip := h[ipAt:]
	ip[0] = 4<<4 | ipLen/4
	binary.BigEndian.PutUint16(ip[2:], uint16(ipLen+tcp+s.payload))
	ip[6] = 0x40 // do not fragment
	ip[8], ip[9] = 64, unix.IPPROTO_TCP
	copy(ip[12:], src)
	copy(ip[16:], dst)
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip[:ipLen]))

	t := h[tcpAt:]
	binary.BigEndian.PutUint16(t, sport)
	binary.BigEndian.PutUint16(t[2:], dport)
	binary.BigEndian.PutUint32(t[4:], s.seq)
	binary.BigEndian.PutUint32(t[8:], s.ack)
	t[12], t[13] = byte(tcp/4<<4), s.flags
	binary.BigEndian.PutUint16(t[14:], 5000)
	copy(t[tcpLen:], s.opts)
	pseudo := append(bytes.Clone(ip[12:20]), 0, unix.IPPROTO_TCP, 0, 0)
	binary.BigEndian.PutUint16(pseudo[10:], uint16(tcp+s.payload))
	binary.BigEndian.PutUint16(t[16:], onesSum(pseudo))
	return h
}

// onesSum is the sum of RFC 1071 over an even number of bytes.
func onesSum(b []byte) uint16 {
	var s uint32
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// endOf reads a released frame: the client's port, and the position behind the segment.
func endOf(frame []byte) (port uint16, end uint32, ok bool) {
	if len(frame) < ethLen+ipLen+tcpLen || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IP {
		return 0, 0, false
	}
	ip := frame[ethLen:]
	t := ip[ipLen:]
	if ip[9] != unix.IPPROTO_TCP || binary.BigEndian.Uint16(t) != guestPort {
		return 0, 0, false
	}
	end = binary.BigEndian.Uint32(t[4:]) + uint32(binary.BigEndian.Uint16(ip[2:])) - ipLen - uint32(t[12]>>4*4)
	if t[13]&flagSYN != 0 {
		end++
	}
	return binary.BigEndian.Uint16(t[2:]), end, true
}

// frame is a segment on its way into an engine.
type frame struct {
	head    []byte // from the virtio-net header on; whom it is handed to may change it
	payload []byte
}

// end is the position behind it.
func (f frame) end() uint32 {
	return binary.BigEndian.Uint32(f.head[seqAt:]) + uint32(len(f.payload))
}

// flow is a connection of the guest.
type flow struct {
	port    uint16
	isn     uint32
	heads   [][]byte // of the stream's packets
	next    uint32   // position of the next frame
	turn    int      // the next packet of the stream
	unacked int
	pending []waiting // the oldest first
}

// waiting is a frame that was fed and is not released.
type waiting struct {
	end  uint32
	size int   // of its payload
	at   int64 // ns of the run
}

// newFlow makes a connection that begins at a packet of the stream.
func newFlow(s *stream, port uint16, turn int) *flow {
	f := &flow{port: port, isn: uint32(port) << 12, turn: turn}
	f.next = f.isn + 1
	for _, p := range s.packets {
		seg := segment{port: port, ack: clientISN + 1, flags: flagACK | flagPSH, opts: p.opts, payload: len(p.payload), gso: p.gso}
		f.heads = append(f.heads, seg.head())
	}
	return f
}

// synAck answers the client's SYN.
func (f *flow) synAck() frame {
	seg := segment{port: f.port, seq: f.isn, ack: clientISN + 1, flags: flagSYN | flagACK, opts: []byte{optMSS, 4, mss >> 8, mss & 0xff}}
	return frame{head: seg.head()}
}

// last is a byte behind everything else.
func (f *flow) last() frame {
	seg := segment{port: f.port, seq: f.next, ack: clientISN + 1, flags: flagACK | flagPSH, payload: 1}
	return frame{seg.head(), []byte{'.'}}
}

// frame makes the flow's next frame, with its head in buf.
func (f *flow) frame(s *stream, buf []byte) frame {
	p := &s.packets[f.turn]
	h := append(buf[:0], f.heads[f.turn]...)
	binary.BigEndian.PutUint32(h[seqAt:], f.next)
	f.turn = (f.turn + 1) % len(s.packets)
	f.next += uint32(len(p.payload))
	return frame{h, p.payload}
}

// SYN is a client's from port to a port of the guest, from the virtio-net header on, with a checksum for the device.
func SYN(port, to uint16, seq uint32) []byte {
	s := segment{fromClient: true, port: port, seq: seq, flags: flagSYN, opts: []byte{optMSS, 4, mss >> 8, mss & 0xff}}
	h := s.head()
	binary.BigEndian.PutUint16(h[tcpAt+2:], to)
	return h
}
