// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// kernel is a network namespace in which this kernel's TCP is at one end of a tap, with the
// address addrB, and a stack at the other.
type kernel struct {
	t     *testing.T
	tap   int
	s     *Stack
	start time.Time
	rng   *rand.Rand
	loss  float64
	buf   [4096]byte
	fds   []int
}

func (k *kernel) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func newKernel(t *testing.T, cfg Config) *kernel {
	lt.NeedRoot(t)
	lt.NewNetns(t) // this goroutine alone: all that follows is done by it
	k := &kernel{t: t, start: time.Now(), rng: rand.New(rand.NewPCG(1, 2))}
	var err error
	k.tap, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	k.must(err)
	k.fds = append(k.fds, k.tap)
	t.Cleanup(func() {
		for _, fd := range k.fds {
			unix.Close(fd)
		}
	})
	ifr, err := unix.NewIfreq("simtap")
	k.must(err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	k.must(unix.IoctlIfreq(k.tap, unix.TUNSETIFF, ifr))
	dev, err := netlink.LinkByName("simtap")
	k.must(err)
	k.must(netlink.LinkSetHardwareAddr(dev, macB[:]))
	k.must(netlink.LinkSetUp(dev))
	k.must(netlink.AddrAdd(dev, &netlink.Addr{IPNet: &net.IPNet{IP: addrB.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
	k.must(netlink.NeighSet(&netlink.Neigh{LinkIndex: dev.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addrA.AsSlice(), HardwareAddr: macA[:]}))
	cfg.MAC, cfg.PeerMAC, cfg.Addr, cfg.Secret = macA, macB, addrA, 7
	k.s = New(cfg, 3)
	k.s.Listen(port)
	return k
}

func (k *kernel) now() int64 { return int64(time.Since(k.start)) + 1e9 }

// pump moves frames until done, for 30 s at most. Then the timers of both have had their time.
func (k *kernel) pump(what string, done func() bool) {
	k.t.Helper()
	for limit := time.Now().Add(30 * time.Second); ; {
		for _, f := range k.s.Take() {
			if k.rng.Float64() >= k.loss {
				_, err := unix.Write(k.tap, f)
				k.must(err)
			}
		}
		got := false
		for {
			n, err := unix.Read(k.tap, k.buf[:])
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			k.must(err)
			if got = true; k.rng.Float64() >= k.loss {
				k.s.Input(k.now(), k.buf[:n])
			}
		}
		k.s.Tick(k.now())
		if done() {
			return
		}
		if time.Now().After(limit) {
			k.t.Fatalf("timeout: %s", what)
		}
		if !got {
			wait := 5
			if d := k.s.NextDeadline(); d != math.MaxInt64 {
				wait = max(min(wait, int((d-k.now())/1e6)), 0)
			}
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(k.tap), Events: unix.POLLIN}}, wait)
			if !errors.Is(err, unix.EINTR) {
				k.must(err)
			}
		}
	}
}

// socket is a socket of the kernel.
func (k *kernel) socket() int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	k.must(err)
	k.fds = append(k.fds, fd)
	return fd
}

// accepted has the kernel connect to the stack.
func (k *kernel) accepted() (ID, int) {
	fd := k.socket()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: addrA.As4()}); !errors.Is(err, unix.EINPROGRESS) {
		k.t.Fatal(err)
	}
	var id ID
	k.pump("the kernel connects", func() (ok bool) {
		id, ok = k.s.Accept(port)
		return ok
	})
	return id, fd
}

// dialled has the stack connect to the kernel.
func (k *kernel) dialled() (ID, int) {
	l := k.socket()
	k.must(unix.Bind(l, &unix.SockaddrInet4{Addr: addrB.As4()}))
	k.must(unix.Listen(l, 5))
	sa, err := unix.Getsockname(l)
	k.must(err)
	id := k.s.Dial(k.now(), netip.AddrPortFrom(addrB, uint16(sa.(*unix.SockaddrInet4).Port)), 0)
	fd := -1
	k.pump("the stack connects", func() bool {
		if fd < 0 {
			if fd, _, err = unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err == nil {
				k.fds = append(k.fds, fd)
			}
		}
		return fd >= 0 && k.s.State(id) == Established
	})
	return id, fd
}

// peer is an application on a socket of the kernel.
type peer struct {
	fd      int
	out, in []byte
	written int
	eof     bool
	err     error
}

func (p *peer) work() {
	for p.written < len(p.out) && p.err == nil {
		n, err := unix.Write(p.fd, p.out[p.written:])
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				p.err = err
			}
			break
		}
		if p.written += n; p.written == len(p.out) {
			p.err = unix.Shutdown(p.fd, unix.SHUT_WR)
		}
	}
	var room [65536]byte
	for !p.eof && p.err == nil {
		n, err := unix.Read(p.fd, room[:])
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if p.err = err; err == nil {
			p.in, p.eof = append(p.in, room[:n]...), n == 0
		}
	}
}

// transfer sends n bytes each way at once; each side closes when it has written all.
func (k *kernel) transfer(id ID, fd, n int) {
	k.t.Helper()
	a := &stream{s: k.s, id: id, out: randomBytes(k.rng, n), chunk: func() int { return 1 + k.rng.IntN(9000) }}
	b := &peer{fd: fd, out: randomBytes(k.rng, n)}
	k.pump("transfer", func() bool {
		a.work(k.now())
		b.work()
		return a.eof && a.ended && b.eof || b.err != nil
	})
	if b.err != nil || k.s.Err(id) != nil || !bytes.Equal(a.in, b.out) || !bytes.Equal(b.in, a.out) {
		k.t.Fatalf("the kernel has %d bytes of %d (%v), the stack %d (%v)", len(b.in), n, b.err, len(a.in), k.s.Err(id))
	}
	k.pump("the connection closes", func() bool { return k.s.State(id) == Closed || k.s.State(id) == TimeWait })
	if k.s.Err(id) != nil || k.s.BadChecksums() != 0 {
		k.t.Errorf("%v, %d bad checksums", k.s.Err(id), k.s.BadChecksums())
	}
}

// The model speaks with a real TCP.
func TestKernel(t *testing.T) {
	type opener = func(*kernel) (ID, int)
	for name, open := range map[string]opener{"accept": (*kernel).accepted, "dial": (*kernel).dialled} {
		for _, c := range []struct {
			name string
			cfg  Config
			loss float64
			n    int
		}{
			{name: "small", n: 100},
			{name: "large", n: 1 << 20},
			{name: "lossy", n: 1 << 20, loss: 0.02},
			{name: "no options", cfg: Config{NoSACK: true, NoTimestamps: true, NoScale: true}, n: 200000, loss: 0.01},
			{name: "ecn autocork", cfg: Config{ECN: true, Autocork: true, NoTLP: true}, n: 1 << 19, loss: 0.01},
			{name: "small buffers", cfg: Config{RcvBuf: 5000, SndBuf: 3000, MSS: 1000, NoFRTO: true}, n: 1 << 18},
		} {
			t.Run(name+" "+c.name, func(t *testing.T) {
				k := newKernel(t, c.cfg)
				k.loss = c.loss
				id, fd := open(k)
				began := k.now()
				k.transfer(id, fd, c.n)
				t.Logf("%v", time.Duration(k.now()-began).Round(time.Millisecond))
			})
		}
		t.Run(name+" resets", func(t *testing.T) {
			k := newKernel(t, Config{})
			id, fd := open(k)
			k.s.Abort(k.now(), id)
			var err error
			k.pump("the kernel sees a RST", func() bool {
				_, err = unix.Read(fd, make([]byte, 1))
				return !errors.Is(err, unix.EAGAIN)
			})
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the kernel reads %v", err)
			}
			id, fd = open(k)
			k.must(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			k.fds = slices.DeleteFunc(k.fds, func(f int) bool { return f == fd })
			k.must(unix.Close(fd))
			k.pump("the stack sees a RST", func() bool { return k.s.State(id) == Closed })
			if !errors.Is(k.s.Err(id), ErrReset) {
				t.Errorf("the stack has %v", k.s.Err(id))
			}
			// Data for a closed connection.
			id, fd = open(k)
			k.s.Close(k.now(), id)
			k.pump("the kernel may write", func() bool { return k.s.State(id) == FinWait2 })
			_, err = unix.Write(fd, []byte("nobody reads"))
			k.must(err)
			k.pump("the kernel sees a RST", func() bool {
				_, err = unix.Write(fd, []byte("more"))
				return err != nil
			})
			if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the kernel writes %v", err)
			}
		})
		t.Run(name+" half-close", func(t *testing.T) {
			k := newKernel(t, Config{})
			id, fd := open(k)
			k.s.CloseWrite(k.now(), id)
			p := &peer{fd: fd}
			k.pump("the kernel reads the end", func() bool { p.work(); return p.eof })
			p.out = []byte("still open this way")
			var got []byte
			k.pump("data after the FIN", func() bool {
				p.work()
				var room [64]byte
				n, eof := k.s.Read(k.now(), id, room[:])
				got = append(got, room[:n]...)
				return eof
			})
			if string(got) != string(p.out) || k.s.State(id) != TimeWait {
				t.Errorf("read %q, %v", got, k.s.State(id))
			}
		})
	}
}

func TestKernelRefuses(t *testing.T) {
	k := newKernel(t, Config{})
	id := k.s.Dial(k.now(), netip.AddrPortFrom(addrB, 9), 0)
	k.pump("the kernel refuses", func() bool { return k.s.State(id) == Closed })
	if !errors.Is(k.s.Err(id), ErrRefused) {
		t.Errorf("%v", k.s.Err(id))
	}
	fd := k.socket()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port + 1, Addr: addrA.As4()}); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	var code int
	k.pump("the stack refuses", func() bool {
		var err error
		code, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		k.must(err)
		return code != 0
	})
	if unix.Errno(code) != unix.ECONNREFUSED {
		t.Errorf("the kernel has %v", unix.Errno(code))
	}
}
