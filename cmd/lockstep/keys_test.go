// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control"
	"github.com/lockstep-ft/lockstep/control/peerlink"
	"github.com/lockstep-ft/lockstep/control/peerlink/peerlinktest"
	"github.com/lockstep-ft/lockstep/control/qemu"
)

const filesYAML = `tls:
  ca: certs/ca.pem
  cert: certs/{node}.pem
  key: certs/{node}.key
`

var protectedYAML = strings.Replace(pairYAML, "tls: {insecure: true}\n", filesYAML, 1)

func TestKeys(t *testing.T) {
	c := newCLI(t)
	c.write(t, "pair.yaml", protectedYAML)
	c.control = func(_ context.Context, o control.Options) error {
		if o.TLS == nil {
			t.Error("control runs without TLS")
		}
		for _, n := range o.NICs {
			n.Close()
		}
		return nil
	}
	const start = "run -c @/pair.yaml --node alpha --role primary"
	if code, _, stderr := c.run(t.Context(), start); code != 2 || lastLine(stderr) != "@/pair.yaml:6:7: open @/certs/ca.pem: no such file or directory; `lockstep keys` makes certificates" {
		t.Errorf("without certificates: exit %d, %s", code, stderr)
	}
	code, stdout, stderr := c.run(t.Context(), "keys -c @/pair.yaml -d @/certs")
	want := `made   @/certs/ca.pem
made   @/certs/ca.key
made   @/certs/alpha.pem
made   @/certs/alpha.key
made   @/certs/beta.pem
made   @/certs/beta.key
copy   ca.pem, alpha.pem and alpha.key to the host of alpha, as @/certs/ca.pem, @/certs/alpha.pem and @/certs/alpha.key
copy   ca.pem, beta.pem and beta.key to the host of beta, as @/certs/ca.pem, @/certs/beta.pem and @/certs/beta.key
copy   ca.key nowhere: whoever has it can be any node; keep it off all hosts
`
	if code != 0 || stdout != want || stderr != "" {
		t.Fatalf("exit %d, %s\n%s\nwant\n%s", code, stderr, stdout, want)
	}
	if code, _, stderr := c.run(t.Context(), start); code != 0 {
		t.Errorf("with certificates: exit %d, %s", code, stderr)
	}
	path := func(name string) string { return filepath.Join(c.dir, "certs", name) }
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(path(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, name := range []string{"ca.key", "alpha.key", "beta.key"} {
		if info, err := os.Stat(path(name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 600", name, info, err)
		}
	}
	block, _ := pem.Decode(read("beta.pem"))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil || !slices.Equal(cert.DNSNames, []string{"beta.web1"}) || cert.Subject.CommonName != "beta.web1" || cert.IsCA || time.Until(cert.NotAfter) < 9*365*24*time.Hour {
		t.Errorf("certificate of beta: %+v, %v", cert, err)
	}

	// Nothing is overwritten; what is missing is made by the same CA.
	was := map[string][]byte{}
	for _, name := range []string{"ca.pem", "ca.key", "alpha.pem", "alpha.key"} {
		was[name] = read(name)
	}
	refused := func(line, want string) {
		t.Helper()
		if code, stdout, stderr := c.run(t.Context(), line); code != 1 || !strings.Contains(stderr, want) || stdout != "" {
			t.Errorf("exit %d, %s%s, want %s", code, stdout, stderr, want)
		}
	}
	const again = "keys -c @/pair.yaml -d @/certs"
	refused(again, "@/certs has those of alpha and beta already, and nothing is overwritten")
	os.Remove(path("beta.pem"))
	refused(again, "@/certs/beta.key is there and @/certs/beta.pem is not")
	os.Remove(path("beta.key"))
	if code, stdout, stderr := c.run(t.Context(), again); code != 0 || !strings.HasPrefix(stdout, "made   @/certs/beta.pem\nmade   @/certs/beta.key\ncopy   ") {
		t.Errorf("the missing one: exit %d, %s%s", code, stdout, stderr)
	}
	for name, b := range was {
		if !bytes.Equal(b, read(name)) {
			t.Errorf("%s is another file now", name)
		}
	}
	for node, peer := range map[string]string{"alpha": "beta", "beta": "alpha"} {
		files := peerlink.Certificates{CA: path("ca.pem"), Cert: path(node + ".pem"), Key: path(node + ".key"), VM: "web1", Node: node, Peer: peer}
		if _, err := files.TLS(); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
	os.Remove(path("ca.key"))
	refused(again, "@/certs/ca.pem is there and @/certs/ca.key is not")
	os.Remove(path("ca.pem"))
	refused(again, "@/certs has a certificate of alpha but no CA")

	// Another node's certificate is refused at the start.
	c.write(t, "certs/ca.pem", string(was["ca.pem"]))
	c.write(t, "pair.yaml", strings.ReplaceAll(protectedYAML, "{node}", "beta"))
	if code, _, stderr := c.run(t.Context(), start); code != 2 || !strings.Contains(stderr, `@/pair.yaml:7:9: @/certs/beta.pem is the certificate of ["beta.web1"], and this node is "alpha.web1"; `) {
		t.Errorf("another node's: exit %d, %s", code, stderr)
	}
	c.write(t, "ca.yaml", strings.ReplaceAll(protectedYAML, "alpha:", "ca:"))
	if code, _, stderr := c.run(t.Context(), "keys -c @/ca.yaml -d @/more"); code != 2 || !strings.Contains(stderr, "a node called ca would have the CA's files") {
		t.Errorf("a node called ca: exit %d, %s", code, stderr)
	}
}

// TestKeysOfNoUse: success is said only of certificates that the daemons take.
func TestKeysOfNoUse(t *testing.T) {
	c := newCLI(t)
	for _, dir := range []string{"one", "two"} {
		if code, _, stderr := c.run(t.Context(), "keys -c @/pair.yaml -d @/"+dir); code != 0 {
			t.Fatalf("exit %d, %s", code, stderr)
		}
	}
	path := func(name string) string { return filepath.Join(c.dir, name) }
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(path(from), path(to)); err != nil {
			t.Fatal(err)
		}
	}
	// Alpha's is another CA's, and beta's is missing: nothing is made.
	for _, ext := range []string{".pem", ".key"} {
		move("two/alpha"+ext, "one/alpha"+ext)
		if err := os.Remove(path("one/beta" + ext)); err != nil {
			t.Fatal(err)
		}
	}
	code, stdout, stderr := c.run(t.Context(), "keys -c @/pair.yaml -d @/one")
	if code != 1 || stdout != "" || !strings.Contains(stderr, "those of alpha in @/one are of no use") || !strings.Contains(stderr, "is signed by") {
		t.Errorf("exit %d, %s%s", code, stdout, stderr)
	}
	if _, err := os.Stat(path("one/beta.key")); err == nil {
		t.Error("beta's was made")
	}
	// A certificate that cannot be written leaves no key.
	if os.Geteuid() != 0 {
		return
	}
	tiny := path("tiny")
	if err := errors.Join(os.Mkdir(tiny, 0o700), unix.Mount("none", tiny, "tmpfs", 0, "size=4k")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(tiny, 0); err != nil {
			t.Error(err)
		}
	})
	if code, stdout, stderr := c.run(t.Context(), "keys -c @/pair.yaml -d @/tiny"); code != 1 || stdout != "" || !strings.Contains(stderr, "no space left") {
		t.Errorf("on a full disk: exit %d, %s%s", code, stdout, stderr)
	}
	if left, err := os.ReadDir(tiny); err != nil || len(left) != 0 {
		t.Errorf("on a full disk: %v, %v", left, err)
	}
}

// A pair that has been insecure so far makes certificates too.
func TestKeysOfAnInsecurePair(t *testing.T) {
	c := newCLI(t)
	if code, stdout, _ := c.run(t.Context(), "keys -c @/pair.yaml -d @/certs"); code != 0 || !strings.Contains(stdout, "\ncopy   ca.pem, beta.pem and beta.key to the host of beta\n") {
		t.Errorf("exit %d, %s", code, stdout)
	}
}

// A certificate that an older lockstep made is refused at the start of a pair whose QEMUs would
// use it, and before by upgrade, while the guest still transmits; but not where the QEMUs use none.
func TestOldKeys(t *testing.T) {
	c := newCLI(t)
	var own, peers *qemu.TLS
	ran := 0
	c.control = func(_ context.Context, o control.Options) error {
		ran++
		own, peers = o.Failover.Own.TLS, o.Failover.Peers.TLS
		for _, n := range o.NICs {
			n.Close()
		}
		return nil
	}
	old := peerlinktest.NewAuthority(t, "CA one").Files("alpha", "beta", "web1", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	named := fmt.Sprintf("tls:\n  ca: %s\n  cert: %s\n  key: %s\n", old.CA, old.Cert, old.Key)
	config := strings.Replace(pairYAML, "tls: {insecure: true}\n", named, 1) + "arbiter: {type: none}\nstate_dir: state\n"
	c.write(t, "pair.yaml", config)
	const start = "run -c @/pair.yaml --node alpha --role primary"
	for _, line := range []string{start, "upgrade -c @/pair.yaml --node alpha"} {
		if code, _, stderr := c.run(t.Context(), line); code != 2 || !strings.Contains(stderr, "QEMU cannot use "+old.Cert+": its key usage has to be") || !strings.Contains(stderr, "`lockstep keys`") {
			t.Errorf("%s: exit %d, %s", line, code, stderr)
		}
	}
	c.write(t, "pair.yaml", strings.Replace(config, "tls:\n", "tls:\n  qemu: false\n", 1))
	if code, _, stderr := c.run(t.Context(), start); code != 0 || ran != 1 || own != nil || peers != nil {
		t.Errorf("with qemu: false: exit %d, %s, %v", code, stderr, own)
	}
	c.write(t, "pair.yaml", protectedYAML+"arbiter: {type: none}\nstate_dir: state\n")
	for _, line := range []string{"keys -c @/pair.yaml -d @/certs", start} {
		if code, _, stderr := c.run(t.Context(), line); code != 0 {
			t.Errorf("exit %d, %s", code, stderr)
		}
	}
	path := func(name string) string { return filepath.Join(c.dir, name) }
	want := qemu.TLS{CA: path("certs/ca.pem"), Cert: path("certs/alpha.pem"), Key: path("certs/alpha.key"), Peer: "beta.web1", Dir: path("run/web1-alpha.tls")}
	if ran != 2 || own == nil || *own != want || peers == nil || *peers != want {
		t.Errorf("the QEMUs have %+v, %+v, want %+v", own, peers, want)
	}
}
