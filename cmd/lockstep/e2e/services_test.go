// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

const (
	portHTTP  = "8080"
	portRedis = "6379"
	httpBody  = 10 << 20
)

// serveHTTP answers a request for /N with N bytes, any other with 10 MB, and no Date.
func serveHTTP(c *net.TCPConn) {
	buf := make([]byte, 4096)
	for req := []byte(nil); ; {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if req = append(req, buf[:n]...); !bytes.Contains(req, []byte("\r\n\r\n")) {
			continue
		}
		size := int64(httpBody)
		fmt.Sscanf(string(req), "GET /%d ", &size)
		req = nil
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
		io.Copy(onlyWriter{c}, io.LimitReader(&pattern{}, size))
	}
}

// TestServices: programs that people use, unchanged, in both guests and at the
// client: curl and redis.
func TestServices(t *testing.T) {
	p := newPair(t, lt.Veth, "", "", "")
	both(p, serveRedis)
	t.Run("curl", func(t *testing.T) {
		want := sha256.New()
		io.Copy(want, io.LimitReader(&pattern{}, httpBody))
		for _, host := range []string{lt.Guest4, "[" + lt.Guest6 + "]"} {
			file := filepath.Join(t.TempDir(), "body")
			client(p.with(t), "curl", "-sS", "--max-time", "60", "-o", file, "http://"+host+":"+portHTTP+"/")
			if got := client(p.with(t), "sha256sum", file); !strings.HasPrefix(got, fmt.Sprintf("%x", want.Sum(nil))) {
				t.Errorf("%s: the body is not what both guests sent: %s", host, got)
			}
		}
	})
	t.Run("redis", func(t *testing.T) {
		redis := func(args ...string) string {
			return strings.TrimSpace(client(p.with(t), "redis-cli", append([]string{"-h", lt.Guest4}, args...)...))
		}
		for _, x := range []struct{ command, want string }{
			{"ping", "PONG"}, {"set key value", "OK"}, {"get key", "value"}, {"incr n", "1"}, {"incr n", "2"},
		} {
			if got := redis(strings.Fields(x.command)...); got != x.want {
				t.Errorf("%s: %q, want %q", x.command, got, x.want)
			}
		}
		redis("-r", "500", "incr", "n")
		if got := redis("get", "n"); got != "502" {
			t.Errorf("after 502 increments the counter is %s", got)
		}
	})
	if s := p.status("alpha"); s.CheckpointsRequested != 0 {
		t.Errorf("%d checkpoints requested: %+v", s.CheckpointsRequested, s.Causes)
	}
	p.await("alpha", func(s *api.Status) bool { return s.Connections == 0 })
}
