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

// credential is what processes of a user have: a name, or uid:gid.
func credential(name string) (*syscall.Credential, error) {
	number := func(s string) uint32 {
		n, perr := strconv.ParseUint(s, 10, 32)
		if perr != nil {
			return 0
		}
		return uint32(n)
	}
	if uid, gid, ok := strings.Cut(name, ":"); ok {
		return &syscall.Credential{Uid: number(uid), Gid: number(gid)}, nil
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
	return c, nil
}

// checkUser finds out whether the user may use what QEMU opens again while it runs:
// the images and, on a secondary, the overlays' folders.
func (s *Spec) checkUser(secondary bool) error {
	if s.User == "" {
		return nil
	}
	c, err := credential(s.User)
	if err != nil {
		return err
	}
	may := func(what, path string, tests ...string) error {
		cmd := exec.Command("test", tests...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c}
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s %s: user %s has no access (%w); give it to that user, its folders too", what, path, s.User, err)
		}
		return nil
	}
	var errs []error
	for i := range s.Disks {
		d := &s.Disks[i]
		errs = append(errs, may("disk "+d.ID+": image", d.Image, "-r", d.Image, "-a", "-w", d.Image))
		if _, err := os.Stat(d.OverlayDir); secondary && err == nil {
			errs = append(errs, may("disk "+d.ID+": overlay_dir", d.OverlayDir, "-x", d.OverlayDir))
		}
	}
	return errors.Join(errs...)
}

// give makes User the owner of files that lockstep made for QEMU.
func (s *Spec) give(paths ...string) error {
	if s.User == "" {
		return nil
	}
	c, err := credential(s.User)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := os.Chown(p, int(c.Uid), int(c.Gid)); err != nil {
			return fmt.Errorf("give to user %s: %w", s.User, err)
		}
	}
	return nil
}
