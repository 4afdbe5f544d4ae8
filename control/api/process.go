// SPDX-License-Identifier: Apache-2.0

package api

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Process is what the daemon's process knows of itself, whether it has a role yet or not.
type Process struct {
	VM, Node, Version string
	Certificates      map[string]string // PEM files that this node uses, by what they are: "ca", "cert"
}

// Registry has all metrics: the Status's ([NewStatusCollector]), and those of the process and of its certificates.
func (p Process) Registry(status func() *Status) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(NewStatusCollector(p.VM, p.Node, status), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "lockstep_build_info", Help: "Which lockstep this is, and the Go that built it: 1.",
			ConstLabels: prometheus.Labels{"vm": p.VM, "node": p.Node, "version": p.Version, "goversion": runtime.Version()},
		}, func() float64 { return 1 }),
		certificateCollector{p.Certificates, prometheus.NewDesc("lockstep_certificate_expiry_timestamp_seconds",
			"Unix time at which the first certificate in a file ends; files that cannot be read are left out.", []string{"certificate"},
			prometheus.Labels{"vm": p.VM, "node": p.Node})})
	return r
}

// MetricsHandler serves a Registry in the formats that Prometheus scrapes.
func (p Process) MetricsHandler(status func() *Status) http.Handler {
	return promhttp.HandlerFor(p.Registry(status), promhttp.HandlerOpts{})
}

// certificateCollector reads the files anew at each scrape, as the daemon does at each connection.
type certificateCollector struct {
	files map[string]string
	desc  *prometheus.Desc
}

func (c certificateCollector) Describe(out chan<- *prometheus.Desc) { out <- c.desc }

func (c certificateCollector) Collect(out chan<- prometheus.Metric) {
	for name, file := range c.files {
		if end, err := certificateEnd(file); err == nil {
			out <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(end.Unix()), name)
		}
	}
}

// certificateEnd is when the first certificate of a PEM file ends.
func certificateEnd(file string) (end time.Time, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return end, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return end, fmt.Errorf("%s: %w", file, err)
		}
		if end.IsZero() || cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	if end.IsZero() {
		return end, fmt.Errorf("%s holds no certificate", file)
	}
	return end, nil
}
