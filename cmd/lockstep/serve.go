// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"lockstep/control/config"
)

// startOptions are what `run` was asked for.
type startOptions struct {
	config      *config.Config
	self, other *config.Node
	primary     bool // the role to begin with
	log         *slog.Logger
	verifierLog bool
}

// daemon is a started daemon: its programs are in the kernel.
type daemon interface {
	// Run works until ctx ends or it cannot go on, and gives back what start took.
	Run(ctx context.Context) error
	Status() (Status, error)
	Flows() ([]Flow, error)
}

// serve runs d and answers on the status socket meanwhile.
func serve(ctx context.Context, o startOptions, d daemon) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l, err := listen(ctx, o.config, o.self)
	if err != nil {
		cancel()
		if e := d.Run(ctx); !errors.Is(e, context.Canceled) { // ends at once and gives back what start took
			err = errors.Join(err, e)
		}
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /status", answer(d.Status))
	mux.Handle("GET /flows", answer(d.Flows))
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: askTimeout,
		ErrorLog:          slog.NewLogLogger(o.log.Handler(), slog.LevelWarn),
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			o.log.Error("status socket failed; status and flows do not work until a restart", "err", err)
		}
	}()
	defer func() {
		// The socket goes last: who still gets an answer knows that the daemon lives.
		stop, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		if srv.Shutdown(stop) != nil {
			srv.Close()
		}
		<-served
	}()

	o.log.Info("running", "role", roleName(o.primary), "socket", l.Addr(), "version", versionString())
	notify(o.log, sd.SdNotifyReady)
	err = d.Run(ctx)
	notify(o.log, sd.SdNotifyStopping)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // stopped as asked
	}
	o.log.Info("stopped; programs and maps stay in the kernel, `lockstep unload` removes them")
	return err
}

func roleName(primary bool) string {
	if primary {
		return "primary"
	}
	return "secondary"
}

// listen opens the status socket. A dead daemon's is replaced, a living one's not.
func listen(ctx context.Context, c *config.Config, n *config.Node) (net.Listener, error) {
	path := c.Socket(n.Name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, c.Refuse("run_dir", fmt.Sprintf("cannot make the folder of the status socket: %v", err), "")
	}
	if conn, err := new(net.Dialer).DialContext(ctx, "unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("a daemon already answers for %s on node %s (%s); stop it first", c.VM, n.Name, path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the dead daemon's status socket: %w", err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, c.Refuse("run_dir", fmt.Sprintf("cannot open the status socket: %v", err), "")
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("protect the status socket: %w", err)
	}
	return l, nil
}

// answer makes a handler that tells what get returns.
func answer[T any](get func() (T, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		v, err := get()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(v) // an error here is the asker's
	})
}

// notify tells systemd, where it started us.
func notify(log *slog.Logger, state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		log.Warn("systemd does not listen", "err", err)
	}
}
