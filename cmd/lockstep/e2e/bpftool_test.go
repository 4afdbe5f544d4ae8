// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/control/api"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// bpftoolDoc is docs/BPFTOOL.md.
type bpftoolDoc struct {
	*pair
	text string
	// The numbers of the document's output that were seen, by those that are there now: a later command may name them.
	now map[string]string
}

var (
	aNumber = regexp.MustCompile(`\b\d+\b`)
	// What differs from run to run.
	changing = regexp.MustCompile(`\b[0-9a-f]{16}\b|\d+`)
)

// TestBpftool runs the commands of docs/BPFTOOL.md on a living pair: what they print is what the document shows, but for
// the numbers.
func TestBpftool(t *testing.T) {
	if _, err := exec.LookPath("bpftool"); err != nil && os.Getenv("LOCKSTEP_REQUIRE_ALL") == "" {
		t.Skip("bpftool is missing: apt-get install bpftool")
	}
	text, err := os.ReadFile("../../../docs/BPFTOOL.md")
	if err != nil {
		t.Fatal(err)
	}
	p := newPair(t, lt.Impaired, "", "", "compare: {slots: 64, timeout: 1m}")
	d := &bpftoolDoc{p, string(text), make(map[string]string)}
	c := p.mustDial(lt.Guest4, portEcho)
	living, waiting, ok := strings.Cut(d.text, "## A frame that waits")
	if !ok {
		t.Fatal("the document has no section about a frame that waits")
	}
	d.run(living, func() {
		if err := echo(c, 1); err != nil {
			t.Fatal(err)
		}
	})
	offset := func(name string) uint32 {
		m := regexp.MustCompile(`"` + name + `": (\d+)`).FindStringSubmatch(living)
		n, err := strconv.ParseUint(d.now[m[1]], 10, 32)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return uint32(n)
	}
	if off := offset("off"); off == 0 || off != offset("isn_svm")-offset("inc") {
		t.Errorf("the offset is %d, and the guests' first numbers are %d and %d", off, offset("isn_svm"), offset("inc"))
	}

	// All that reports the SVM's output to P is lost.
	p.Impair.Drop(t, lt.S2P, lt.Filter{Types: []uint8{uint8(bpf.LockstepLsRecTypeLS_REC_DATA), uint8(bpf.LockstepLsRecTypeLS_REC_ANSWER)}}, lt.AllOf)
	if _, err := c.Write([]byte("held request\n")); err != nil {
		t.Fatal(err)
	}
	p.await("alpha", func(s *api.Status) bool { return s.HeldPackets == 1 })
	out := d.run(waiting, func() {})
	if payload := strings.Trim(strings.ReplaceAll(fmt.Sprint([]byte("held request\n")), " ", ","), "[]"); !strings.Contains(out, payload) {
		t.Errorf("no %s in the slot:\n%s", payload, out)
	}
	d.tables(t)
	// It leaves when the records come again.
	p.Impair.Drop(t, lt.S2P, lt.Filter{}, 0)
	answer := make([]byte, len("held request\n"))
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Conn(c).Read(answer); err != nil || string(answer) != "held request\n" {
		t.Errorf("%q, %v", answer, err)
	}
}

// run runs the commands in a part of the document, each again until its output is as there; before comes before each
// try. It returns all output.
func (d *bpftoolDoc) run(part string, before func()) string {
	d.t.Helper()
	var all strings.Builder
	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(part, -1) {
		prompts := regexp.MustCompile(`(?m)^(alpha|beta)# (.*)\n`).FindAllStringSubmatchIndex(block[1], -1)
		for i, m := range prompts {
			end := len(block[1])
			if i+1 < len(prompts) {
				end = prompts[i+1][0]
			}
			node, command, want := block[1][m[2]:m[3]], block[1][m[4]:m[5]], block[1][m[1]:end]
			dir := "/sys/fs/bpf/lockstep/web1/" + node + "/nic0"
			if strings.HasPrefix(command, "cd ") {
				if command != "cd "+dir {
					d.t.Errorf("%q: the pins are in %s", command, dir)
				}
				continue
			}
			command = aNumber.ReplaceAllStringFunc(command, func(n string) string {
				if now := d.now[n]; now != "" {
					return now
				}
				return n
			})
			commands++
			lt.Eventually(d.t, 20*time.Second, func() (bool, string) {
				before()
				cmd := exec.Command("sh", "-c", command)
				cmd.Dir = strings.Replace(dir, "/sys/fs/bpf", filepath.Join(d.Dir, "bpf"), 1)
				out, err := cmd.CombinedOutput()
				if missing := d.compare(want, string(out)); missing != "" || err != nil {
					return false, fmt.Sprintf("%q: %v: nothing like %q in\n%s", command, err, missing, out)
				}
				all.Write(out)
				return true, ""
			})
		}
	}
	if commands < 3 {
		d.t.Errorf("%d commands found: does the test still look for the right thing?", commands)
	}
	return all.String()
}

// compare finds the document's lines in the output, in this order, and returns the first that is not there. "…" stands
// for lines, or for the rest of one.
func (d *bpftoolDoc) compare(want, out string) (missing string) {
	plain := func(line string) string {
		return changing.ReplaceAllString(strings.Join(strings.Fields(line), " "), "N")
	}
	lines := strings.Split(out, "\n")
	for w := range strings.Lines(want) {
		w, open := strings.CutSuffix(strings.TrimSpace(w), "…")
		if w == "" {
			continue
		}
		i := slices.IndexFunc(lines, func(l string) bool { return plain(l) == plain(w) || open && strings.HasPrefix(plain(l), plain(w)) })
		if i < 0 {
			return w
		}
		then, now := aNumber.FindAllString(w, -1), aNumber.FindAllString(lines[i], -1)
		for j, n := range then {
			if len(n) > 1 && j < len(now) { // a number of one digit is a mode or a count
				d.now[n] = now[j]
			}
		}
		lines = lines[i+1:]
	}
	return ""
}

// tables: the document's lists of maps and counters are whole and right.
func (d *bpftoolDoc) tables(t *testing.T) {
	named := map[string]bool{"ls_fast": true, "ls_fast_udp": true, "ls_scratch": true} // not pinned
	for _, node := range []string{"alpha", "beta"} {
		pins, err := filepath.Glob(filepath.Join(d.Dir, "bpf/lockstep/web1", node, "nic0/ls_*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, pin := range pins {
			named[filepath.Base(pin)] = true
		}
	}
	listed := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| ((?:`ls_\\w+`(?:, )?)+) \\|").FindAllStringSubmatch(d.text, -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			listed[strings.Trim(name, "`")] = true
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(named)), slices.Sorted(maps.Keys(listed))); diff != "" {
		t.Errorf("maps that there are (-), and that the document lists (+):\n%s", diff)
	}
	counters := 0
	check := func(name, n string) {
		counters++
		if i, err := strconv.Atoi(n); err != nil || bpf.ReasonName(i) != name {
			t.Errorf("the counter %s is %s, and not %s", n, bpf.ReasonName(i), name)
		}
	}
	for _, row := range regexp.MustCompile("(?m)\\| ([\\d, ]+) \\| (`.*`) \\|$").FindAllStringSubmatch(d.text, -1) {
		numbers, names := strings.Split(row[1], ", "), strings.Split(row[2], ", ")
		if len(numbers) != len(names) {
			t.Errorf("%q has as many numbers as names?", row[0])
			continue
		}
		for i, n := range numbers {
			check(strings.Trim(names[i], "`"), n)
		}
	}
	for _, m := range regexp.MustCompile("`(\\w+)` \\((\\d+)\\)").FindAllStringSubmatch(d.text, -1) {
		check(m[1], m[2])
	}
	if counters < 10 {
		t.Errorf("%d counters found", counters)
	}
}
