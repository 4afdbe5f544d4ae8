// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// pinFolder is where a NIC's maps and links are pinned, pin_dir/vm/node/nicN: the maps
// by name, the links as "link_" + program name. It is filled beside its place and
// renamed into it, so that a folder that exists is whole.
type pinFolder string

const linkPrefix = "link_"

// bpffs refuses names with a dot.
var pinName = strings.NewReplacer("%", "%25", ".", "%2e")

func nodeDir(pinDir, vm, node string) string {
	return filepath.Join(pinDir, pinName.Replace(vm), pinName.Replace(node))
}

func nicDir(pinDir, vm, node string, nic int) pinFolder {
	return pinFolder(filepath.Join(nodeDir(pinDir, vm, node), fmt.Sprintf("nic%d", nic)))
}

func (p pinFolder) path(name string) string    { return filepath.Join(string(p), name) }
func (p pinFolder) link(program string) string { return p.path(linkPrefix + program) }

// staging is where the folder is filled; leftover is what an earlier daemon began to
// fill and did not finish.
func (p pinFolder) staging() pinFolder  { return p + "-new" }
func (p pinFolder) leftover() pinFolder { return p + "-left" }

func (p pinFolder) exists() bool {
	_, err := os.Stat(string(p))
	return !errors.Is(err, fs.ErrNotExist)
}

// stage makes an empty staging folder. Programs that are pinned in an older one may be
// all that guards the tap, so that one is kept as the leftover.
func (p pinFolder) stage() (pinFolder, error) {
	staging := p.staging()
	if err := os.Rename(string(staging), string(p.leftover())); err != nil && !errors.Is(err, os.ErrNotExist) {
		if err := removePins(string(staging)); err != nil { // the leftover has older ones
			return "", err
		}
	}
	if err := os.MkdirAll(string(staging), 0o700); err != nil {
		return "", fmt.Errorf("create pin folder: %w", err)
	}
	return staging, nil
}

// commit puts the staging folder in place.
func (p pinFolder) commit() error {
	if err := os.Rename(string(p.staging()), string(p)); err != nil {
		return fmt.Errorf("put pins in place: %w", err)
	}
	return nil
}

// CheckBPFFS makes sure that pins made under pinDir outlive this process: the
// folder must lie on a bpffs that the init process sees too.
func CheckBPFFS(pinDir string) error {
	dir := pinDir
	for {
		if _, err := os.Stat(dir); err == nil {
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pin_dir %s: %w", pinDir, err)
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("pin_dir %s: statfs %s: %w", pinDir, dir, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("pin_dir %s: %s is not on a bpffs; mount one: %s", pinDir, dir, mountBPF(pinDir))
	}
	var s unix.Stat_t
	if err := unix.Stat(dir, &s); err != nil {
		return fmt.Errorf("pin_dir %s: stat %s: %w", pinDir, dir, err)
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(s.Dev), unix.Minor(s.Dev))
	f, err := os.Open("/proc/1/mountinfo")
	if err != nil {
		// In a PID namespace without a visible init there is nothing to compare with.
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if fields := strings.Fields(sc.Text()); len(fields) > 2 && fields[2] == dev {
			return nil
		}
	}
	return fmt.Errorf("pin_dir %s: this bpffs is private to the daemon's mount namespace, its pins would vanish with the process "+
		"(`ip netns exec` does that); start the daemon with `nsenter --net=...`, or mount a bpffs in a shared mount", pinDir)
}

// mountBPF is how to have pinDir on a bpffs.
func mountBPF(pinDir string) string {
	const usual = "/sys/fs/bpf"
	at := filepath.Dir(pinDir)
	if at == usual || strings.HasPrefix(at, usual+"/") {
		return "mount -t bpf bpf " + usual
	}
	return fmt.Sprintf("mkdir -p %s && mount -t bpf bpf %[1]s", at)
}

// Lock takes the node's lock, held by a daemon as long as it lives.
func Lock(pinDir, vm, node string) (release func(), err error) {
	dir := nodeDir(pinDir, vm, node)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create pin folder: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pin folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// ErrLocked: a daemon of this VM and node is running.
var ErrLocked = errors.New("a lockstep daemon of this VM and node is running")

// removePins removes everything below dir, and dir. Removing a pinned link
// detaches its program, but at some later time: so detach first, or the next
// Open may find the tap still guarded by programs nobody has pinned.
func removePins(dir string) error {
	detach := func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasPrefix(filepath.Base(path), linkPrefix) {
			return nil // nothing to detach; RemoveAll says what is wrong
		}
		if l, err := link.LoadPinnedLink(path, nil); err == nil {
			// Where this fails, the removal of the pin does it.
			_ = l.Detach()
			_ = l.Close()
		}
		return nil
	}
	if err := errors.Join(filepath.WalkDir(dir, detach), os.RemoveAll(dir)); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}
