// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/lockstep-ft/lockstep/control/failover"
)

const askTimeout = 10 * time.Second

// Listen opens the status socket. A dead daemon's is replaced, a living
// one's is not.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	conn, err := (&net.Dialer{Timeout: askTimeout}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("a daemon already answers on %s; stop it first", path)
	case errors.Is(err, syscall.EAGAIN):
		return nil, fmt.Errorf("a daemon listens on %s and takes no connection: it stands still; stop it first", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove a dead daemon's status socket: %w", err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("protect the status socket: %w", err)
	}
	return l, nil
}

// Source is what the socket serves.
type Source interface {
	Status(context.Context) (Status, error)
	Flows(context.Context) ([]Flow, error)
	Checkpoint(context.Context) (Checkpoint, error)
	Failover(ctx context.Context, force bool) (FailoverDone, error)
}

// Serve answers until ctx ends.
func Serve(ctx context.Context, l net.Listener, d Source, log *slog.Logger) error {
	mux := http.NewServeMux()
	mux.Handle("GET /status", answer(d.Status))
	mux.Handle("GET /flows", answer(d.Flows))
	mux.Handle("POST /checkpoint", obey(func(ctx context.Context, _ *http.Request) (Checkpoint, error) { return d.Checkpoint(ctx) }))
	mux.Handle("POST /failover", obey(func(ctx context.Context, r *http.Request) (FailoverDone, error) {
		return d.Failover(ctx, r.URL.Query().Has("force"))
	}))
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: askTimeout,
		WriteTimeout:      askTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("status socket: %w", err)
	case <-ctx.Done():
	}
	// Whoever is being answered still looks at the data paths.
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer done()
	if srv.Shutdown(stop) != nil {
		srv.Close()
	}
	<-served
	return nil
}

func answer[T any](get func(context.Context) (T, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := get(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		reply(w, v)
	})
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // an error here is the asker's
}

// obey answers a POST.
func obey[T any](f func(context.Context, *http.Request) (T, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Longer than what is only read.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(failover.OrderTimeout + askTimeout))
		v, err := f(r.Context(), r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		reply(w, v)
	})
}
