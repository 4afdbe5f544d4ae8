// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"io"
	"sync/atomic"
)

// CountRequests counts the checkpoints that a colo-compare asks for on the socket of its notify_dev,
// until that is closed. Nobody makes one: what waits for it, waits on.
func CountRequests(r io.Reader, n *atomic.Uint64) {
	var length [4]byte
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, r, int64(binary.BigEndian.Uint32(length[:]))); err != nil {
			return
		}
		n.Add(1)
	}
}
