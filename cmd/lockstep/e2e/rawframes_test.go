// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// guestFrames are kinds of frames that a guest may send: each holds the text, and
// an IP ID, which does not have to be the same in both guests.
var guestFrames = []struct {
	name  string
	frame func(id uint16, text string) []byte
}{
	{"vlan", func(id uint16, text string) []byte {
		return tagged(eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, id, 0, udpBody(false, 7300, 7301, []byte(text)))), vlan42)
	}},
	{"vlan-priority", func(id uint16, text string) []byte {
		return tagged(eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, id, 0, udpBody(false, 7300, 7301, []byte(text)))), vlan42|5<<13)
	}},
	{"vlan6", func(_ uint16, text string) []byte {
		return tagged(eth(unix.ETH_P_IPV6, ip6(unix.IPPROTO_UDP, udpBody(true, 7300, 7301, []byte(text)))), vlan42)
	}},
	{"qinq", func(id uint16, text string) []byte {
		return tagged(eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, id, 0, udpBody(false, 7300, 7301, []byte(text)))), qinq700, vlan42)
	}},
	{"esp", func(id uint16, text string) []byte {
		return eth(unix.ETH_P_IP, ip4(unix.IPPROTO_ESP, id, 0, []byte(text)))
	}},
	{"esp6", func(_ uint16, text string) []byte { return eth(unix.ETH_P_IPV6, ip6(unix.IPPROTO_ESP, []byte(text))) }},
	{"gre", func(id uint16, text string) []byte {
		return eth(unix.ETH_P_IP, ip4(unix.IPPROTO_GRE, id, 0, append([]byte{0, 0, 8, 0}, text...)))
	}},
	{"sctp", func(id uint16, text string) []byte {
		return eth(unix.ETH_P_IP, ip4(unix.IPPROTO_SCTP, id, 0, append([]byte{1, 2, 3, 4, 0, 0, 0, 0, 9, 9, 9, 9}, text...)))
	}},
	{"dhcp", func(id uint16, text string) []byte {
		b := append([]byte{1, 1, 6, 0}, make([]byte, 240)...) // BOOTREQUEST and nothing known
		ip := ip4(unix.IPPROTO_UDP, id, 0, udpBody(false, 68, 67, append(b, text...)))
		copy(ip[10:], make([]byte, 2+4)) // 0.0.0.0 to 255.255.255.255
		copy(ip[16:], []byte{255, 255, 255, 255})
		sum := ^uint16(ones(0, ip[:20]))
		ip[10], ip[11] = byte(sum>>8), byte(sum)
		ip[26], ip[27] = 0, 0 // no UDP checksum
		f := eth(unix.ETH_P_IP, ip)
		copy(f, bytes.Repeat([]byte{0xff}, 6))
		return f
	}},
	{"pppoe", func(_ uint16, text string) []byte { return eth(unix.ETH_P_PPP_SES, []byte(text)) }},
}

// TestFrames: frames of protocols that the kernel here has no sockets for. The same
// from both guests leaves once, as the PVM sent it, tags and all; what one of them
// sends alone does not.
func TestFrames(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 2s}")
	pvm, svm, seen := lt.OpenWire(t, p.PVM, "eth0"), lt.OpenWire(t, p.SVM, "eth0"), lt.OpenWire(t, p.Client, "eth0")
	once := func(t *testing.T, want []byte, text string) {
		t.Helper()
		lt.Eventually(t, 5*time.Second, func() (bool, string) { return seen.Count(text) > 0, "it did not leave" })
		p.with(t).keepAlive(lt.Guest4, 3) // whatever followed it has come, too
		frames := seen.Frames(func(f []byte) bool { return bytes.Contains(f, []byte(text)) })
		if len(frames) != 1 || !bytes.HasPrefix(frames[0], want) { // padding is anyone's
			t.Errorf("%d frames left, the first is\n%x\nwant one:\n%x", len(frames), frames[0], want)
		}
	}
	for _, x := range guestFrames {
		t.Run(x.name, func(t *testing.T) {
			for i, order := range [][2]*lt.Wire{{pvm, svm}, {svm, pvm}} {
				text := fmt.Sprintf("both of them say %s %d.", x.name, i)
				for j, w := range order {
					w.Send(t, x.frame(uint16(100+j), text))
				}
				id := map[bool]uint16{true: 100, false: 101}[order[0] == pvm]
				once(t, x.frame(id, text), text)
			}
		})
	}
	t.Run("padding", func(t *testing.T) {
		for i, pad := range [][2]int{{18, 0}, {0, 18}, {3, 7}} { // the PVM's, the SVM's
			text := fmt.Sprintf("short %d", i)
			f := eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 7, 0, udpBody(false, 7302, 7303, []byte(text))))
			pvm.Send(t, append(slices.Clone(f), bytes.Repeat([]byte{0xaa}, pad[0])...))
			svm.Send(t, append(slices.Clone(f), make([]byte, pad[1])...))
			once(t, f, text)
		}
	})
	t.Run("fragments", func(t *testing.T) { p.with(t).fragmentOrders(pvm, svm) })
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}

	lost := p.status("alpha").Dropped[unmatched]
	for _, x := range guestFrames {
		pvm.Send(t, x.frame(1, "alone the PVM says "+x.name))
		svm.Send(t, x.frame(1, "alone the SVM says "+x.name))
	}
	p.await("alpha", func(s *api.Status) bool {
		return s.CheckpointsRequested > 0 && s.Dropped[unmatched]-lost >= uint64(len(guestFrames))
	})
	if n := seen.Count("alone the "); n != 0 {
		t.Errorf("%d frames of one guest alone left", n)
	}
}

// fragmentOrders: the guests send the fragments of equal datagrams in different
// orders and with different IP IDs; the client puts the datagrams together.
func (p *pair) fragmentOrders(pvm, svm *lt.Wire) {
	const port, part, parts = 7310, 1000, 3
	t := p.t
	t.Helper()
	for _, x := range families {
		var c net.PacketConn
		lt.In(t, p.Client, func() {
			var err error
			if c, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port)); err != nil {
				t.Fatal(err)
			}
		})
		c.SetDeadline(time.Now().Add(10 * time.Second))
		for round, orders := range [][2][parts]int{
			{{0, 1, 2}, {0, 1, 2}}, {{0, 1, 2}, {2, 1, 0}}, {{1, 2, 0}, {0, 2, 1}}, {{2, 1, 0}, {1, 0, 2}},
		} {
			payload := make([]byte, part*parts-8)
			(&pattern{pos: uint64(round) << 20}).Read(payload)
			body := udpBody(x.name == "v6", 7311, port, payload)
			for i, w := range []*lt.Wire{pvm, svm} {
				id := uint16(1000 + 10*round + i)
				for _, k := range orders[i] {
					piece, more := body[k*part:(k+1)*part], k < parts-1
					if x.name == "v6" {
						w.Send(t, eth(unix.ETH_P_IPV6, fragment6(unix.IPPROTO_UDP, uint32(id), k*part, more, piece)))
						continue
					}
					frag := uint16(k * part / 8)
					if more {
						frag |= 0x2000
					}
					w.Send(t, eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, id, frag, piece)))
				}
			}
			got := make([]byte, 1<<16)
			n, _, err := c.ReadFrom(got)
			if err != nil || !bytes.Equal(got[:n], payload) {
				t.Errorf("%s, round %d: %d bytes, %v; want %d", x.name, round, n, err, len(payload))
			}
		}
		c.Close()
	}
}

// TestPrimaryOnly: what a rule names leaves as the PVM sends it, once, whatever the
// SVM sends.
func TestPrimaryOnly(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "compare: {timeout: 200ms, primary_only: [{proto: udp, remote_port: 123}]}")
	pvm, svm, seen := lt.OpenWire(t, p.PVM, "eth0"), lt.OpenWire(t, p.SVM, "eth0"), lt.OpenWire(t, p.Client, "eth0")
	for _, x := range []struct {
		from *lt.Wire
		text string
	}{{svm, "what time is it at the SVM?"}, {pvm, "what time is it at the PVM?"}} {
		for _, to := range []uint16{123, 124} {
			x.from.Send(t, eth(unix.ETH_P_IP, ip4(unix.IPPROTO_UDP, 1, 0, udpBody(false, 123, to, fmt.Appendf(nil, "%s %d", x.text, to)))))
		}
	}
	lt.Eventually(t, 5*time.Second, func() (bool, string) {
		return seen.Count("at the PVM? 123") > 0, "the rule let nothing out"
	})
	p.await("alpha", func(s *api.Status) bool { return s.CheckpointsRequested > 0 }) // for port 124
	for text, want := range map[string]int{"at the PVM? 123": 1, "at the PVM? 124": 0, "at the SVM?": 0} {
		if n := seen.Count(text); n != want {
			t.Errorf("%q left %d times, want %d", text, n, want)
		}
	}
}
