// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
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
	portSockperf  = "11111"
)

// suites are the tools, each n times as long as in `make test`.
func suites(t *testing.T, n int) []suite {
	t.Helper()
	return []suite{
		{"redis-benchmark", serveRedis, func(p *pair) found { return redisBenchmark(p, n) }},
		{"wrk", serveNginx, func(p *pair) found { return wrk(p, n) }},
		{"h2load", serveNginx, func(p *pair) found { return h2load(p, n) }},
		{"memcslap", serveMemcached, func(p *pair) found { return memcslap(p, n) }},
		{"dnsperf/udp", serveNSD, func(p *pair) found { return dnsperf(p, "udp", n) }},
		{"dnsperf/tcp", serveNSD, func(p *pair) found { return dnsperf(p, "tcp", n) }},
		{"sockperf/fragments", serveSockperf, func(p *pair) found { return sockperf(p, n, "-m", "8000") }},
		{"sockperf/tcp", serveSockperf, func(p *pair) found { return sockperf(p, n, "--tcp", "-m", "8000", "-r", "7900") }},
	}
}

// number is the figure that a tool prints where the pattern's group is.
func (p *pair) number(text, pattern string) float64 {
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
		{"8", 500 * n, "ping,set,get,mset"},
		{"1", 200 * n, "incr,lpush,rpush,lpop,rpop,sadd,hset,spop,zadd,zpopmin,lrange_100"},
	} {
		out := p.client("redis-benchmark", "-h", lt.Guest4, "-p", portRedis, "-P", "16", "-c", x.conns, "-n", strconv.Itoa(x.n), "-t", x.tests, "--csv")
		if strings.Contains(out, "rror") {
			p.t.Errorf("redis-benchmark:\n%s", out)
		}
		p.t.Log(out)
		requests += x.n * (strings.Count(out, "\n") - 1)
	}
	return found{rate: float64(requests) / time.Since(begun).Seconds(), unit: "requests/s"}
}

// serveNginx serves the files /1k and /100k by HTTP/1.1 and, in the clear, HTTP/2. Its answers
// have no Date, which would differ when the second changes between the guests' answers.
func serveNginx(p *pair, ns string) {
	p.t.Helper()
	dir := filepath.Join(p.t.TempDir(), ns)
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
	p.program(ns, "nginx", "-p", dir, "-e", "stderr", "-c", conf)
	p.listens(ns, portNginxH2)
}

func wrk(p *pair, n int) found {
	p.t.Helper()
	var rate float64
	for _, url := range []string{"http://" + lt.Guest4 + ":" + portNginx + "/1k", "http://[" + lt.Guest6 + "]:" + portNginx + "/100k"} {
		out := p.client("wrk", "-t", "1", "-c", "8", "-d", strconv.Itoa(n)+"s", "--timeout", "10s", url)
		if strings.Contains(out, "errors") || strings.Contains(out, "Non-2xx") {
			p.t.Errorf("wrk:\n%s", out)
		}
		rate += p.number(out, `Requests/sec: +([\d.]+)`)
	}
	return found{rate: rate, unit: "requests/s"}
}

func h2load(p *pair, n int) found {
	p.t.Helper()
	total := 500 * n
	out := p.client("h2load", "-n", strconv.Itoa(total), "-c", "4", "-m", "8", "http://"+lt.Guest4+":"+portNginxH2+"/1k")
	if want := fmt.Sprintf("%[1]d done, %[1]d succeeded, 0 failed, 0 errored", total); !strings.Contains(out, want) || !strings.Contains(out, fmt.Sprintf("status codes: %d 2xx", total)) {
		p.t.Errorf("h2load, want %s:\n%s", want, out)
	}
	return found{rate: p.number(out, `finished in .*, ([\d.]+) req/s`), unit: "requests/s"}
}

func serveMemcached(p *pair, ns string) {
	p.t.Helper()
	// Without CAS, whose numbers count the requests of all connections.
	p.program(ns, "memcached", "-u", "root", "-l", "0.0.0.0", "-p", portMemcached, "-t", "2", "-C")
	p.listens(ns, portMemcached)
}

func memcslap(p *pair, n int) found {
	p.t.Helper()
	var requests float64
	begun := time.Now()
	for _, test := range []string{"set", "get", "mget"} {
		for _, binary := range []string{"--verbose", "--binary"} {
			out := p.client("memcslap", "--servers="+lt.Guest4+":"+portMemcached, "--concurrency=4", "--execute-number="+strconv.Itoa(100*n), "--flush", "--test="+test, binary)
			p.t.Log(out)
		}
		requests += 800 * float64(n)
	}
	return found{rate: requests / time.Since(begun).Seconds(), unit: "requests/s"}
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
	p.program(ns, "nsd", "-d", "-c", filepath.Join(dir, "nsd.conf"))
	p.listens(ns, portDNS)
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
	out := p.client("dnsperf", "-s", lt.Guest4, "-m", mode, "-d", file, "-n", strconv.Itoa(10*n), "-c", "4", "-q", "16")
	if total := 51 * 3 * 10 * n; !strings.Contains(out, fmt.Sprintf("Queries completed:    %d ", total)) ||
		!strings.Contains(out, fmt.Sprintf("NOERROR %d ", total*50/51)) || !strings.Contains(out, fmt.Sprintf("NXDOMAIN %d ", total/51)) {
		p.t.Errorf("dnsperf, want %d queries completed:\n%s", total, out)
	}
	return found{rate: p.number(out, `Queries per second: +([\d.]+)`), unit: "queries/s"}
}

func serveSockperf(p *pair, ns string) {
	p.t.Helper()
	for _, protocol := range [][]string{nil, {"--tcp"}} {
		p.program(ns, "sockperf", append([]string{"server", "-i", lt.Guest4, "-p", portSockperf}, protocol...)...)
	}
	p.listens(ns, portSockperf)
}

func sockperf(p *pair, n int, args ...string) found {
	p.t.Helper()
	out := p.client("sockperf", append([]string{"ping-pong", "-i", lt.Guest4, "-p", portSockperf, "-t", strconv.Itoa(n), "--data-integrity"}, args...)...)
	if want := "# dropped messages = 0; # duplicated messages = 0; # out-of-order messages = 0"; !strings.Contains(out, want) {
		p.t.Errorf("sockperf, want %s:\n%s", want, out)
	}
	return found{rate: p.number(out, `\[Valid Duration\].*ReceivedMessages=(\d+)`) / p.number(out, `\[Valid Duration\] RunTime=([\d.]+) sec`), unit: "exchanges/s"}
}
