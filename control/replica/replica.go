// SPDX-License-Identifier: Apache-2.0

// Package replica keeps a secondary's note of what its images are: the replica of a
// primary's disks as of a point, which that primary's QEMU knows by its name. With it a
// secondary that comes back needs only what was written since. Without one, or in doubt,
// everything is copied.
//
// The note says nothing any more once somebody else than the primary wrote to the images.
// What lockstep itself does removes it before. That somebody else did shows by the time of
// an image's last change: while the secondary's QEMU has the images, the note is touched
// again and again, and what changed later was changed by somebody else.
package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/durable"
)

const (
	// TouchEvery is between two touches.
	TouchEvery = time.Second
	// late is how much later than the last touch QEMU may have changed an image, and
	// lateCrash is that after a crash of the host, which may have lost the last ones.
	late      = 3 * time.Second
	lateCrash = time.Minute
)

// content is the note.
type content struct {
	Point  string
	Boot   string // ID of the host's boot in which it was written
	Inodes []uint64
}

// facts are what there is when a note is judged.
type facts struct {
	boot    string
	booted  time.Time
	touched time.Time // the note
	images  []image
}

type image struct {
	path    string
	file    bool // a regular file
	inode   uint64
	changed time.Time
}

// judge returns why the note says nothing about the images; nil: they are at its point.
func (c *content) judge(f *facts) error {
	limit, same := f.touched.Add(late), f.boot == c.Boot
	if !same {
		limit = f.touched.Add(lateCrash)
	}
	switch {
	case len(c.Inodes) != len(f.images):
		return errors.New("the note is of other disks")
	case f.boot == "":
		return errors.New("the host's boot is not known")
	case !same && f.booted.Before(f.touched):
		return errors.New("the host's clock went back")
	}
	for i, m := range f.images {
		switch {
		case !m.file:
			return fmt.Errorf("%s is no file, so that nothing shows whether somebody wrote to it", m.path)
		case m.inode != c.Inodes[i]:
			return fmt.Errorf("%s is another file", m.path)
		case m.changed.After(limit) || !same && m.changed.After(f.booted):
			return fmt.Errorf("%s was changed at %s, when no secondary had it", m.path, m.changed.Format(time.DateTime))
		}
	}
	return nil
}

// Note is a node's note. It may be used by several goroutines.
type Note struct {
	path   string
	images []string

	mu    sync.Mutex
	point string // "": there is no note
	ended bool   // the images are not a replica any more

	keep bool // mutation, only tests set it: a note outlives what makes it wrong
}

// Open returns the note at path of a node with these images. It may be that there is none.
func Open(path string, images []string) *Note { return &Note{path: path, images: images} }

// Point returns the point that the images are at; "": that is not known.
func (n *Note) Point() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.point
}

// Begin reads the note. held says that this secondary's QEMU has the images; else Begin is
// called before that is started, and judges the note. The error says why there is no use
// in a note that there was; it is removed.
func (n *Note) Begin(held bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.point, n.ended = "", false
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var c content
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err == nil && !held {
		var f *facts
		if f, err = n.look(); err == nil {
			err = c.judge(f)
		}
	}
	if err == nil || n.keep {
		// It is of this boot from now on.
		if err = n.write(c.Point); err == nil {
			return nil
		}
	}
	return errors.Join(err, n.remove())
}

// Save notes that the images are at a point: what was written before it is durable. The
// note outlives a crash of the host when Save returns nil.
func (n *Note) Save(point string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ended {
		return errors.New("the images are no replica any more")
	}
	return n.write(point)
}

func (n *Note) write(point string) error {
	f, err := n.look()
	if err != nil {
		return err
	}
	c := content{Point: point, Boot: f.boot}
	for _, m := range f.images {
		c.Inodes = append(c.Inodes, m.inode)
	}
	b, err := json.Marshal(c)
	if err == nil {
		err = durable.Replace(n.path, b)
	}
	if err == nil {
		n.point = point
	}
	return err
}

// Touch notes that QEMU still has the images.
func (n *Note) Touch() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.point == "" {
		return nil
	}
	return os.Chtimes(n.path, time.Time{}, time.Now())
}

// End removes the note: somebody else than the primary is about to write to the images.
// When it returns nil, a crash of the host does not bring the note back.
func (n *Note) End() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ended = true
	if n.keep {
		return nil
	}
	return n.remove()
}

func (n *Note) remove() error {
	n.point = ""
	err := os.Remove(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(n.path))
	}
	if err != nil {
		return fmt.Errorf("the note of what this host's images are: %w", err)
	}
	return nil
}

// look finds out what there is.
func (n *Note) look() (*facts, error) {
	f := new(facts)
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	f.boot = strings.TrimSpace(string(b))
	if f.booted, err = bootTime(); err != nil {
		return nil, err
	}
	if info, err := os.Stat(n.path); err == nil {
		f.touched = info.ModTime()
	}
	for _, path := range n.images {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		f.images = append(f.images, image{path, st.Mode&unix.S_IFMT == unix.S_IFREG, st.Ino, time.Unix(st.Ctim.Unix())})
	}
	return f, nil
}

// bootTime is when the host was booted, by the clock as it is now.
func bootTime() (time.Time, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(string(b)) {
		if at, is := strings.CutPrefix(line, "btime "); is {
			s, err := strconv.ParseInt(strings.TrimSpace(at), 10, 64)
			return time.Unix(s, 0), err
		}
	}
	return time.Time{}, errors.New("/proc/stat has no btime")
}
