// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

const recEcho = 8 // LS_REC_ECHO of abi.h

// gratuitousARP is one of the guest's.
func gratuitousARP() []byte {
	mac, err := net.ParseMAC(lt.GuestMAC)
	if err != nil {
		panic(err)
	}
	addr := netip.MustParseAddr(lt.Guest4).AsSlice()
	f := eth(unix.ETH_P_ARP, []byte{0, 1, 8, 0, 6, 4, 0, 1})
	f = append(append(f, mac...), addr...)
	f = append(append(f, make([]byte, 6)...), addr...)
	copy(f, bytes.Repeat([]byte{0xff}, 6))
	return f
}

// TestEcho: when no echo of S's comes back, the PVM is muted after a while, ARP
// included, however much it has to send; with the echoes it transmits again
// (R20).
func TestEcho(t *testing.T) {
	p := newPair(t, lt.Impaired, "", "", "")
	arp, seen := lt.OpenWire(t, p.PVM, "eth0"), lt.OpenWire(t, p.Client, "eth0")
	for dir, name := range []string{lt.P2S: "request", lt.S2P: "answer"} {
		t.Run(name+" lost", func(t *testing.T) {
			p, dir := p.with(t), lt.Direction(dir)
			c := p.mustDial(lt.Guest4, portEcho)
			if err := echo(c, 0); err != nil {
				t.Fatal(err)
			}
			arp.Send(t, gratuitousARP())
			lt.Eventually(t, 5*time.Second, func() (bool, string) {
				return len(seen.Frames(isARP)) > 0, "the guest's ARP does not leave"
			})

			p.Impair.Drop(t, dir, lt.Filter{Types: []uint8{recEcho}}, lt.AllOf)
			muted := p.status("alpha").Counters["muted"]
			lt.Eventually(t, 10*time.Second, func() (bool, string) {
				arp.Send(t, gratuitousARP())
				return p.status("alpha").Counters["muted"] > muted, "the PVM is not muted"
			})
			seen.Forget()
			// The client and the guest go on trying, and are received on their own side only.
			muted = p.status("alpha").Counters["muted"]
			before := p.Impair.Counts(t, dir).Filtered
			c.Write([]byte("is anybody there?"))
			lt.Eventually(t, 10*time.Second, func() (bool, string) {
				arp.Send(t, gratuitousARP())
				ping := lt.Command(p.Client, "ping", "-n", "-c", "1", "-W", "0.1", lt.Guest6)
				if ping.Run() == nil {
					t.Error("a ping was answered")
				}
				if conn, err := p.dialFor(200*time.Millisecond, lt.Guest4, portEcho); err == nil {
					conn.Close()
					t.Error("a connection was made")
				}
				return p.Impair.Counts(t, dir).Filtered-before >= 20 && p.status("alpha").Counters["muted"]-muted >= 3,
					"too few echoes were lost meanwhile, or nothing was sent"
			})
			if frames := seen.Frames(nil); len(frames) != 0 {
				t.Errorf("%d frames came to the client, the first is\n%x", len(frames), frames[0])
			}

			p.Impair.Drop(t, dir, lt.Filter{}, 0)
			p.expectText(c, "is anybody there?")
			p.keepAlive(lt.Guest6, 100)
		})
	}
	if s := p.await("alpha", func(s *api.Status) bool { return s.HeldPackets == 0 }); s.State != "replicating" {
		t.Errorf("state %s", s.State)
	}
}

func isARP(f []byte) bool { return bytes.Equal(f[12:14], []byte{0x08, 0x06}) }

// dialFor connects from the client's namespace within limit.
func (p *pair) dialFor(limit time.Duration, host, port string) (c net.Conn, err error) {
	lt.In(p.t, p.Client, func() { c, err = net.DialTimeout("tcp", net.JoinHostPort(host, port), limit) })
	return c, err
}

func (p *pair) expectText(c net.Conn, want string) {
	p.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		p.t.Fatalf("read %q, %v; want %q", got[:n], err, want)
	}
}
