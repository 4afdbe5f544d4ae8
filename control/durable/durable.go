// SPDX-License-Identifier: Apache-2.0

// Package durable writes files that outlive a crash of the host. That takes an fsync
// of the folder too, behind a rename or a link, which the libraries for atomic writes
// leave out (read: google/renameio v2.0.2, natefinch/atomic v1.0.1, moby/sys
// atomicwriter v0.1.0).
package durable

import (
	"errors"
	"os"
	"path/filepath"
)

// Replace makes the file at path hold data, readable by its owner only. When it
// returns nil, that outlives a crash. After an error, or a crash in between, the file
// holds data or what it held before, never a part of either. It writes path+".new"
// first, which a crash may leave behind, so it is for one writer at a time.
func Replace(path string, data []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync() // or the rename may be on the disk before the content
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a folder durable: files made, linked or renamed there.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
