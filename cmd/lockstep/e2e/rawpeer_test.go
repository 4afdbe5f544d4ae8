// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// TCP flags. AE is in the byte before the others.
const (
	flagFIN = 1
	flagSYN = 2
	flagRST = 4
	flagACK = 16
	flagECE = 64
	flagCWR = 128
	flagAE  = 256
)

// rawPeer is a remote that sends a guest's stack what the test says and no more, from an
// address that no host has. It has timestamps.
type rawPeer struct {
	t     *testing.T
	w     *lt.Wire // the client's
	addr  netip.AddrPort
	guest uint16 // port

	seq, ack uint32 // next to send, and next to come
	began    time.Time
	echo     uint32 // the newest timestamp that came
	looked   int    // frames
	flags    byte   // all that came
	got      []byte
	rst      uint32 // sequence number of the RST that came
	acked    uint32 // the newest ACK that came
	open     bool   // it has acknowledged a SYN
	accurate bool   // it offers AccECN
	sent     []byte // the newest segment, which is repeated as TCP does
}

func newRawPeer(t *testing.T, w *lt.Wire, addr netip.AddrPort, guest uint16) *rawPeer {
	return &rawPeer{t: t, w: w, addr: addr, guest: guest, seq: uint32(addr.Port()) * 2654435761, began: time.Now()}
}

// send sends what the stream goes on with.
func (r *rawPeer) send(flags byte, payload []byte) {
	r.t.Helper()
	r.look()
	r.sent = r.segment(r.seq, flags, payload)
	r.w.Send(r.t, r.sent)
	r.open = r.open || flags&flagACK != 0
	r.seq += uint32(len(payload)) + uint32(flags&flagSYN>>1) + uint32(flags&flagFIN)
}

// repeatFIN sends the FIN again, which is answered.
func (r *rawPeer) repeatFIN() {
	r.t.Helper()
	r.look()
	was := r.looked
	r.sent = r.segment(r.seq-1, flagFIN|flagACK, nil)
	r.w.Send(r.t, r.sent)
	r.until(func() (bool, string) {
		return r.looked > was, fmt.Sprintf("%s got no answer to its second FIN", r.addr)
	})
}

func (r *rawPeer) segment(seq uint32, flags byte, payload []byte) []byte {
	var opts []byte
	if flags&flagSYN != 0 {
		opts = []byte{2, 4, 1460 >> 8, 1460 & 0xff}
	}
	if flags&flagRST == 0 { // which has none, like that of a kernel that has no socket for what comes
		opts = append(opts, 1, 1, 8, 10)
		opts = binary.BigEndian.AppendUint32(opts, uint32(time.Since(r.began).Milliseconds())+1)
		opts = binary.BigEndian.AppendUint32(opts, r.echo)
	}
	ack, all := r.ack, uint16(flags)
	if flags&flagACK == 0 {
		ack = 0
	}
	if flags&flagSYN != 0 && r.accurate {
		all |= flagAE | flagCWR | flagECE
	}
	return toGuest4(r.addr, r.guest, seq, ack, all, opts, payload)
}

// toGuest4 is a TCP segment from an address that no host has.
func toGuest4(from netip.AddrPort, port uint16, seq, ack uint32, flags uint16, opts, payload []byte) []byte {
	tcp := make([]byte, 20, 20+len(opts)+len(payload))
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], port)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	binary.BigEndian.PutUint16(tcp[12:], uint16(5+len(opts)/4)<<12|flags)
	binary.BigEndian.PutUint16(tcp[14:], 64240)
	tcp = append(append(tcp, opts...), payload...)
	src, dst := from.Addr().AsSlice(), netip.MustParseAddr(lt.Guest4).AsSlice()
	pseudo := append(append(append([]byte{}, src...), dst...), 0, unix.IPPROTO_TCP, byte(len(tcp)>>8), byte(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(ones(ones(0, pseudo), tcp)))
	ip := ip4(unix.IPPROTO_TCP, 0, 0, tcp)
	copy(ip[12:], src)
	copy(ip[16:], dst)
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^uint16(ones(0, ip[:20])))
	f := eth(unix.ETH_P_IP, ip)
	copy(f, append(append([]byte{}, f[6:12]...), f[:6]...))
	return f
}

// look takes in what has come.
func (r *rawPeer) look() {
	addr := r.addr.Addr().As4()
	frames := r.w.Frames(func(f []byte) bool {
		return toPort(f, r.addr.Port()) && [4]byte(f[30:34]) == addr && binary.BigEndian.Uint16(f[tcpAt:]) == r.guest
	})
	for _, f := range frames[r.looked:] {
		r.take(f)
	}
	r.looked = len(frames)
}

func (r *rawPeer) take(f []byte) {
	tcp := f[tcpAt : 14+int(binary.BigEndian.Uint16(f[16:]))]
	seq, flags, payload := binary.BigEndian.Uint32(tcp[4:]), tcp[13], tcp[tcp[12]>>4*4:]
	if flags&flagSYN != 0 && r.flags&flagSYN == 0 {
		r.ack = seq + 1
	}
	for _, at := range []int{20, 24} { // as Linux has them, alone or behind the MSS
		if len(tcp) >= at+12 && binary.BigEndian.Uint32(tcp[at:]) == 0x0101080a {
			r.echo = binary.BigEndian.Uint32(tcp[at+4:])
		}
	}
	r.flags |= flags
	if flags&(flagSYN|flagACK) == flagSYN|flagACK && r.open && seq+1 == r.ack { // the guest has not got that
		r.w.Send(r.t, r.segment(r.seq, flagACK, nil))
	}
	if flags&flagACK != 0 {
		r.acked = binary.BigEndian.Uint32(tcp[8:])
	}
	if flags&flagRST != 0 {
		r.rst = seq
	}
	if skip := int32(r.ack - seq); skip >= 0 && int(skip) < len(payload) {
		r.got = append(r.got, payload[skip:]...)
		r.ack = seq + uint32(len(payload))
	}
	if flags&flagFIN != 0 && seq+uint32(len(payload)) == r.ack {
		r.ack++
	}
}

// until waits for what comes of what it has sent, which may be lost: a checkpoint drops what
// a guest transmits in the middle of it.
func (r *rawPeer) until(cond func() (bool, string)) {
	r.t.Helper()
	again := time.Now().Add(time.Second)
	lt.Eventually(r.t, 10*time.Second, func() (bool, string) {
		r.look()
		ok, state := cond()
		if now := time.Now(); !ok && r.sent != nil && now.After(again) {
			again = now.Add(time.Second)
			r.w.Send(r.t, r.sent)
		}
		return ok, state
	})
}

// await waits for a segment with these flags.
func (r *rawPeer) await(flags byte) {
	r.t.Helper()
	r.until(func() (bool, string) {
		return r.flags&flags == flags, fmt.Sprintf("%s got the flags %#x of %#x", r.addr, r.flags, flags)
	})
}

// awaitData waits for n bytes in all.
func (r *rawPeer) awaitData(n int) {
	r.t.Helper()
	r.until(func() (bool, string) {
		return len(r.got) >= n, fmt.Sprintf("%s got %d bytes of %d", r.addr, len(r.got), n)
	})
}

// fetch waits for n bytes in all, and acknowledges what comes.
func (r *rawPeer) fetch(n int) {
	r.t.Helper()
	for have := -1; len(r.got) < n; {
		r.awaitData(have + 1)
		have = len(r.got)
		r.send(flagACK, nil)
	}
}

// awaitACK waits until all that was sent is acknowledged.
func (r *rawPeer) awaitACK() {
	r.t.Helper()
	r.until(func() (bool, string) {
		return r.acked == r.seq, fmt.Sprintf("%s: %d is acknowledged, and %d was sent", r.addr, r.acked, r.seq)
	})
}
