// SPDX-License-Identifier: Apache-2.0

package sim

import "maps"

// disk is a host's image, with what QEMU's block replication keeps beside it. Blocks are
// numbers.
type disk struct {
	image  map[uint32]uint32
	hidden map[uint32]uint32 // S: what the PVM's writes have replaced in image since the last checkpoint
	active map[uint32]uint32 // S: what the SVM has written since then
	broken bool              // the image takes no writes
}

func newDisk() *disk {
	return &disk{image: map[uint32]uint32{}, hidden: map[uint32]uint32{}, active: map[uint32]uint32{}}
}

// read is what this host's guest reads.
func (d *disk) read(key uint32) uint32 {
	if v, ok := d.active[key]; ok {
		return v
	}
	if v, ok := d.hidden[key]; ok {
		return v
	}
	return d.image[key]
}

// replicate takes a write of the PVM's (S).
func (d *disk) replicate(key, value uint32) {
	if _, ok := d.hidden[key]; !ok {
		d.hidden[key] = d.image[key]
	}
	d.image[key] = value
}

// checkpoint: the SVM has become the PVM, and its disk with it (S).
func (d *disk) checkpoint() { clear(d.hidden); clear(d.active) }

// merge makes the image what the SVM sees: it has taken over.
func (d *disk) merge() {
	maps.Copy(d.image, d.hidden)
	maps.Copy(d.image, d.active)
	d.checkpoint()
}

// copyFrom is a resync.
func (d *disk) copyFrom(o *disk) {
	d.image = maps.Clone(o.image)
	d.checkpoint()
}
