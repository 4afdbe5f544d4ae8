// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// Of a real QEMU's monitor it is known which process it belongs to, which client it serves
// and whether it listens, also when QEMU does not answer.
func TestOwner(t *testing.T) {
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		lt.Missing(t, "no QEMU to ask: %v", err)
	}
	path := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.CommandContext(t.Context(), binary, "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "16M", "-S", "-qmp", "unix:"+path+",server=on,wait=off")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	eventually := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for late := time.After(30 * time.Second); !ok(); {
			select {
			case <-tick.C:
			case <-late:
				t.Fatal(what)
			}
		}
	}
	var served *net.UnixConn
	eventually("QEMU does not listen", func() bool {
		c, err := net.Dial("unix", path)
		if err == nil {
			served = c.(*net.UnixConn)
		}
		return err == nil
	})
	p, err := Owner(served)
	if err != nil || p.Pid() != cmd.Process.Pid || !p.Alive() {
		t.Fatalf("owner %+v, %v; want process %d", p, err, cmd.Process.Pid)
	}
	defer p.Release()
	client := func() string {
		t.Helper()
		who, err := p.Client(path)
		if err != nil {
			t.Fatal(err)
		}
		return who
	}
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	self := fmt.Sprintf("process %d (%s)", os.Getpid(), comm[:len(comm)-1])
	eventually("QEMU does not serve its client", func() bool { return client() == self })

	// A client that waits for its turn is not served, nor is one that has closed its end,
	// though a QEMU that is stopped has not noticed yet.
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually("QEMU does not stand still", p.Stopped)
	waits, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	served.Close()
	if who := client(); who != "" {
		t.Errorf("QEMU serves %q", who)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually("QEMU does not serve the next", func() bool { return client() == self && !p.Stopped() })

	listens := func(want bool, path string) {
		t.Helper()
		if got, err := p.Listens(path); got != want || err != nil {
			t.Errorf("listens on %s: %v, %v", path, got, err)
		}
	}
	listens(true, path)
	listens(false, path+"x")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	listens(true, path)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Error("the end of QEMU is not seen")
	}
}
