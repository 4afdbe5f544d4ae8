// SPDX-License-Identifier: Apache-2.0

// Package journal keeps a guest's history on one node: checkpoints, failovers,
// role changes, each with its time and cause, across restarts. It is for people: nothing
// is decided by it, and nothing waits for it.
package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Kind is what an event is about.
type Kind string

// Kinds of events. A reader must accept others too, of a later version.
const (
	Daemon     Kind = "daemon"     // started, ended
	Session    Kind = "session"    // the control link came up or broke
	Role       Kind = "role"       // this node's role changed
	Sync       Kind = "sync"       // replication began, failed, or covers the guest
	Checkpoint Kind = "checkpoint" // a checkpoint was tried
	Periodic   Kind = "periodic"   // periodic mode began or ended; its checkpoints are no events
	Failover   Kind = "failover"   // this node began to serve alone, or tried to
	Arbiter    Kind = "arbiter"    // the arbiter was asked, and its answer
	Fencing    Kind = "fencing"    // a guest was stopped so that no second one serves
	QEMU       Kind = "qemu"       // started, stopped, died
	Disk       Kind = "disk"       // a replica of a disk failed
	Lost       Kind = "lost"       // events came faster than they could be written; Fields has how many
)

// Event is something that happened.
type Event struct {
	Time   time.Time      `json:"time"`
	Kind   Kind           `json:"kind"`
	Cause  string         `json:"cause,omitempty"`
	Fields map[string]any `json:"fields,omitempty"` // values for encoding/json; numbers are read back as json.Number
}

// DefaultLimit is the size in bytes at which the file is rotated. One older file is kept,
// so the journal takes up to twice as much.
const DefaultLimit = 4 << 20

const (
	queued  = 1024
	maxLine = 64 << 10
)

func path(dir, vm, node string) string { return filepath.Join(dir, vm+"-"+node+".events") }

// Journal is a journal that is open for writing, by one process at a time.
type Journal struct {
	path  string
	limit int64
	log   *slog.Logger

	events chan Event
	end    chan struct{}
	ended  chan struct{}
	once   sync.Once

	mu   sync.Mutex
	lost int // events dropped because the queue was full

	// Of the goroutine that writes.
	file   *os.File
	size   int64
	torn   bool // the last line may be incomplete
	failed bool // the last write failed, which was logged
}

// Open opens the journal of a guest's node in dir, which it makes if necessary. limit is
// the size in bytes at which the file is rotated. Close has to be called.
func Open(dir, vm, node string, limit int64, log *slog.Logger) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j := &Journal{
		path: path(dir, vm, node), limit: limit, log: log,
		events: make(chan Event, queued), end: make(chan struct{}), ended: make(chan struct{}),
	}
	if err := j.open(); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	go j.write()
	return j, nil
}

// Add writes an event in the background, with the present time if it has none. It never
// waits for the disk: if the queue is full, the event is dropped and counted ([Lost]).
func (j *Journal) Add(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	select {
	case j.events <- e:
	default:
		j.mu.Lock()
		j.lost++
		j.mu.Unlock()
	}
}

// Close writes what was added before it. What is added later is lost.
func (j *Journal) Close() {
	j.once.Do(func() { close(j.end) })
	<-j.ended
}

func (j *Journal) open() error {
	f, err := os.OpenFile(j.path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return err
	}
	j.file, j.size, j.torn = f, size, false
	if size > 0 { // a crash may have cut the last line
		last := make([]byte, 1)
		_, err := f.ReadAt(last, size-1)
		j.torn = err != nil || last[0] != '\n'
	}
	return nil
}

func (j *Journal) write() {
	defer close(j.ended)
	defer func() {
		if j.file != nil {
			j.file.Close()
		}
	}()
	for {
		select {
		case e := <-j.events:
			j.report(j.append(e))
		case <-j.end:
			for {
				select {
				case e := <-j.events:
					j.report(j.append(e))
				default:
					j.report(j.sync())
					return
				}
			}
		}
		if len(j.events) == 0 { // one fsync for a burst
			j.report(j.sync())
		}
	}
}

// report logs the first of several failures in a row, so that a full disk does not fill
// the log.
func (j *Journal) report(err error) {
	if err != nil && !j.failed {
		j.log.Warn("the journal cannot be written; events are missing in lockstep events", "err", err)
	}
	j.failed = err != nil
}

func (j *Journal) sync() error {
	j.mu.Lock()
	lost := j.lost
	j.lost = 0
	j.mu.Unlock()
	if lost > 0 {
		if err := j.append(Event{Time: time.Now(), Kind: Lost, Fields: map[string]any{"events": lost}}); err != nil {
			return err
		}
	}
	if j.file == nil {
		return nil
	}
	return j.file.Sync()
}

// encode makes a line. Fields that cannot be encoded are replaced by the reason.
func encode(e Event) []byte {
	b, err := json.Marshal(e)
	if err == nil && len(b) >= maxLine {
		err = fmt.Errorf("%d bytes are too many", len(b))
	}
	if err != nil {
		e.Fields = map[string]any{"missing": err.Error()}
		e.Cause = e.Cause[:min(len(e.Cause), 1024)]
		if e.Time.Year() > 9999 || e.Time.Year() < 0 { // encoding/json refuses such a time
			e.Time = time.Time{}
		}
		if b, err = json.Marshal(e); err != nil {
			return nil
		}
	}
	return append(b, '\n')
}

func (j *Journal) append(e Event) error {
	line := encode(e)
	if j.file == nil || j.size > 0 && j.size+int64(len(line)) > j.limit {
		if err := j.rotate(); err != nil {
			return err
		}
	}
	if j.torn {
		line = append([]byte{'\n'}, line...)
	}
	n, err := j.file.Write(line)
	j.size += int64(n)
	j.torn = n > 0 && n < len(line) || n == 0 && j.torn
	return err
}

func (j *Journal) rotate() error {
	if j.file != nil {
		err := j.file.Close()
		j.file = nil
		if err != nil {
			return err
		}
		if err := os.Rename(j.path, j.path+".1"); err != nil {
			return err
		}
	}
	return j.open()
}

// Read returns the last n events of a guest's node, oldest first; all for n = 0.
// Incomplete lines, which a crash may leave, are skipped. The journal may be open for
// writing.
func Read(dir, vm, node string, n int) ([]Event, error) {
	events := []Event{}
	data, err := contents(path(dir, vm, node))
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	for line := range bytes.Lines(data) {
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber()
		var e Event
		// A line without a line feed may be just being written.
		if !bytes.HasSuffix(line, []byte("\n")) || d.Decode(&e) != nil || e.Kind == "" {
			continue
		}
		if _, err := d.Token(); err != io.EOF {
			continue // two lines' halves
		}
		events = append(events, e)
	}
	if n > 0 {
		events = events[max(0, len(events)-n):]
	}
	return events, nil
}

// contents returns the older file's content and the newer one's, also during a rotation.
func contents(path string) ([]byte, error) {
	for {
		now, err := open(path)
		if err != nil {
			return nil, err
		}
		before, err := open(path + ".1")
		if err != nil {
			now.Close()
			return nil, err
		}
		if !still(path, now) {
			now.Close()
			before.Close()
			continue
		}
		var all []byte
		for _, f := range []*os.File{before, now} {
			if f != nil && err == nil {
				var b []byte
				b, err = io.ReadAll(f)
				all = append(all, b...)
				if len(all) > 0 && all[len(all)-1] != '\n' && f == before {
					all = append(all, '\n')
				}
			}
			f.Close()
		}
		return all, err
	}
}

// open opens a file; nil: it does not exist.
func open(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// still reports whether path is still the file f, or still does not exist if f is nil.
func still(path string, f *os.File) bool {
	now, err := os.Stat(path)
	if f == nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	was, err2 := f.Stat()
	return err == nil && err2 == nil && os.SameFile(now, was)
}
