// SPDX-License-Identifier: Apache-2.0

// Package packaging has the tests of the packages that `make deb` and `make rpm` build: what
// is in them, and what their scripts do.
package packaging

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// need is for tools that a test runs.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lt.Missing(t, "%v: make deps installs it", err)
		}
	}
}

// output runs a command and returns what it printed.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var built struct {
	sync.Once
	dir string
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// build makes a package.
func build(t *testing.T, kind, dir string) string {
	t.Helper()
	return strings.TrimSpace(output(t, "./build", kind, dir, "v0.1.2-3-g1234567"))
}

// unpacked is the Debian package and the folder with its files, made once.
func unpacked(t *testing.T) (deb, root string) {
	t.Helper()
	need(t, "dpkg-deb")
	built.Do(func() {
		dir, err := os.MkdirTemp("", "lockstep-packaging-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir = dir
		output(t, "dpkg-deb", "-x", build(t, "deb", dir), filepath.Join(dir, "root"))
	})
	debs, err := filepath.Glob(filepath.Join(built.dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("the package was not built: %v, %v", debs, err)
	}
	return debs[0], filepath.Join(built.dir, "root")
}

// aCommand is a command's manual page.
var aCommand = regexp.MustCompile(`^usr/share/man/man8/lockstep-[a-z]+\.8\.gz$`)

// modes and names in the listing of a package, without sizes and times.
var listed = regexp.MustCompile(`(?m)^(\S+ root/root) .* \./(\S+[^/\n])/?$`)

// TestDeb: the package has what testdata/deb.txt lists, depends on nothing, is static, passes lintian, and
// is the same when it is built again.
func TestDeb(t *testing.T) {
	need(t, "lintian", "man")
	deb, root := unpacked(t)
	var list strings.Builder
	for _, m := range listed.FindAllStringSubmatch(output(t, "dpkg-deb", "-c", deb), -1) {
		if !aCommand.MatchString(m[2]) { // one for each command: TestMan
			list.WriteString(m[1] + " /" + m[2] + "\n")
		}
	}
	if want := read(t, "testdata/deb.txt"); list.String() != want {
		t.Errorf("the package has\n%s\nand not\n%s", list.String(), want)
	}
	if got := output(t, "dpkg-deb", "-f", deb, "Package", "Version", "Depends", "Pre-Depends"); got != "Package: lockstep\nVersion: 0.1.2+3.g1234567-1\n" {
		t.Errorf("%s", got)
	}
	binary := filepath.Join(root, "usr/bin/lockstep")
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the binary needs a dynamic linker")
		}
	}
	if got := output(t, binary, "version"); got != "lockstep v0.1.2-3-g1234567\n" {
		t.Errorf("version: %q", got)
	}
	if got := output(t, "lintian", "--fail-on", "error,warning", "--tag-display-limit", "0", deb); strings.Contains(got, "unused override") {
		t.Errorf("%s", got)
	}
	again := build(t, "deb", t.TempDir())
	if a, b := read(t, deb), read(t, again); a != b {
		t.Errorf("built again, the package is another one: %d bytes, and %d", len(a), len(b))
	}
}

// TestRPM: it has the Debian package's files and scripts.
func TestRPM(t *testing.T) {
	need(t, "rpm")
	rpm := build(t, "rpm", t.TempDir())
	want := read(t, "testdata/deb.txt")
	var files strings.Builder
	for line := range strings.Lines(want) {
		mode, file, _ := strings.Cut(strings.TrimSpace(line), " root/root ")
		switch {
		case strings.HasPrefix(mode, "d") && file != "/etc/lockstep", strings.Contains(file, "lintian"), strings.Contains(file, "changelog.Debian"):
			continue
		case strings.HasSuffix(file, "/_lockstep"):
			file = "/usr/share/zsh/site-functions/_lockstep"
		}
		files.WriteString(mode + " " + file + "\n")
	}
	var has strings.Builder
	for line := range strings.Lines(output(t, "rpm", "-qp", "--qf", "[%{FILEMODES:perms} %{FILENAMES}\n]", rpm)) {
		if _, file, _ := strings.Cut(strings.TrimSpace(line), " /"); !aCommand.MatchString(file) {
			has.WriteString(line)
		}
	}
	if has.String() != files.String() {
		t.Errorf("it has\n%s\nand not\n%s", has.String(), files.String())
	}
	scripts := output(t, "rpm", "-qp", "--scripts", rpm)
	for _, name := range []string{"postinst", "prerm", "postrm"} {
		if !strings.Contains(scripts, read(t, "scripts/"+name)) {
			t.Errorf("it lacks the script %s:\n%s", name, scripts)
		}
	}
	if got := output(t, "rpm", "-qp", "--qf", "%{NAME} %{VERSION}-%{RELEASE}", rpm); got != "lockstep 0.1.2+3.g1234567-1" {
		t.Errorf("%s", got)
	}
}

// TestVersions: a package is upgraded by one that was built of a later commit.
func TestVersions(t *testing.T) {
	need(t, "dpkg")
	last := ""
	for _, c := range []struct{ described, version string }{
		{"06f05b1", "0~git[0-9]+\\.06f05b1"}, {"v0.1.0-rc1", "0\\.1\\.0~rc1"}, {"v0.1.0-rc1-2-g06f05b1", "0\\.1\\.0~rc1\\+2\\.g06f05b1"},
		{"v0.1.0", "0\\.1\\.0"}, {"v0.1.0-3-g06f05b1", "0\\.1\\.0\\+3\\.g06f05b1"}, {"v0.1.0-3-g06f05b1-dirty", "0\\.1\\.0\\+3\\.g06f05b1\\+dirty"},
		{"v0.1.0-20-g06f05b1", "0\\.1\\.0\\+20\\.g06f05b1"}, {"v0.2.0", "0\\.2\\.0"},
	} {
		v := strings.TrimSpace(output(t, "./version", c.described))
		if !regexp.MustCompile("^" + c.version + "$").MatchString(v) {
			t.Errorf("%s is version %s of the package", c.described, v)
		}
		if last != "" {
			output(t, "dpkg", "--compare-versions", last, "lt", v)
		}
		last = v
	}
}

// TestUnit: systemd finds no fault with the unit, and the daemon may do no more than now.
func TestUnit(t *testing.T) {
	need(t, "systemd-analyze")
	_, root := unpacked(t)
	unit := filepath.Join(t.TempDir(), "lockstep@web1.service")
	text := strings.ReplaceAll(read(t, "lockstep@.service"), "/usr/bin/lockstep", filepath.Join(root, "usr/bin/lockstep"))
	if err := os.WriteFile(unit, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := output(t, "systemd-analyze", "verify", "--man=no", unit); out != "" {
		t.Errorf("%s", out)
	}
	output(t, "systemd-analyze", "security", "--offline=yes", "--threshold=62", unit)
}

// TestSample: the sample config is valid, and so is what it has as comments.
func TestSample(t *testing.T) {
	text := read(t, "examples/web1.yaml")
	file := filepath.Join(t.TempDir(), "web1.yaml")
	check := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := config.Load(file)
		if err != nil {
			t.Error(err)
		} else if len(c.Warnings) > 0 {
			t.Errorf("%v", c.Warnings)
		}
	}
	check(text)
	// A comment is a setting where nothing is between # and its key.
	setting := regexp.MustCompile(`(?m)^( *)#((?:  )*[a-z_]+:.*)$`)
	other := regexp.MustCompile(`^(qmp|peer|arbiter):`) // another way to do the same
	var all bytes.Buffer
	for line := range strings.Lines(text) {
		if m := setting.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil && !other.MatchString(m[2]) {
			line = m[1] + m[2] + "\n"
		}
		all.WriteString(line)
	}
	check(all.String())
	// Every section of the file is in the sample.
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(read(t, "../docs/CONFIG.md"), -1) {
		if !regexp.MustCompile(`(?m)^#?` + m[1] + ":").MatchString(text) {
			t.Errorf("the sample lacks %s", m[1])
		}
	}
}

// script runs a maintainer script in a mount namespace of its own, after what prepares that.
func script(t *testing.T, prepare, name string, args ...string) (string, error) {
	t.Helper()
	lt.NeedRoot(t)
	path, err := filepath.Abs("scripts/" + name)
	if err != nil {
		t.Fatal(err)
	}
	// Other tests' pins are none of its business, and neither is a systemd that runs.
	const private = `set -e; for m in $(awk '$3 == "bpf" {print $2}' /proc/self/mounts); do umount "$m"; done; mount -t tmpfs tmpfs /run; `
	out, err := exec.Command("unshare", append([]string{"--mount", "sh", "-c", private + prepare + `; exec sh "$@"`, "sh", path}, args...)...).CombinedOutput()
	return string(out), err
}

// TestRemovalRefused: no package is removed while a guest depends on what it has in the kernel.
func TestRemovalRefused(t *testing.T) {
	dir := t.TempDir()
	pins := "mount -t bpf bpf " + dir
	pinned := pins + "; mkdir -p " + dir + "/any/web1/alpha/nic0/ls_conf"
	for _, c := range []struct {
		name, prepare string
		args          []string
		refused       string
	}{
		{"nothing there", pins, []string{"remove"}, ""},
		{"pins", pinned, []string{"remove"}, "pinned in " + dir + "/any/web1/alpha"},
		{"pins, RPM", pinned, []string{"0"}, "pinned in"},
		{"pins, replaced by a package in conflict", pinned, []string{"deconfigure", "in-favour", "other", "1"}, "pinned in"},
		{"pins, upgrade", pinned, []string{"upgrade", "2"}, ""},
		{"pins, upgrade of an RPM", pinned, []string{"1"}, ""},
		{"pins, upgrade that failed", pinned, []string{"failed-upgrade", "2"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := script(t, c.prepare, "prerm", c.args...)
			if (err != nil) != (c.refused != "") || !strings.Contains(out, c.refused) {
				t.Errorf("%v, %s", err, out)
			}
			if c.refused != "" && !strings.Contains(out, "lockstep is not removed, because ") {
				t.Errorf("%s", out)
			}
		})
	}
}

// TestKernelNote: who installs lockstep on a kernel without tcx is told which one to install.
func TestKernelNote(t *testing.T) {
	for release, noted := range map[string]bool{
		"6.1.0-37-amd64": true, "6.5.0-0.deb12.4-amd64": true, "5.10": true,
		"6.6.0": false, "6.12.9+bpo-amd64": false, "7.0-rc1": false,
	} {
		stub := filepath.Join(t.TempDir(), "uname")
		if err := os.WriteFile(stub, []byte("#!/bin/sh\necho "+release+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		out, err := script(t, "PATH="+filepath.Dir(stub)+":$PATH", "postinst", "configure", "")
		if err != nil || strings.Contains(out, "apt install -t bookworm-backports linux-image-amd64") != noted || !noted && out != "" {
			t.Errorf("%s: %v, %q", release, err, out)
		}
	}
}

// TestDebian12Kernel: on Debian 12's own kernel, which has no tcx, doctor says what to install.
func TestDebian12Kernel(t *testing.T) {
	need(t, "qemu-system-x86_64")
	_, root := unpacked(t)
	kernel, initrd := qemutest.Image(t, qemutest.Guest{Service: filepath.Join(root, "usr/bin/lockstep"), Args: []string{"doctor"}, Env: []string{"PATH=/bin"}})
	console := filepath.Join(t.TempDir(), "console")
	vm := exec.Command("qemu-system-x86_64", "-accel", "tcg", "-m", "256M", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-append", qemutest.Append(nil), "-serial", "file:"+console)
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = vm.Process.Kill() // fails when it has ended
		_ = vm.Wait()
	}()
	qemutest.Await(t, console, "bookworm-backports linux-image-amd64")
	lt.Eventually(t, time.Minute, func() (bool, string) {
		out := read(t, console)
		return regexp.MustCompile(`kernel.*Linux 6\.1\.\S+ has no tcx, which came with 6\.6`).MatchString(out), out
	})
}
