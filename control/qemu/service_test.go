// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary is also the service that runs in the guests.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_GUEST") == "" {
		os.Exit(m.Run())
	}
	serve()
}

// serve answers lines: "set V", "get", "write DISK BLOCK WORD", "read DISK BLOCK",
// "churn DISK", "dirty MIB RATE", "dirtied", "rest", "verify DISK". A value is in the
// guest's memory, blocks are on its disks and in no cache.
func serve() {
	l, err := net.Listen("tcp", ":7000")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	var value atomic.Value
	value.Store("nothing")
	var load churn
	var memory dirty
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			defer c.Close()
			for r := bufio.NewScanner(c); r.Scan(); {
				var disk, word string
				var block int64
				switch f := strings.Fields(r.Text()); f[0] {
				case "set":
					value.Store(f[1])
					fmt.Fprintln(c, "ok")
				case "get":
					fmt.Fprintln(c, value.Load())
				case "write":
					fmt.Sscan(strings.Join(f[1:], " "), &disk, &block, &word)
					_, err := onDisk(disk, block, word)
					fmt.Fprintln(c, "wrote", err)
				case "churn":
					load.on.Store(true)
					load.begin(f[1])
					fmt.Fprintln(c, "ok")
				case "dirty":
					var mib, rate int
					fmt.Sscan(strings.Join(f[1:], " "), &mib, &rate)
					memory.on.Store(true)
					go memory.run(mib, rate)
					fmt.Fprintln(c, "ok")
				case "dirtied":
					fmt.Fprintln(c, memory.pages.Load())
				case "rest":
					memory.on.Store(false)
					load.on.Store(false)
					load.mu.Lock()
					load.mu.Unlock()
					fmt.Fprintln(c, "ok")
				case "verify":
					fmt.Fprintln(c, load.verify(f[1]))
				case "read":
					fmt.Sscan(strings.Join(f[1:], " "), &disk, &block)
					word, err := onDisk(disk, block, "")
					fmt.Fprintln(c, word, err)
				}
			}
		}()
	}
}

// churn keeps writing, and keeps in memory what the disk must hold.
type churn struct {
	on   atomic.Bool
	mu   sync.Mutex // held for a write together with its entry in want, and by verify
	want map[int64]string
}

// The blocks that churn writes to.
const churnFrom, churnTo = 1000, 1500

// begin has something written before it returns, and more behind.
func (l *churn) begin(disk string) {
	l.write(disk, 0)
	go func() {
		for n := int64(1); l.on.Load(); n++ {
			l.write(disk, n)
		}
	}()
}

func (l *churn) write(disk string, n int64) {
	block, word := churnFrom+n*7919%(churnTo-churnFrom), fmt.Sprint("n", n)
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := onDisk(disk, block, word); err != nil {
		word = err.Error()
	}
	if l.want == nil {
		l.want = make(map[int64]string)
	}
	l.want[block] = word
}

func (l *churn) verify(disk string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for block, want := range l.want {
		if got, err := onDisk(disk, block, ""); err != nil || got != want {
			return fmt.Sprintf("block %d is %q, %v; memory says %q", block, got, err, want)
		}
	}
	if len(l.want) == 0 {
		return "nothing was written"
	}
	return "good"
}

// onDisk writes a word into a block of 4 KiB, or reads it.
func onDisk(disk string, block int64, word string) (string, error) {
	fd, err := unix.Open("/dev/"+disk, unix.O_RDWR|unix.O_DIRECT|unix.O_SYNC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	const size = 4096
	b := make([]byte, 2*size)
	b = b[size-int(uintptr(unsafe.Pointer(&b[0]))%size):][:size] // aligned, for O_DIRECT
	if word == "" {
		_, err := unix.Pread(fd, b, block*size)
		return strings.TrimRight(string(b), "\x00"), err
	}
	copy(b, word)
	_, err = unix.Pwrite(fd, b, block*size)
	return word, err
}

// dirty keeps writing to memory.
type dirty struct {
	on    atomic.Bool
	pages atomic.Int64 // written so far
}

// run writes to mib MiB of memory round and round, at rate MiB per second of an undisturbed
// CPU. It counts work, not time: with less of a CPU, as when QEMU throttles it, it writes
// less.
func (d *dirty) run(mib, rate int) {
	const page = 4096
	memory := make([]byte, mib<<20)
	// How much work a page is worth. The best of several: the host may be busy.
	const work = 1 << 16
	best := time.Hour
	for range 20 {
		began := time.Now()
		sink = spin(work)
		best = min(best, time.Since(began))
	}
	each := int(float64(work) * float64(page) / float64(rate<<20) / best.Seconds())
	for d.on.Load() {
		for at := 0; at < len(memory) && d.on.Load(); at += page {
			memory[at]++
			d.pages.Add(1)
			sink = spin(each)
		}
	}
}

// sink keeps the compiler from leaving out the work.
var sink int

func spin(n int) (x int) {
	for i := range n {
		x ^= i
	}
	return x
}
