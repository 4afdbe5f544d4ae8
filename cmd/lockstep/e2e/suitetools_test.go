// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Ports of the servers that the tools load.
const (
	portNginx     = "8081"
	portNginxH2   = "8082"
	portMemcached = "11211"
	portDNS       = "53"
	portPing      = "11111" // sockperf's, UDP
	portPingTCP   = "11112"

	urlNginx = "http://" + lt.Guest4 + ":" + portNginx
)

// suites are the tools, each n times as long as in `make test`.
func suites(t *testing.T, n int) []suite {
	t.Helper()
	// Those that take no second and more; all sections take half a minute.
	sections := strings.Fields("generic http2/3 http2/5.3 http2/5.4 http2/5.5 http2/6.2 http2/6.3 http2/6.5 http2/6.7 http2/6.8 http2/6.9 http2/6.10 http2/7")
	if n > 1 {
		sections = nil
	}
	return []suite{
		{"redis-benchmark", serveRedis, func(p *pair) found { return redisBenchmark(p, n) }},
		{"wrk", serveNginx, func(p *pair) found { return wrk(p, n) }},
		{"h2load", serveNginx, func(p *pair) found { return h2load(p, n) }},
		{"h2spec", serveNginx, func(p *pair) found { return h2spec(p, sections...) }},
		{"memcslap", serveMemcached, func(p *pair) found { return memcslap(p, n) }},
		{"dnsperf/udp", serveNSD, func(p *pair) found { return dnsperf(p, "udp", n) }},
		{"dnsperf/tcp", serveNSD, func(p *pair) found { return dnsperf(p, "tcp", n) }},
		{"sockperf/fragments", serveSockperf, func(p *pair) found { return sockperf(p, n, "-p", portPing, "-m", "8000") }},
		{"sockperf/tcp", serveSockperf, func(p *pair) found { return sockperf(p, n, "-p", portPingTCP, "--tcp", "-m", "8000", "-r", "7900") }},
		{"udpgso_bench", onePort, func(p *pair) found { return udpgso(p, n) }},
	}
}

// number is the figure that a tool prints where the pattern's group is.
func number(p *pair, text, pattern string) float64 {
	p.t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if m == nil {
		p.t.Fatalf("nothing matches %s in:\n%s", pattern, text)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return v
}

// redisBenchmark: pipelined requests of many connections, where the answers do not depend on
// which connection is served first, and of one, where they would.
func redisBenchmark(p *pair, n int) found {
	p.t.Helper()
	var requests int
	begun := time.Now()
	for _, x := range []struct {
		conns string
		n     int
		tests string
	}{
		{"8", 2000 * n, "ping,set,get,mset"},
		{"1", 500 * n, "incr,lpush,rpush,lpop,rpop,sadd,hset,spop,zadd,zpopmin,lrange_100"},
	} {
		out := client(p, "redis-benchmark", "-h", lt.Guest4, "-p", portRedis, "-P", "16", "-c", x.conns, "-n", strconv.Itoa(x.n), "-t", x.tests, "--csv")
		if strings.Contains(out, "rror") {
			p.t.Errorf("redis-benchmark:\n%s", out)
		}
		requests += x.n * (strings.Count(out, "\n") - 1)
	}
	return found{rate: float64(requests) / time.Since(begun).Seconds(), unit: "requests/s"}
}

// serveNginx serves the files /1k and /100k by HTTP/1.1 and, in the clear, HTTP/2. Its answers
// have no Date, which would differ when the second changes between the guests' answers.
func serveNginx(p *pair, ns string) {
	p.t.Helper()
	dir := nginxDir(p, ns)
	www := filepath.Join(dir, "www")
	if err := os.MkdirAll(www, 0o755); err != nil {
		p.t.Fatal(err)
	}
	for name, size := range map[string]int64{"1k": 1 << 10, "100k": 100 << 10, "index.html": 500} {
		f, err := os.Create(filepath.Join(www, name))
		if err == nil {
			_, err = io.Copy(onlyWriter{f}, io.LimitReader(&pattern{}, size))
		}
		if err == nil {
			err = f.Close()
		}
		if err == nil { // Last-Modified and ETag
			err = os.Chtimes(f.Name(), time.Time{}, time.Unix(1<<30, 0))
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off;
user root;
pid %[1]s/pid;
error_log stderr;
load_module /usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so;
events {}
http {
	access_log off;
	more_clear_headers Date;
	root %[1]s/www;
	server {
		listen %[2]s;
		listen [::]:%[2]s;
		listen %[3]s http2;
	}
}
`, dir, portNginx, portNginxH2)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	begin(p, ns, "nginx", "-p", dir, "-e", "stderr", "-c", conf)
	listens(p, ns, portNginxH2)
}

// nginxDir is the folder of a guest's nginx, with what it serves in www.
func nginxDir(p *pair, ns string) string { return filepath.Join(p.Dir, "nginx-"+ns) }

func wrk(p *pair, n int) found {
	p.t.Helper()
	var rate float64
	for _, url := range []string{urlNginx + "/1k", "http://[" + lt.Guest6 + "]:" + portNginx + "/100k"} {
		out := client(p, "wrk", "-t", "1", "-c", "8", "-d", strconv.Itoa(n)+"s", "--timeout", "10s", url)
		if wrkComplains(out) {
			p.t.Errorf("wrk:\n%s", out)
		}
		rate += number(p, out, `Requests/sec: +([\d.]+)`)
	}
	return found{rate: rate, unit: "requests/s"}
}

// wrkComplains reports whether wrk got no answer, or one that it did not expect.
func wrkComplains(out string) bool {
	return strings.Contains(out, "errors") || strings.Contains(out, "Non-2xx") || strings.Contains(out, " 0 requests in")
}

func h2load(p *pair, n int) found {
	p.t.Helper()
	total := 500 * n
	out := client(p, "h2load", "-n", strconv.Itoa(total), "-c", "4", "-m", "8", "http://"+lt.Guest4+":"+portNginxH2+"/1k")
	if want := fmt.Sprintf("%[1]d done, %[1]d succeeded, 0 failed, 0 errored", total); !strings.Contains(out, want) || !strings.Contains(out, fmt.Sprintf("status codes: %d 2xx", total)) {
		p.t.Errorf("h2load, want %s:\n%s", want, out)
	}
	return found{rate: number(p, out, `finished in .*, ([\d.]+) req/s`), unit: "requests/s"}
}

func serveMemcached(p *pair, ns string) {
	p.t.Helper()
	// Without CAS, whose numbers count the requests of all connections.
	begin(p, ns, "memcached", "-u", "root", "-l", "0.0.0.0", "-p", portMemcached, "-t", "2", "-C")
	listens(p, ns, portMemcached)
}

func memcslap(p *pair, n int) found {
	p.t.Helper()
	const conns = 4
	var requests int
	begun := time.Now()
	for _, test := range []string{"set", "get", "mget"} {
		for _, protocol := range []string{"--non-blocking", "--binary"} {
			out := client(p, "memcslap", "--verbose", "--servers="+lt.Guest4+":"+portMemcached, "--concurrency="+strconv.Itoa(conns), "--execute-number="+strconv.Itoa(100*n), "--test="+test, protocol)
			if want := fmt.Sprintf(" %d keys by", 100*n*conns); !strings.Contains(out, want) {
				p.t.Errorf("memcslap, want%s:\n%s", want, out)
			}
			requests += 100 * n * conns
		}
	}
	return found{rate: float64(requests) / time.Since(begun).Seconds(), unit: "requests/s"}
}

// h2specTool is where Go has built h2spec, in the version that go.mod names.
var h2specTool = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "tool", "-n", "h2spec").Output()
	return strings.TrimSpace(string(out)), err
})

// h2spec: a client that breaks the rules of HTTP/2 in every way that it knows.
func h2spec(p *pair, sections ...string) found {
	p.t.Helper()
	tool, err := h2specTool()
	if err != nil {
		p.t.Fatalf("build h2spec: %v", err)
	}
	begun := time.Now()
	out, err := begin(p, p.Client, tool, append([]string{"-h", lt.Guest4, "-p", portNginxH2, "-P", "/1k", "-o", "1"}, sections...)...).end()
	took := time.Since(begun)
	var report []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "✔") || strings.Contains(line, "×") || strings.Contains(line, " tests, ") {
			report = append(report, strings.TrimSpace(line))
		}
	}
	if passed := strings.Count(out, "✔"); passed < 20 {
		p.t.Errorf("h2spec: %d cases passed, %v", passed, err)
	}
	return found{rate: float64(len(report)) / took.Seconds(), unit: "cases/s", report: strings.Join(report, "\n")}
}

// serveNSD serves a zone with short and long answers.
func serveNSD(p *pair, ns string) {
	p.t.Helper()
	dir := filepath.Join(p.t.TempDir(), ns)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	zone := "$ORIGIN suite.test.\n$TTL 3600\n@ SOA ns.suite.test. root.suite.test. 1 3600 600 86400 60\n@ NS ns\nns A " + lt.Guest4 + "\n"
	for i := range 50 {
		zone += fmt.Sprintf("host%[1]d A 192.0.2.%[1]d\nhost%[1]d AAAA 2001:db8::%[1]d\nhost%[1]d TXT \"%[2]s\"\n", i, strings.Repeat("long ", 1+i%50))
	}
	conf := fmt.Sprintf(`server:
	server-count: 1
	ip-address: 0.0.0.0
	username: ""
	zonesdir: "%[1]s"
	pidfile: ""
	database: ""
	zonelistfile: "%[1]s/zone.list"
	xfrdfile: ""
	rrl-ratelimit: 0
remote-control:
	control-enable: no
zone:
	name: suite.test
	zonefile: zone
`, dir)
	for name, text := range map[string]string{"zone": zone, "nsd.conf": conf} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	begin(p, ns, "nsd", "-d", "-c", filepath.Join(dir, "nsd.conf"))
	listens(p, ns, portDNS)
}

func dnsperf(p *pair, mode string, n int) found {
	p.t.Helper()
	var queries strings.Builder
	for i := range 51 { // the last name does not exist
		for _, typ := range []string{"A", "AAAA", "TXT"} {
			fmt.Fprintf(&queries, "host%d.suite.test %s\n", i, typ)
		}
	}
	file := filepath.Join(p.t.TempDir(), "queries")
	if err := os.WriteFile(file, []byte(queries.String()), 0o600); err != nil {
		p.t.Fatal(err)
	}
	out := client(p, "dnsperf", "-s", lt.Guest4, "-m", mode, "-d", file, "-n", strconv.Itoa(10*n), "-c", "4", "-q", "16")
	if total := 51 * 3 * 10 * n; !strings.Contains(out, fmt.Sprintf("Queries completed:    %d ", total)) ||
		!strings.Contains(out, fmt.Sprintf("NOERROR %d ", total*50/51)) || !strings.Contains(out, fmt.Sprintf("NXDOMAIN %d ", total/51)) {
		p.t.Errorf("dnsperf, want %d queries completed:\n%s", total, out)
	}
	return found{rate: number(p, out, `Queries per second: +([\d.]+)`), unit: "queries/s"}
}

func serveSockperf(p *pair, ns string) {
	p.t.Helper()
	begin(p, ns, "sockperf", "server", "-i", lt.Guest4, "-p", portPing)
	begin(p, ns, "sockperf", "server", "-i", lt.Guest4, "-p", portPingTCP, "--tcp")
	listens(p, ns, portPing)
	listens(p, ns, portPingTCP)
}

func sockperf(p *pair, n int, args ...string) found {
	p.t.Helper()
	out := client(p, "sockperf", append([]string{"ping-pong", "-i", lt.Guest4, "-t", strconv.Itoa(n), "--data-integrity"}, args...)...)
	if want := "# dropped messages = 0; # duplicated messages = 0; # out-of-order messages = 0"; !strings.Contains(out, want) {
		p.t.Errorf("sockperf, want %s:\n%s", want, out)
	}
	return found{rate: number(p, out, `\[Valid Duration\].*ReceivedMessages=(\d+)`) / number(p, out, `\[Valid Duration\] RunTime=([\d.]+) sec`), unit: "exchanges/s"}
}
