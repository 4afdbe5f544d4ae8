// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var byKernel = flag.Bool("kernel", false, "compare the transcripts with what this kernel does; by time it differs now and then")

// kernelScript runs a transcript with the kernel's TCP in the place of the stack. Here the
// kernel is addrB for its own part, so the transcript's peer has the address addrA.
type kernelScript struct {
	*kernel
	script
	listen, fd   int
	iss, ts      uint32
	known        bool
	log          []string
	settle, late time.Duration // how long the kernel has to answer, and what waiting takes longer
}

var letters = regexp.MustCompile(` (win \d+|ts -?\d+:\d+|mss \d+|ws \d+|sackok|tos \d+)`)

// essence is what of a frame does not depend on time and buffers.
func essence(frame string) string {
	frame = strings.TrimSpace(frame)
	if _, rest, ok := strings.Cut(frame, " "); ok && strings.HasPrefix(frame, "+") {
		frame = rest
	}
	return letters.ReplaceAllString(frame, "")
}

// frames collects what the kernel sends for a while.
func (k *kernelScript) frames(d time.Duration) {
	for until := time.Now().Add(d); ; {
		n, err := unix.Read(k.tap, k.buf[:])
		if errors.Is(err, unix.EAGAIN) {
			left := time.Until(until)
			if left <= 0 {
				return
			}
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(k.tap), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
			if !errors.Is(err, unix.EINTR) {
				k.must(err)
			}
			continue
		}
		k.must(err)
		var p packet
		var g segment
		if !k.script.peer.parsePacket(k.buf[:n], &p) || p.proto != protoTCP || !g.parse(&p) {
			continue
		}
		if !k.known && g.has(syn) {
			k.known, k.iss, k.ts = true, g.seq, g.tsVal
		}
		iss := k.iss
		if g.has(rst) && !g.has(ack) && g.seq == 0 {
			iss = 0
		}
		k.log = append(k.log, essence(k.show(k.buf[:n], iss, k.ts)))
	}
}

func (k *kernelScript) do(line string) {
	cmd, arg, _ := strings.Cut(line, " ")
	size := func() []byte { return make([]byte, number(k.kernel.t, arg)) }
	settle := k.settle
	switch cmd {
	case "dial":
		k.fd = k.socket()
		k.must(unix.Bind(k.fd, &unix.SockaddrInet4{Port: 3000}))
		if err := unix.Connect(k.fd, &unix.SockaddrInet4{Port: int(k.remote), Addr: addrA.As4()}); !errors.Is(err, unix.EINPROGRESS) {
			k.must(err)
		}
		k.own = 3000
		k.options()
	case "accept":
		k.fd, _, _ = unix.Accept4(k.listen, unix.SOCK_NONBLOCK)
		k.fds = append(k.fds, k.fd)
		k.options()
	case "in":
		_, err := unix.Write(k.tap, k.segment(arg, k.iss, k.ts))
		k.must(err)
	case "write":
		_, _ = unix.Write(k.fd, size()) // the connection may be gone
	case "urgent":
		k.must(unix.Sendto(k.fd, size(), unix.MSG_OOB, nil))
	case "read":
		_, _ = unix.Read(k.fd, size())
	case "shutdown":
		_ = unix.Shutdown(k.fd, unix.SHUT_WR)
	case "abort", "close":
		if cmd == "abort" {
			k.must(unix.SetsockoptLinger(k.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		}
		k.fds = slices.DeleteFunc(k.fds, func(fd int) bool { return fd == k.fd })
		k.must(unix.Close(k.fd))
	case "wait":
		d, err := time.ParseDuration(arg)
		k.must(err)
		settle = d + k.late
	}
	k.frames(settle)
}

func (k *kernelScript) options() {
	k.must(unix.SetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20))
	if k.noDelay {
		k.must(unix.SetsockoptInt(k.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
}

// TestKernelScripts prints where this kernel does other things than a transcript says.
func TestKernelScripts(t *testing.T) {
	if !*byKernel {
		return
	}
	paths, err := filepath.Glob("testdata/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range strings.Split(string(text), "\nstack")[1:] {
			t.Run(fmt.Sprint(filepath.Base(path), i), func(t *testing.T) { compareBlock(t, block) })
		}
	}
}

func compareBlock(t *testing.T, block string) {
	compareBlockIn(t, block, 2*time.Millisecond, -time.Millisecond)
}

func compareBlockIn(t *testing.T, block string, settle, late time.Duration) {
	settings, body, _ := strings.Cut(block, "\n")
	_, body, _ = strings.Cut(body, "run\n")
	input, output, _ := strings.Cut(body, "\n----\n")
	output, _, _ = strings.Cut(output, "\n\n")
	for _, d := range regexp.MustCompile(`wait (\S+)`).FindAllStringSubmatch(input, -1) {
		if d, _ := time.ParseDuration(d[1]); d > 3*time.Second {
			return
		}
	}
	if strings.Contains(settings, "rcvbuf") || strings.Contains(settings, "autocork") || strings.Contains(settings, "backlog") {
		return
	}
	k := &kernelScript{kernel: newKernel(t, Config{}), settle: settle, late: late}
	k.script = script{t: t, own: port, remote: 4000}
	// The peer sends from addrA to the kernel.
	k.script.peer = New(Config{MAC: macA, PeerMAC: macB, Addr: addrA}, 2)
	k.script.to = addrB
	dev, err := netlink.LinkByName("simtap")
	k.must(err)
	k.must(netlink.LinkSetGSOMaxSegs(dev, 1)) // or the last segment of every burst has PSH
	for name, value := range map[string]string{"nots": "tcp_timestamps=0", "nosack": "tcp_sack=0", "noscale": "tcp_window_scaling=0",
		"ecn": "tcp_ecn=1", "notlp": "tcp_early_retrans=0", "nofrto": "tcp_frto=0"} {
		if slices.Contains(strings.Fields(settings), name) {
			file, v, _ := strings.Cut(value, "=")
			k.must(os.WriteFile("/proc/sys/net/ipv4/"+file, []byte(v), 0))
		}
	}
	k.must(os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("reno"), 0))
	k.must(os.WriteFile("/proc/sys/net/ipv4/tcp_autocorking", []byte("0"), 0))
	k.must(os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("1"), 0))
	k.noDelay = strings.Contains(settings, "nonagle")
	k.listen = k.socket()
	k.must(unix.SetsockoptInt(k.listen, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	k.must(unix.Bind(k.listen, &unix.SockaddrInet4{Port: port}))
	k.must(unix.Listen(k.listen, 10))
	for line := range strings.Lines(input) {
		line = strings.TrimSpace(line)
		_, after, _ := strings.Cut(output, line+"\n")
		var want []string
		for l := range strings.Lines(after) {
			if !strings.HasPrefix(l, "    ") {
				break
			}
			if e := essence(l); regexp.MustCompile(`^[FSRP.UEW]+ -?\d+:`).MatchString(e) {
				want = append(want, e)
			}
			output = after
		}
		output = after
		k.log = nil
		k.do(line)
		if !slices.Equal(want, k.log) {
			t.Errorf("%s\n  the transcript has %q\n  the kernel         %q", line, want, k.log)
		}
	}
}

// randomScript is what a peer may send, without what depends on time: each line is followed by
// enough of it for a delayed ACK.
func randomScript(r *rand.Rand) string {
	var b strings.Builder
	b.WriteString("dial\nin S. seq=0 ack=1 win=65535 mss=1460 sackok ws=7\n")
	acked, at, last := 1, 1, 500+100*r.IntN(30)
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\nwait 45ms\n", args...) }
	for range 12 {
		seq := min(max(at+(r.IntN(7)-3)*100, 1), last-100)
		n := 100 * (1 + r.IntN(4))
		switch r.IntN(12) {
		case 0:
			line("read %d", 1+r.IntN(2000))
		case 1:
			line("write 50")
			acked += 50
			line("in . seq=%d ack=%d", at, acked)
		case 2:
			n = min(n, last-1)
			line("in %s seq=%d ack=%d len=%d", []string{"F.", "FP."}[r.IntN(2)], last-n, acked, n)
		case 3:
			line("in %s seq=%d ack=%d", []string{"R", "R.", "S", "S.", ".", "P"}[r.IntN(6)], seq-r.IntN(2), acked)
		case 4:
			line("in P. seq=%d ack=%d len=%d", seq, acked+r.IntN(3)-1, min(n, last-seq))
		case 5:
			line("in P. seq=%d ack=%d len=%d", at+[]int{-50000, 200000}[r.IntN(2)], acked, n)
		case 6:
			if r.IntN(3) == 0 {
				line("shutdown")
				acked++
				line("in . seq=%d ack=%d", at, acked)
			}
		default:
			n = min(n, last-seq)
			line("in %s seq=%d ack=%d len=%d", []string{"P.", "."}[r.IntN(2)], seq, acked, n)
			at = max(at, seq+n)
		}
	}
	return b.String()
}

// TestKernelRandomScripts compares the stack with this kernel by random scripts.
func TestKernelRandomScripts(t *testing.T) {
	if !*byKernel {
		return
	}
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			input := randomScript(rand.New(rand.NewPCG(seed, 9)))
			if seed%2 == 0 {
				input = strings.ReplaceAll(input, " sackok", "")
			}
			s := &script{t: t}
			s.start([]datadriven.CmdArg{{Key: "nots"}, {Key: "notlp"}})
			for line := range strings.Lines(input) {
				s.line(strings.TrimSpace(line))
			}
			compareBlock(t, " nots notlp\n----\n\nrun\n"+input+"----\n"+s.out.String()+"\n\n")
			if t.Failed() {
				t.Log(s.out.String())
			}
		})
	}
}
