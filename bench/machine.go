// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/report"
)

var (
	cpuModel    = regexp.MustCompile(`(?m)^(?:model name|Model|uarch)\s*:\s*(.*)$`)
	memTotal    = regexp.MustCompile(`(?m)^MemTotal:\s+(\d+) kB$`)
	qemuVersion = regexp.MustCompile(`version (\S+)`)
)

// machine describes this one. qemu is "" if none is used.
func machine(ctx context.Context, qemu, version string) (m report.Machine, err error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, fmt.Errorf("ask the kernel for its version: %w", err)
	}
	m = report.Machine{CPU: "unknown", Cores: runtime.NumCPU(), Kernel: unix.ByteSliceToString(uts.Release[:]), Lockstep: version}
	texts := make(map[string]string)
	for _, f := range []string{"/proc/cpuinfo", "/proc/meminfo", "/proc/sys/net/ipv4/tcp_congestion_control"} {
		b, err := os.ReadFile(f)
		if err != nil {
			return m, fmt.Errorf("describe this machine: %w", err)
		}
		texts[f] = string(b)
	}
	if model := cpuModel.FindStringSubmatch(texts["/proc/cpuinfo"]); model != nil {
		m.CPU = model[1]
	}
	if kb := memTotal.FindStringSubmatch(texts["/proc/meminfo"]); kb != nil {
		n, _ := strconv.Atoi(kb[1])
		m.MemoryMB = n >> 10
	}
	m.Congestion = strings.TrimSpace(texts["/proc/sys/net/ipv4/tcp_congestion_control"]) // new namespaces have the same
	if qemu != "" {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, qemu, "--version").Output()
		if err != nil {
			return m, fmt.Errorf("ask %s for its version: %w", qemu, err)
		}
		if v := qemuVersion.FindSubmatch(out); v != nil {
			m.QEMU = string(v[1])
		}
	}
	return m, nil
}

// noise is how long a fixed computation took, at several times.
type noise struct {
	fastest, slowest time.Duration
	sum              uint64 // or the compiler leaves the computation out
}

// sample takes some milliseconds, or a moment's interruption would count for much.
func (n *noise) sample() {
	began := time.Now()
	for i := range uint64(8 << 20) {
		n.sum = (n.sum ^ i) * 0x9e3779b97f4a7c15
	}
	took := time.Since(began)
	if n.fastest == 0 || took < n.fastest {
		n.fastest = took
	}
	n.slowest = max(n.slowest, took)
}

// spread is (slowest-fastest)/fastest, 0 without a sample.
func (n *noise) spread() float64 {
	if n.fastest == 0 {
		return 0
	}
	return float64(n.slowest-n.fastest) / float64(n.fastest)
}
