// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/control/config"
)

// The certificates whose ends are metrics are those that the node uses.
func TestCertificateFiles(t *testing.T) {
	c := newCLI(t)
	c.write(t, "tls.yaml", strings.Replace(pairYAML, "tls: {insecure: true}", `tls: {ca: ca.pem, cert: "{node}.pem", key: "{node}.key"}
arbiter: {type: etcd, endpoints: ["192.0.2.9:2379"], tls: {ca: etcd-ca.pem, cert: "{node}-etcd.pem", key: "{node}-etcd.key"}}`, 1))
	for file, want := range map[string]map[string]string{
		"pair.yaml": {},
		"tls.yaml":  {"ca": "ca.pem", "cert": "beta.pem", "arbiter_ca": "etcd-ca.pem", "arbiter_cert": "beta-etcd.pem"},
	} {
		conf, err := config.Load(filepath.Join(c.dir, file))
		if err != nil {
			t.Fatal(err)
		}
		got := certificateFiles(conf, "beta")
		for name, path := range got {
			got[name] = strings.TrimPrefix(path, c.dir+"/")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", file, diff)
		}
	}
}
