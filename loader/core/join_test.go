// SPDX-License-Identifier: Apache-2.0

package core

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

// joinGSO is the segment size of the frames that are joined here.
const joinGSO = 100

// wireFrames are the frames that an [Outlet] was given, one after the other.
type wireFrames struct {
	heads [][]byte
	tails [][]byte
	lost  int
}

func (w *wireFrames) Queue(head, tail []byte) {
	w.heads, w.tails = append(w.heads, head), append(w.tails, slices.Clone(tail))
}

func (w *wireFrames) Join(head, tail []byte) {
	last := len(w.heads) - 1
	w.heads[last], w.tails[last] = head, append(w.tails[last], tail...)
}

func (w *wireFrames) Flush() {
	for i, h := range w.heads {
		w.heads[i] = slices.Clone(h)
	}
}

func (w *wireFrames) Lost() { w.lost++ }

// segments are what a device makes of the frames: of each segment its headers, without the length, the
// ID and the checksums, and its payload.
func (w *wireFrames) segments() (out []string) {
	for i, h := range w.heads {
		l4 := VnetLen + int(binary.LittleEndian.Uint16(h[6:]))
		size := int(binary.LittleEndian.Uint16(h[4:]))
		for at, rest := 0, w.tails[i]; at == 0 || len(rest) > 0; {
			n := len(rest)
			if size > 0 {
				n = min(n, size)
			}
			head := slices.Clone(h[VnetLen:])
			ip, tcp := head[L3Offset(head):l4-VnetLen], head[l4-VnetLen:]
			if ip[0]>>4 == 4 {
				copy(ip[2:6], make([]byte, 4))
				copy(ip[ip4CsumOff:], make([]byte, 2))
			} else {
				copy(ip[4:6], make([]byte, 2))
			}
			copy(tcp[TCPCsum:], make([]byte, 2))
			binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(at))
			if n < len(rest) {
				tcp[tcpFlagsOff+1] &^= byte(compare.PSH)
			}
			out = append(out, fmt.Sprintf("%x %x", head, rest[:n]))
			at, rest = at+max(n, 1), rest[n:]
		}
	}
	return out
}

// joinKit has two GSO frames of one connection in large slots, the second behind the first.
type joinKit struct {
	Transmitter
	wire  wireFrames
	slots Slots
	effs  [2]compare.Effect
}

func newJoinKit(ip []byte) *joinKit {
	const payload = 10 * joinGSO
	k := &joinKit{slots: Slots{Large: make([]byte, 2*LargeSize)}}
	k.Frames = NewStore(k.slots)
	other := new(wireFrames)
	k.ToTap, k.Retransmit, k.ToGuest, k.ToPeer = &k.wire, other, other, other
	for i := range k.effs {
		id := compare.Slot(i) | compare.Slot(bpf.LockstepLsConstLS_SLOT_GSO)
		headers := append([]byte{2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, ip[0], ip[1]}, ip[2:]...)
		frame := append(headers, make([]byte, TCPLen)...)
		for j := range payload {
			frame = append(frame, byte(i*payload+j))
		}
		copy(k.slots.data(id), frame)
		k.Frames.add(id, frameMeta{l3: EthLen, l4: uint32(len(headers)), pay: uint32(len(headers) + TCPLen), paylen: payload, gso: joinGSO})
		k.effs[i] = compare.Effect{
			Op: compare.OpSend, Tuple: compare.Tuple{GuestPort: 80, RemotePort: 5000, Proto: ProtoTCP}, Slot: id, Free: true,
			To: payload, Seq: uint32(i * payload), Ack: 7, Win: 9, Flags: compare.ACK, OptLen: 12, Opts: [40]byte{1, 1, 8, 10, 5, 5, 5, 5, 6, 6, 6, 6},
		}
	}
	k.effs[0].From, k.effs[0].Seq = 6*joinGSO, 6*joinGSO // its front has left
	k.effs[1].To = 5 * joinGSO                           // its rest leaves later
	k.effs[1].Free = false
	return k
}

var (
	joinIP4 = []byte{8, 0, 0x45, 0, 0, 0, 1, 2, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
	joinIP6 = append([]byte{0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64}, make([]byte, 32)...)
)

// TestJoin: what was cut out of two GSO frames, and leaves together, leaves as one, of which a device
// makes the same segments as of the two. Where anything else differs it does not.
func TestJoin(t *testing.T) {
	header := func(at int, v byte) func(*joinKit) {
		return func(k *joinKit) { k.slots.data(k.effs[1].Slot)[at] = v }
	}
	tests := map[string]struct {
		change func(k *joinKit)
		frames int
	}{
		"goes on":             {func(k *joinKit) {}, 1},
		"ends with PSH":       {func(k *joinKit) { k.effs[1].Flags |= compare.PSH }, 1},
		"IPv4's ID":           {header(EthLen+4, 77), 1},
		"PSH in between":      {func(k *joinKit) { k.effs[0].Flags |= compare.PSH }, 2},
		"a hole":              {func(k *joinKit) { k.effs[1].Seq++ }, 2},
		"another ACK":         {func(k *joinKit) { k.effs[1].Ack++ }, 2},
		"another window":      {func(k *joinKit) { k.effs[1].Win++ }, 2},
		"another timestamp":   {func(k *joinKit) { k.effs[1].Opts[4]++ }, 2},
		"other options":       {func(k *joinKit) { k.effs[1].OptLen = 0 }, 2},
		"FIN":                 {func(k *joinKit) { k.effs[1].Flags |= compare.FIN }, 2},
		"urgent":              {func(k *joinKit) { k.effs[1].Urg = 1 }, 2},
		"a reserved bit":      {func(k *joinKit) { k.effs[1].Flags |= 1 << 9 }, 2},
		"another connection":  {func(k *joinKit) { k.effs[1].Tuple.RemotePort++ }, 2},
		"a short segment":     {func(k *joinKit) { k.effs[0].To -= 10; k.effs[1].Seq -= 10 }, 2},
		"another source MAC":  {header(6, 77), 2},
		"another ECN or DSCP": {header(EthLen+1, 77), 2},
		"another size": {func(k *joinKit) {
			m := k.Frames.meta[k.effs[1].Slot]
			m.gso++
			k.Frames.meta[k.effs[1].Slot] = m
		}, 2},
		"a VLAN tag beside": {func(k *joinKit) {
			m := k.Frames.meta[k.effs[1].Slot]
			m.tci, m.tpid = 5, EthVLAN
			k.Frames.meta[k.effs[1].Slot] = m
		}, 2},
	}
	for name, x := range tests {
		for family, ip := range map[string][]byte{"IPv4": joinIP4, "IPv6": joinIP6} {
			t.Run(name+" "+family, func(t *testing.T) {
				if name == "IPv4's ID" && family == "IPv6" {
					x.frames = 1 // the payload's length there
				}
				joined, apart := newJoinKit(ip), newJoinKit(ip)
				x.change(joined)
				x.change(apart)
				joined.Apply(joined.effs[:])
				for i := range apart.effs {
					apart.Apply(apart.effs[i : i+1])
				}
				if len(joined.wire.heads) != x.frames || joined.wire.lost > 0 {
					t.Errorf("%d frames, want %d", len(joined.wire.heads), x.frames)
				}
				if got, want := joined.wire.segments(), apart.wire.segments(); !slices.Equal(got, want) {
					t.Errorf("segments\n%q\nwant\n%q", got, want)
				}
				if !bytes.Equal(joined.slots.Large[:4], apart.slots.Large[:4]) || joined.Frames.Len() != apart.Frames.Len() {
					t.Error("other slots are free")
				}
			})
		}
	}
}

// TestJoinBounds: no frame has more parts than an outlet takes, or more bytes than an IP packet.
func TestJoinBounds(t *testing.T) {
	k := newJoinKit(joinIP4)
	var effs []compare.Effect
	for i := range 2 * MaxParts {
		e := k.effs[0]
		e.From, e.To, e.Seq, e.Free = 0, joinGSO, uint32(i*joinGSO), false
		effs = append(effs, e)
	}
	k.Apply(effs)
	if n := len(k.wire.heads); n != 2 {
		t.Errorf("%d frames of %d parts", n, len(effs))
	}

	k = newJoinKit(joinIP4)
	for i := range k.effs {
		m := k.Frames.meta[k.effs[i].Slot]
		m.paylen = 40_000
		k.Frames.meta[k.effs[i].Slot] = m
	}
	k.effs[0].From, k.effs[0].To, k.effs[1].To = 0, 40_000, 30_000
	k.effs[1].Seq = k.effs[0].Seq + 40_000
	k.Apply(k.effs[:])
	if n := len(k.wire.heads); n != 2 {
		t.Errorf("%d frames of 70 000 bytes", n)
	}
	if n := len(k.wire.tails[0]); n != 40_000 {
		t.Errorf("the first has %d bytes", n)
	}
}
