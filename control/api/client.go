// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
)

// ErrNoDaemon means that nothing listens on a status socket.
var ErrNoDaemon = errors.New("no daemon runs")

// FetchStatus asks the daemon behind the status socket path for its status.
func FetchStatus(ctx context.Context, path string) (Status, error) {
	return call[Status](ctx, http.MethodGet, path, "status")
}

// FetchFlows asks for the guest's connections.
func FetchFlows(ctx context.Context, path string) ([]Flow, error) {
	return call[[]Flow](ctx, http.MethodGet, path, "flows")
}

func call[T any](ctx context.Context, method, path, topic string) (v T, err error) {
	client := http.Client{
		Timeout: map[string]time.Duration{http.MethodGet: askTimeout, http.MethodPost: failover.OrderTimeout + askTimeout}[method],
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}},
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://lockstep/"+topic, nil)
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return v, fmt.Errorf("%w (%s: %w)", ErrNoDaemon, path, err)
	}
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return v, fmt.Errorf("ask for %s: %w", topic, err)
	}
	if resp.StatusCode == http.StatusConflict {
		return v, errors.New(strings.TrimSpace(string(body))) // the daemon's reason
	}
	if resp.StatusCode != http.StatusOK {
		return v, fmt.Errorf("the daemon cannot report its %s: %s", topic, body)
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return v, fmt.Errorf("the daemon's %s make no sense, is it of another version? %w", topic, err)
	}
	return v, nil
}

// OrderCheckpoint asks the daemon behind the status socket path for a checkpoint.
func OrderCheckpoint(ctx context.Context, path string) (Checkpoint, error) {
	return call[Checkpoint](ctx, http.MethodPost, path, "checkpoint")
}

// OrderFailover has the daemon's host transmit alone.
func OrderFailover(ctx context.Context, path string, force bool) (FailoverDone, error) {
	topic := "failover"
	if force {
		topic += "?force=1"
	}
	return call[FailoverDone](ctx, http.MethodPost, path, topic)
}
