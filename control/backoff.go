// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"time"
)

// backoff waits between attempts, longer each time.
type backoff struct {
	first, last, next time.Duration
}

// take is how long to wait now.
func (b *backoff) take() time.Duration {
	b.next = min(max(2*b.next, b.first), b.last)
	return b.next
}

// wait returns false when ctx ends first.
func (b *backoff) wait(ctx context.Context) bool { return b.waitUnless(ctx, nil) }

// waitUnless is wait, but no longer than until sooner is closed.
func (b *backoff) waitUnless(ctx context.Context, sooner <-chan struct{}) bool {
	t := time.NewTimer(b.take())
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-sooner:
		return true
	case <-ctx.Done():
		return false
	}
}

func (b *backoff) reset() { b.next = 0 }
