// SPDX-License-Identifier: Apache-2.0

package guestimage

import (
	"bytes"
	_ "embed" // of fetch.sh
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed fetch.sh
var fetch []byte

// Fetched reports whether kernel, modules and busybox are in dir.
func Fetched(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "ready"))
	return err == nil
}

// Fetch puts kernel, modules and busybox into dir, out of Debian's packages, which it downloads
// by apt and does not install.
func Fetch(dir string) error {
	for _, tool := range []string{"bash", "apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("the guest's kernel comes out of Debian's packages, by apt and dpkg, which are not here (%w); on another distribution run it in a container of Debian, or name a folder that `make deps` has made there with --guest", err)
		}
	}
	cmd := exec.Command("bash", "-s", dir)
	cmd.Stdin = bytes.NewReader(fetch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("download the guest's kernel: %w\n%s", err, out)
	}
	return nil
}
