// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// credential is that of a user's processes; name is a name or uid:gid.
func credential(name string) (*syscall.Credential, error) {
	var errs []error
	number := func(s string) uint32 {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			errs = append(errs, fmt.Errorf("user %s: %q is no number", name, s)) // and must not become 0, which is root
		}
		return uint32(n)
	}
	if uid, gid, ok := strings.Cut(name, ":"); ok {
		c := &syscall.Credential{Uid: number(uid), Gid: number(gid)}
		return c, errors.Join(errs...)
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("user: %w", err)
	}
	c := &syscall.Credential{Uid: number(u.Uid), Gid: number(u.Gid)}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", name, err)
	}
	for _, g := range groups {
		c.Groups = append(c.Groups, number(g))
	}
	return c, errors.Join(errs...)
}

// checkUser finds out whether a user may use what QEMU opens again while it runs:
// the images and, on a secondary, the overlays' folders. "": QEMU has no user of its own.
func checkUser(user string, disks []Disk, secondary bool) error {
	if user == "" {
		return nil
	}
	c, err := credential(user)
	if err != nil {
		return err
	}
	may := func(what, path string, tests ...string) error {
		cmd := exec.Command("test", tests...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c}
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s %s: user %s has no access (%w); give it to that user, its folders too", what, path, user, err)
		}
		return nil
	}
	var errs []error
	for i := range disks {
		d := &disks[i]
		errs = append(errs, may("disk "+d.ID+": image", d.Image, "-r", d.Image, "-a", "-w", d.Image))
		if _, err := os.Stat(d.OverlayDir); secondary && err == nil {
			errs = append(errs, may("disk "+d.ID+": overlay_dir", d.OverlayDir, "-x", d.OverlayDir))
		}
	}
	return errors.Join(errs...)
}

// give makes a user the owner of a file that lockstep made for QEMU. "": nothing is done.
func give(user, path string) error {
	if user == "" {
		return nil
	}
	c, err := credential(user)
	if err != nil {
		return err
	}
	if err := os.Chown(path, int(c.Uid), int(c.Gid)); err != nil {
		return fmt.Errorf("give to user %s: %w", user, err)
	}
	return nil
}
