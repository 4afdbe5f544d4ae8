// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// Load is a client that asks until it is ended.
type Load struct {
	Answers, Longest atomic.Int64 // how many so far; the longest wait for one, ns

	stop chan struct{}
	done chan error
}

// StartLoad asks again and again, with a pause between an answer and the next request. The
// first error ends it.
func StartLoad(pause time.Duration, ask func(i int) error) *Load {
	l := &Load{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() { l.done <- l.run(pause, ask) }()
	return l
}

func (l *Load) run(pause time.Duration, ask func(i int) error) error {
	for i := 0; ; i++ {
		began := time.Now()
		if err := ask(i); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		l.Answers.Add(1)
		if took := int64(time.Since(began)); took > l.Longest.Load() {
			l.Longest.Store(took)
		}
		select {
		case <-l.stop:
			return nil
		case <-time.After(pause):
		}
	}
}

// End returns how many answers there were, and the first error.
func (l *Load) End() (int64, error) {
	close(l.stop)
	err := <-l.done
	return l.Answers.Load(), err
}

// echo sends a line over c, which has to come back.
func echo(c net.Conn, i int) error {
	request := fmt.Appendf(nil, "request %d\n", i)
	if _, err := c.Write(request); err != nil {
		return err
	}
	got := make([]byte, len(request))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, request) {
		return fmt.Errorf("%q came back as %q", request, got)
	}
	return nil
}

// fetch loads a page of so many bytes over a connection of its own.
func fetch(c net.Conn, size int) error {
	defer c.Close()
	request, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://guest/%d", size), nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil },
	}}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && (answer.StatusCode != http.StatusOK || len(body) != size) {
		err = fmt.Errorf("the page is %q with %d bytes", answer.Status, len(body))
	}
	return err
}
