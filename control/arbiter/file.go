// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/durable"
)

// file keeps each entry in a file of its own, <vm>.<number>, in a directory
// that both hosts share. The highest number is in force. A new entry is written to a
// temporary file and then linked to the next number. A link fails where the name
// exists, so of several writers one succeeds, and a delayed one fails. A lock would
// not do: over NFS it is lost with its lease, and a rename that was delayed until
// then would still replace the file.
type file struct {
	dir, vm, node string
	timeout       time.Duration
	busy          chan struct{} // held by the one operation under way, also after its timeout

	beforeLink func() // for tests
	noBump     bool   // mutation, set by tests: Settle only reads
}

// keptEntries is how many files are kept: for people to read, and so that an NFS
// client whose listing is out of date still finds the file it names.
const keptEntries = 64

// maxNumber is above all that changes of the entry come to, and far enough from the end of
// uint64 to be added to.
const maxNumber = 1 << 63

func openFile(vm, node string, a *config.Arbiter) (*file, error) {
	return &file{dir: a.Path, vm: vm, node: node, timeout: a.Timeout, busy: make(chan struct{}, 1)}, nil
}

func (f *file) Close() error { return nil }

func (f *file) Read(ctx context.Context) (Entry, error) {
	return f.do(ctx, "read", func(context.Context) (Entry, error) {
		tmp, err := f.temp()
		if err != nil {
			return Entry{}, err
		}
		tmp.Close()
		defer os.Remove(tmp.Name())
		now, _, err := f.newest()
		if err != nil {
			return Entry{}, err
		}
		// The host that wrote it may have crashed before its own fsync, and a crash of
		// the storage must not take back what this one acts on.
		return now, durable.SyncDir(f.dir)
	})
}

func (f *file) Swap(ctx context.Context, old, next Entry) (Entry, bool, error) {
	if err := checkSwap(old, next); err != nil {
		return Entry{}, false, err
	}
	now, err := f.do(ctx, "change", func(ctx context.Context) (Entry, error) {
		return f.append(ctx, func(now Entry) (Entry, bool) { return next, now == old })
	})
	if err == nil {
		err = checkNow(old, now)
	}
	if err != nil {
		return Entry{}, false, err
	}
	return now, now == next, nil
}

// Settle writes the entry again under the next number. An earlier Swap that is still
// under way wants that number, and fails.
func (f *file) Settle(ctx context.Context) (Entry, error) {
	if f.noBump {
		return f.Read(ctx)
	}
	return f.do(ctx, "settle", func(ctx context.Context) (Entry, error) {
		now, err := f.append(ctx, func(now Entry) (Entry, bool) { return now, true })
		if err != nil {
			return Entry{}, err
		}
		left, _ := filepath.Glob(filepath.Join(f.dir, f.tempName("*"))) // by processes that crashed
		for _, l := range left {
			os.Remove(l)
		}
		return now, nil
	})
}

// do runs op, and returns when ctx ends at the latest. A system call on storage that
// does not answer cannot be cancelled: op goes on in the background then, and later
// operations wait for it.
func (f *file) do(ctx context.Context, what string, op func(context.Context) (Entry, error)) (Entry, error) {
	ctx, done := context.WithTimeout(ctx, f.timeout)
	fail := func(err error) (Entry, error) {
		return Entry{}, fmt.Errorf("arbiter file: %s the entry of %s in %s: %w", what, f.vm, f.dir, err)
	}
	select {
	case f.busy <- struct{}{}:
	case <-ctx.Done():
		done()
		return fail(fmt.Errorf("an earlier request still waits for the storage: %w", ctx.Err()))
	}
	type result struct {
		now Entry
		err error
	}
	ended := make(chan result, 1)
	go func() {
		now, err := op(ctx)
		<-f.busy
		ended <- result{now, err}
		done()
	}()
	<-ctx.Done() // op's end cancels it too
	select {
	case r := <-ended:
		if errors.Is(r.err, fs.ErrNotExist) {
			r.err = fmt.Errorf("%w; is the storage mounted? lockstep does not make the directory, so as not to make it elsewhere", r.err)
		}
		if r.err != nil {
			return fail(r.err)
		}
		return r.now, nil
	default:
		return fail(ctx.Err())
	}
}

// append adds the entry that pick chooses as the successor of the one in force, and
// returns the one in force then: pick's, or the one before if pick wants none.
func (f *file) append(ctx context.Context, pick func(now Entry) (next Entry, want bool)) (Entry, error) {
	tmp, err := f.temp()
	if err != nil {
		return Entry{}, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	for {
		now, number, err := f.newest()
		if err != nil {
			return Entry{}, err
		}
		next, want := pick(now)
		if !want {
			return now, durable.SyncDir(f.dir)
		}
		if err := tmp.Truncate(0); err != nil {
			return Entry{}, err
		}
		if _, err := tmp.WriteAt(next.encode(), 0); err != nil {
			return Entry{}, err
		}
		if err := tmp.Sync(); err != nil {
			return Entry{}, err
		}
		if err := ctx.Err(); err != nil { // the caller has returned, with an unknown outcome
			return Entry{}, err
		}
		if f.beforeLink != nil {
			f.beforeLink()
		}
		err = os.Link(tmp.Name(), f.name(number+1))
		if errors.Is(err, fs.ErrExist) {
			continue // made by another, or by our own link whose reply NFS lost: pick decides again
		}
		if err != nil {
			return Entry{}, err
		}
		if err := durable.SyncDir(f.dir); err != nil {
			return Entry{}, err
		}
		// After a long delay the number may be an old one, free again because clean
		// removed its file, and another is in force.
		if now, number, err = f.newest(); err != nil {
			return Entry{}, err
		}
		f.clean(number)
		return now, nil
	}
}

func (f *file) name(number uint64) string {
	return filepath.Join(f.dir, fmt.Sprintf("%s.%020d", f.vm, number))
}

func (f *file) tempName(end string) string { return "." + f.vm + "." + f.node + "." + end }

// temp makes a file to write to. That also changes the directory, so that an NFS
// client lists it anew and not from its cache.
func (f *file) temp() (*os.File, error) { return os.CreateTemp(f.dir, f.tempName("*")) }

func (f *file) numbers() (all []uint64, err error) {
	entries, err := os.ReadDir(f.dir)
	for _, e := range entries {
		if s, ok := strings.CutPrefix(e.Name(), f.vm+"."); ok {
			if n, err := strconv.ParseUint(s, 10, 64); err == nil && f.name(n) == filepath.Join(f.dir, e.Name()) {
				all = append(all, n)
			}
		}
	}
	return all, err
}

// newest returns the entry in force, and its number: 0 where there is none.
func (f *file) newest() (Entry, uint64, error) {
	all, err := f.numbers()
	if err != nil {
		return Entry{}, 0, err
	}
	number := uint64(0)
	for _, n := range all {
		number = max(number, n)
	}
	if number == 0 {
		return Entry{}, 0, nil
	}
	if number > maxNumber {
		return Entry{}, 0, fmt.Errorf("%s is none that lockstep made: no entry can follow it; remove it", f.name(number))
	}
	in, err := os.Open(f.name(number))
	if err != nil {
		return Entry{}, 0, err
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, maxEntry+1))
	if err != nil {
		return Entry{}, 0, err
	}
	r, err := decode(b)
	if err != nil {
		return Entry{}, 0, fmt.Errorf("%s: %w; remove it if the entry before it is right", f.name(number), err)
	}
	return r, number, nil
}

func (f *file) clean(newest uint64) {
	all, _ := f.numbers()
	for _, n := range all {
		if n+keptEntries <= newest {
			os.Remove(f.name(n))
		}
	}
}
