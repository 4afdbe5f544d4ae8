// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/api"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Programs that people use, in real guests: their randomness differs between the two,
// so that they cost checkpoints, which are logged and not judged.

const (
	portHTTP2   = "8444"
	portSSH     = "22"
	serviceName = "www.guest.test"
)

// serveReal is the guest's service where it runs real servers.
func serveReal() {
	start := func(name string, args ...string) {
		cmd := exec.Command(name, args...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, name, err)
			os.Exit(1)
		}
	}
	for path, text := range map[string]string{
		"/etc/passwd": "root::0:0:root:/:/bin/sh\n", "/etc/group": "root:x:0:\n", "/etc/shells": "/bin/sh\n", "/etc/nsswitch.conf": "passwd: files\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	for _, dir := range []string{"/.ssh", "/dev/pts", "/etc/dropbear", "/run", "/var/run", "/var/log"} {
		os.MkdirAll(dir, 0o700)
	}
	os.Chmod("/", 0o755)
	exec.Command("/bin/busybox", "mount", "-t", "devpts", "pts", "/dev/pts").Run()
	if b, err := os.ReadFile("/authorized_keys"); err == nil {
		os.WriteFile("/.ssh/authorized_keys", b, 0o600)
	}
	start("/usr/bin/redis-server", "--port", portRedis, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", "/tmp")
	start("/usr/sbin/dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--address=/"+serviceName+"/"+lt.Guest4)
	start("/usr/sbin/dropbear", "-F", "-E", "-R", "-p", portSSH, "-s", "-P", "/tmp/dropbear.pid")
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<33, 0), DNSNames: []string{serviceName}}
	der, err := x509.CreateCertificate(sameBytes{}, template, template, key.Public(), key)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	srv := &http.Server{
		Addr: ":" + portHTTP2, TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, r.Proto)
			io.Copy(onlyWriter{w}, io.LimitReader(&pattern{}, 100_000))
		}),
	}
	servePort(portEcho, func(c *net.TCPConn) { io.Copy(onlyWriter{c}, onlyReader{c}) })
	fmt.Println("ready")
	fmt.Fprintln(os.Stderr, srv.ListenAndServeTLS("", ""))
	os.Exit(1)
}

// libraries are a program and what it is linked with, where the guest finds them.
func libraries(t *testing.T, programs ...string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for _, program := range programs {
		files[program] = program
		out, err := exec.Command("ldd", program).Output()
		if err != nil {
			lt.Missing(t, "%s: %v", program, err)
		}
		for word := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(word, "/") {
				files[word] = word
			}
		}
	}
	return files
}

// TestGuestServices: SSH, redis, HTTP/2 over TLS and DNS in real guests, with clients
// that people use: right through checkpoints and a failover.
func TestGuestServices(t *testing.T) {
	dir := t.TempDir()
	id := filepath.Join(dir, "id")
	lt.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", id)
	files := libraries(t, "/usr/bin/redis-server", "/usr/sbin/dnsmasq", "/usr/sbin/dropbear")
	files["/authorized_keys"] = id + ".pub"
	p := newLivingPairOf(t, 0, "compare: {timeout: 500ms}", qemutest.Guest{Env: []string{actAs + "=real services"}, Files: files}, qemutest.Memory+(128<<20))
	p.start()
	client := func(name string, args ...string) string {
		t.Helper()
		cmd := lt.Command(p.Client, "timeout", append([]string{"60", name}, args...)...)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
		}
		return strings.TrimSpace(string(out))
	}
	ssh := []string{"-i", id, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=" + filepath.Join(dir, "known"), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "root@" + lt.Guest4}
	resolver := net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (c net.Conn, err error) {
		lt.In(t, p.Client, func() { c, err = net.Dial(network, lt.Guest4+":53") })
		return c, err
	}}
	all := func(round int) {
		t.Helper()
		value := fmt.Sprintf("value %d", round)
		if got := client("redis-cli", "-h", lt.Guest4, "set", "key", value); got != "OK" {
			t.Errorf("redis: %q", got)
		}
		if got := client("redis-cli", "-h", lt.Guest4, "get", "key"); got != value {
			t.Errorf("redis: %q", got)
		}
		if got := client("curl", "-sk", "--http2", "--max-time", "50", "https://"+lt.Guest4+":"+portHTTP2+"/"); !strings.HasPrefix(got, "HTTP/2.0\n") || len(got) < 100_000 {
			t.Errorf("HTTP/2: %d bytes, %.20q", len(got), got)
		}
		if got := client("ssh", append(ssh, fmt.Sprintf("echo shell %d", round))...); got != fmt.Sprintf("shell %d", round) {
			t.Errorf("ssh: %q", got)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if got, err := resolver.LookupHost(ctx, serviceName+"."); err != nil || !slices.Contains(got, lt.Guest4) {
			t.Errorf("DNS: %q, %v", got, err)
		}
	}
	lt.Eventually(t, time.Minute, func() (bool, string) { // they begin when the echo does
		for _, port := range []string{portRedis, portSSH, portHTTP2} {
			c, err := p.dial(lt.Guest4, port, "")
			if err != nil {
				return false, err.Error()
			}
			c.Close()
		}
		return true, ""
	})
	all(0)
	// A shell that stays open through it all.
	shell := lt.Command(p.Client, "ssh", append(ssh, "cat")...)
	in, err := shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		shell.Process.Kill()
		shell.Wait()
	})
	line := func(n int) {
		t.Helper()
		want := fmt.Sprintf("line %d\n", n)
		if _, err := io.WriteString(in, want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(out, got); err != nil || string(got) != want {
			t.Fatalf("the shell says %q, %v", got, err)
		}
	}
	line(0)
	s := p.status("alpha")
	t.Logf("%d checkpoints so far", s.CheckpointsDone)
	p.killQEMU("alpha")
	line(1)
	all(1)
	p.await("beta", func(s *api.Status) bool { return s.State == "solo" })
	p.rejoin("alpha")
	p.covered()
	line(2)
	all(2)
	t.Logf("%d checkpoints on the second host", p.status("beta").CheckpointsDone)
}
