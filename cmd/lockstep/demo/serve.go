// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// Ports of the guest's services.
const (
	portEcho  = "7001"
	portClock = "7002" // to each line its time, which is no other guest's
	portHTTP  = "80"   // a request for /N gets N bytes
)

// Serve is what runs in the guest. It prints "ready" to out, and does not return without an error.
func Serve(out io.Writer) error {
	failed := make(chan error)
	for port, serve := range map[string]func(net.Conn){portEcho: serveEcho, portClock: serveClock, portHTTP: servePage} {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return fmt.Errorf("serve: %w", err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- fmt.Errorf("serve: %w", err)
					return
				}
				go func() {
					defer c.Close()
					serve(c)
				}()
			}
		}()
	}
	fmt.Fprintln(out, "ready")
	return <-failed
}

func serveEcho(c net.Conn) {
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		if _, err := c.Write(line); err != nil {
			return
		}
	}
}

func serveClock(c net.Conn) {
	for r := bufio.NewScanner(c); r.Scan(); {
		fmt.Fprintln(c, r.Text(), time.Now().UnixNano())
	}
}

// servePage has no Date in its answers, in which the guests would differ once a second.
func servePage(c net.Conn) {
	r := bufio.NewReader(c)
	size := 0
	for first := true; ; first = false {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if first {
			_, _ = fmt.Sscanf(line, "GET /%d ", &size) // another page is empty
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	page := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", size)
	_, _ = c.Write(append(page, bytes.Repeat([]byte("lockstep"), size/8+1)[:max(0, size)]...))
}
