// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

// FuzzPeer: whatever the peer says on the control link, of a session that it begins rightly or
// wrongly, the daemon goes on, nothing that is held leaves, and the true peer gets its session
// afterwards. GOOD stands for what a good peer says first, KEYS and SIGN for good keys.
func FuzzPeer(f *testing.F) {
	hello, err := json.Marshal(goodHello())
	if err != nil {
		f.Fatal(err)
	}
	keys := base64.StdEncoding.EncodeToString(peerlink.KeyBytes(new(compare.Keys)))
	sign := base64.StdEncoding.EncodeToString(make([]byte, peerlink.SeedLen))
	session := `{"version":4,"vm":"web1","node":"alpha","role":"primary","term":5,"qmp":false,"config":"","nics":["02:00:00:00:00:01"],"epoch":1,"digest":"KEYS","sign":"SIGN"}`
	f.Fuzz(func(t *testing.T, toSecondary bool, said string) {
		if len(said) > 4096 {
			return
		}
		good := `{"type":"hello","hello":` + string(hello) + "}\n"
		if toSecondary {
			good = `{"type":"session","session":` + session + "}\n"
		}
		said = strings.NewReplacer("KEYS", keys, "SIGN", sign).Replace(strings.ReplaceAll(said, "GOOD", good))
		p, s := hosts(t, nil)
		if toSecondary {
			ln, err := net.Listen("tcp", p.opt.Control)
			if err != nil {
				t.Fatal(err)
			}
			s.start()
			conn, err := ln.Accept()
			ln.Close()
			if err != nil {
				t.Fatal(err)
			}
			hear(t, conn, said)
			p.start()
		} else {
			p.start()
			_, conn := dialConn(t, p.opt.Control)
			p.path.pvm(1000, "hello")
			p.await("a held frame", func(st api.Status) bool { return st.HeldPackets == 1 })
			hear(t, conn, said)
			s.start()
		}
		for _, h := range []*side{p, s} {
			// A secondary that was told to be in doubt is, until a checkpoint.
			h.await("the true peer", func(st api.Status) bool { return st.Peer.Connected })
			if out := sent(h.path, 0); len(out) > 0 || slices.Contains(h.path.since(0), "mode solo") {
				t.Errorf("%s: %q left, of %q", h.opt.Node, out, h.path.since(0))
			}
		}
	})
}

// hear has a daemon hear what is said, up to its end, and waits until it hangs up.
func hear(t *testing.T, conn net.Conn, said string) {
	t.Helper()
	defer conn.Close()
	go func() {
		_, _ = conn.Write([]byte(said)) // it may hang up before the end
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, _ = new(bytes.Buffer).ReadFrom(conn)
}
