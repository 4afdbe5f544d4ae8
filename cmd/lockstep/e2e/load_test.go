// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/cmd/lockstep/demo"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// clientLoad asks until it is ended.
type clientLoad struct{ *demo.Load }

// end returns how many answers there were.
func (l *clientLoad) end(t *testing.T) int64 {
	t.Helper()
	n, err := l.End()
	if err != nil {
		t.Error(err)
	}
	return n
}

// openSession keeps asking over one connection.
func (p *livingPair) openSession() *clientLoad {
	p.t.Helper()
	c := p.mustDial(lt.Guest4, portEcho)
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	return &clientLoad{demo.StartLoad(2*time.Millisecond, func(i int) error { return echo(c, i) })}
}

// openWebLoad keeps loading a page of so many bytes, each time over a new connection.
func openWebLoad(p *pair, port, page string, size int, pause time.Duration) *clientLoad {
	return &clientLoad{demo.StartLoad(pause, func(int) error {
		c, err := p.dial(lt.Guest4, port, "")
		if err != nil {
			return err
		}
		defer c.Close()
		client := http.Client{Transport: &http.Transport{
			DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil },
		}}
		resp, err := client.Get("http://guest" + page)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK || len(body) != size {
			return fmt.Errorf("%s, %d bytes, %v", resp.Status, len(body), err)
		}
		return nil
	})}
}
