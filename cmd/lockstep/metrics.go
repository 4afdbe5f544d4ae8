// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/config"
)

// certificateFiles are those that a node uses, by the label of their metric.
func certificateFiles(c *config.Config, node string) map[string]string {
	files := make(map[string]string)
	add := func(name, file string) {
		if file != "" {
			files[name] = file
		}
	}
	ca, cert, _ := c.TLS.Files(node)
	add("ca", ca)
	add("cert", cert)
	if c.Arbiter.TLS != nil {
		f := c.Arbiter.TLS.On(node)
		add("arbiter_ca", f.CA)
		add("arbiter_cert", f.Cert)
	}
	return files
}

// serveMetrics serves Prometheus metrics for as long as the daemon runs, whatever its role, and
// also while it has none yet.
func serveMetrics(ctx context.Context, o runOptions) (stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.metrics)
	if err != nil {
		return nil, usageError{fmt.Errorf("--metrics %s: %w", o.metrics, err)}
	}
	socket := o.config.Socket(o.self.Name)
	mux := http.NewServeMux()
	process := api.Process{VM: o.config.VM, Node: o.self.Name, Version: versionString(), Certificates: certificateFiles(o.config, o.self.Name)}
	mux.Handle("GET /metrics", process.MetricsHandler(func() *api.Status {
		s, err := api.FetchStatus(ctx, socket)
		if err != nil {
			return nil
		}
		return &s
	}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, ErrorLog: slog.NewLogLogger(o.log.Handler(), slog.LevelWarn)}
	go srv.Serve(l)
	o.log.Info("metrics", "address", l.Addr())
	return func() { srv.Close() }, nil
}
