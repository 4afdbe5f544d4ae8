// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"testing"
	"time"
)

func TestTransfer(t *testing.T) {
	w := newWorld(t, Config{}, Config{}, link{delay: time.Millisecond}, 1)
	w.exchange(1<<20, 1<<20, time.Minute, nil)
}
