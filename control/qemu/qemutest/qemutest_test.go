// SPDX-License-Identifier: Apache-2.0

package qemutest_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/qemu/qemutest"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// In a guest the test binary is the service.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_GUEST") == "" {
		os.Exit(m.Run())
	}
	l, err := net.Listen("tcp", ":7000")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	disk, err := os.ReadDir("/disk")
	fmt.Printf("ready %q %v %v\n", os.Getenv("TEST_GUEST"), err, len(disk))
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go io.Copy(c, c)
	}
}

// A guest boots, sees its disk, and answers on IPv4 and IPv6.
func TestGuest(t *testing.T) {
	lt.NeedRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const name = "it's one"
	kernel, initrd := qemutest.Image(t, qemutest.Guest{Service: self, Env: []string{"TEST_GUEST=" + name}})
	dir := t.TempDir()
	qemutest.Disk(t, filepath.Join(dir, "disk"), 16<<20, true)

	ns := fmt.Sprintf("lsq%x", os.Getpid())
	lt.Run(t, "ip", "netns", "add", ns)
	defer lt.Run(t, "ip", "netns", "del", ns)
	for _, args := range []string{"link set lo up", "tuntap add tap0 mode tap", "addr add 10.77.0.1/24 dev tap0", "addr add fd77::1/64 dev tap0 nodad", "link set tap0 up"} {
		lt.Run(t, "ip", append([]string{"-n", ns}, strings.Fields(args)...)...)
	}
	log := filepath.Join(dir, "serial")
	cmd := lt.Command(ns, "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-m", fmt.Sprint(qemutest.Memory>>10, "K"),
		"-kernel", kernel, "-initrd", initrd, "-append", qemutest.Append([]string{"10.77.0.2/24,fd77::2/64"}),
		"-netdev", "tap,id=hn0,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=hn0",
		"-drive", "if=virtio,format=qcow2,file="+filepath.Join(dir, "disk"), "-serial", "file:"+log)
	cmd.Env = append(os.Environ(), qemutest.Preload(t))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	began := time.Now()
	// An empty ext4 has lost+found.
	qemutest.Await(t, log, fmt.Sprintf("ready %q <nil> 1", name))
	t.Log("up after", time.Since(began))

	lt.In(t, ns, func() {
		for _, addr := range []string{"10.77.0.2:7000", "[fd77::2]:7000"} {
			c, err := net.DialTimeout("tcp", addr, 30*time.Second)
			if err != nil {
				t.Error(err)
				continue
			}
			c.SetDeadline(time.Now().Add(30 * time.Second))
			fmt.Fprintln(c, "hello")
			if line, err := bufio.NewReader(c).ReadString('\n'); line != "hello\n" {
				t.Errorf("%s: %q, %v", addr, line, err)
			}
			c.Close()
		}
	})
}

// What a guest could not run is refused here, not there.
func TestDynamicService(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	// Image fails the test, so it runs in one of its own.
	if os.Getenv("TEST_DYNAMIC") != "" {
		qemutest.Image(t, qemutest.Guest{Service: sh})
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestDynamicService$")
	cmd.Env = append(os.Environ(), "TEST_DYNAMIC=1", "LOCKSTEP_REQUIRE_ALL=1")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "CGO_ENABLED=0") {
		t.Errorf("%v\n%s", err, out)
	}
}
