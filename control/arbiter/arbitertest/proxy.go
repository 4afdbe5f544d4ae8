// SPDX-License-Identifier: Apache-2.0

package arbitertest

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// Proxy is a TCP port of loopback with etcd behind it. It can catch a request on
// its way, which it knows by its bytes.
type Proxy struct {
	etcd     *Etcd
	listener net.Listener
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
	traps []*Caught
	ended bool
}

// NewProxy opens one, which ends with the test.
func NewProxy(t testing.TB, e *Etcd) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{etcd: e, listener: l}
	p.wg.Add(1)
	go p.accept()
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		p.ended = true
		for _, c := range p.conns {
			c.Close()
		}
		for _, c := range p.traps {
			c.resume()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

// Addr is the endpoint to give to a client.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Caught is a request that a Proxy keeps back, and with it its connection.
type Caught struct {
	Held chan struct{} // closed when there is one

	marker   []byte
	closed   bool // under the Proxy's mu: it has one
	client   net.Conn
	server   net.Conn
	frame    []byte
	stream   uint32
	once     sync.Once
	released chan struct{} // closed: the connection goes on
	goesOn   atomic.Bool   // and its answers reach the client
	answered chan struct{} // closed: the server has answered, and the answer is lost
}

// Catch keeps the next request that contains marker. It takes a connection in the
// clear.
func (p *Proxy) Catch(marker string) *Caught {
	c := &Caught{Held: make(chan struct{}), marker: []byte(marker), released: make(chan struct{}), answered: make(chan struct{})}
	p.mu.Lock()
	p.traps = append(p.traps, c)
	p.mu.Unlock()
	return c
}

func (c *Caught) resume() { c.once.Do(func() { close(c.released) }) }

// Wait until a request is caught.
func (c *Caught) Wait(t testing.TB) {
	t.Helper()
	await(t, c.Held, "no request was caught")
}

func await(t testing.TB, c <-chan struct{}, otherwise string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal(otherwise)
	}
}

// Release sends the request on, as if nothing had been.
func (c *Caught) Release(t testing.TB) {
	t.Helper()
	c.goesOn.Store(true)
	c.send(t)
	c.resume()
}

// Break ends the client's connection. The server's stays, and the request can
// still be delivered.
func (c *Caught) Break() { c.client.Close() }

// Deliver sends the request on, and returns when the server has answered. The
// answer is lost.
func (c *Caught) Deliver(t testing.TB) {
	t.Helper()
	c.send(t)
	await(t, c.answered, "etcd did not answer the request")
}

func (c *Caught) send(t testing.TB) {
	t.Helper()
	if _, err := c.server.Write(c.frame); err != nil {
		t.Fatalf("send the caught request on: %v", err)
	}
}

func (p *Proxy) accept() {
	defer p.wg.Done()
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		network, address := p.etcd.address()
		server, err := net.Dial(network, address)
		if err != nil { // etcd is dead: so is this
			client.Close()
			continue
		}
		p.mu.Lock()
		if p.ended {
			client.Close()
			server.Close()
			p.mu.Unlock()
			return
		}
		p.conns = append(p.conns, client, server)
		p.wg.Add(2)
		p.mu.Unlock()
		if p.etcd.opt.Cert != "" { // nothing to see
			go p.copy(client, server)
			go p.copy(server, client)
			continue
		}
		var caught atomic.Pointer[Caught]
		go p.requests(client, server, &caught)
		go p.answers(client, server, &caught)
	}
}

func (p *Proxy) copy(to, from net.Conn) {
	defer p.wg.Done()
	_, _ = io.Copy(to, from)
	to.Close()
}

const (
	http2Preface = 24
	http2Header  = 9
	http2Data    = 0
	endStream    = 1
)

// frame reads an HTTP/2 frame.
func frame(r io.Reader) (b []byte, kind, flags byte, stream uint32, err error) {
	b = make([]byte, http2Header)
	if _, err = io.ReadFull(r, b); err != nil {
		return
	}
	n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
	kind, flags, stream = b[3], b[4], binary.BigEndian.Uint32(b[5:])
	b = append(b, make([]byte, n)...)
	_, err = io.ReadFull(r, b[http2Header:])
	return
}

// requests copies frames to the server, until it has caught one.
func (p *Proxy) requests(client, server net.Conn, caught *atomic.Pointer[Caught]) {
	defer p.wg.Done()
	defer server.Close()
	if _, err := io.CopyN(server, client, http2Preface); err != nil {
		return
	}
	for {
		b, kind, _, stream, err := frame(client)
		if err != nil {
			return
		}
		if c := p.trap(kind, b); c != nil {
			c.client, c.server, c.frame, c.stream = client, server, b, stream
			caught.Store(c)
			close(c.Held)
			<-c.released // until then the server's connection outlives the client's
			continue
		}
		if _, err := server.Write(b); err != nil {
			return
		}
	}
}

// trap returns who catches a frame, and is not set any more then.
func (p *Proxy) trap(kind byte, b []byte) *Caught {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.traps {
		if !c.closed && kind == http2Data && bytes.Contains(b, c.marker) {
			c.closed = true
			return c
		}
	}
	return nil
}

// answers copies frames to the client, but for the answer to a caught request.
func (p *Proxy) answers(client, server net.Conn, caught *atomic.Pointer[Caught]) {
	defer p.wg.Done()
	defer client.Close()
	for {
		b, _, flags, stream, err := frame(server)
		if err != nil {
			return
		}
		c := caught.Load()
		if c != nil && stream == c.stream && !c.goesOn.Load() {
			if flags&endStream != 0 {
				close(c.answered)
			}
			continue
		}
		if _, err := client.Write(b); err != nil && c == nil {
			return
		}
	}
}
