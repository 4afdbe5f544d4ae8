// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
)

// The end of a certificate is that of the first one in its file, as it is at the scrape.
func TestCertificateMetric(t *testing.T) {
	ca := peerlinktest.NewAuthority(t, "ca")
	end := time.Now().Add(30 * time.Minute).Truncate(time.Second)
	files := ca.Files("alpha", "beta", "web1", func(c *x509.Certificate) { c.NotAfter = end })
	both := filepath.Join(t.TempDir(), "both.pem")
	var chain []byte
	for _, file := range []string{files.CA, files.Cert} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, b...)
	}
	if err := os.WriteFile(both, chain, 0o600); err != nil {
		t.Fatal(err)
	}
	p := api.Process{VM: "web1", Node: "alpha", Certificates: map[string]string{"cert": files.Cert, "both": both, "key": files.Key, "gone": both + ".not"}}
	r := p.Registry(func() *api.Status { return nil })
	check := func(both, cert time.Time) {
		t.Helper()
		text := fmt.Sprintf(`# HELP lockstep_certificate_expiry_timestamp_seconds Unix time at which the first certificate in a file ends; files that cannot be read are left out.
# TYPE lockstep_certificate_expiry_timestamp_seconds gauge
lockstep_certificate_expiry_timestamp_seconds{certificate="both",node="alpha",vm="web1"} %d
lockstep_certificate_expiry_timestamp_seconds{certificate="cert",node="alpha",vm="web1"} %d
`, both.Unix(), cert.Unix())
		if err := testutil.GatherAndCompare(r, strings.NewReader(text), "lockstep_certificate_expiry_timestamp_seconds"); err != nil {
			t.Error(err)
		}
	}
	check(end, end)
	renewed := end.Add(time.Hour)
	ca.Fill(files, func(c *x509.Certificate) { c.NotAfter = renewed })
	check(end, renewed)
}

// What is scraped is what Prometheus's own tool accepts.
func TestPromtoolCheckMetrics(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil && os.Getenv("LOCKSTEP_REQUIRE_ALL") == "" {
		t.Skip("promtool is missing: apt-get install --no-install-recommends prometheus")
	}
	answer := httptest.NewRecorder()
	api.Process{VM: "web1", Node: "alpha", Version: "v1"}.MetricsHandler(api.FullStatus).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = bytes.NewReader(answer.Body.Bytes())
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}
