// SPDX-License-Identifier: Apache-2.0

package compare

// deque is a slice that is cheap to shorten at the front. In a steady state it
// does not allocate.
type deque[T any] struct {
	buf  []T
	head int
}

func (d *deque[T]) view() []T { return d.buf[d.head:] }
func (d *deque[T]) len() int  { return len(d.buf) - d.head }

// drop forgets the first n elements.
func (d *deque[T]) drop(n int) {
	clear(d.buf[d.head : d.head+n])
	if d.head += n; d.head == len(d.buf) {
		d.buf, d.head = d.buf[:0], 0
	}
}

// insert puts v before element i.
func (d *deque[T]) insert(i int, v T) {
	if len(d.buf) == cap(d.buf) && d.head > 0 && d.head >= len(d.buf)/2 {
		n := copy(d.buf, d.buf[d.head:])
		clear(d.buf[n:])
		d.buf, d.head = d.buf[:n], 0
	}
	d.buf = append(d.buf, v)
	if s := d.view(); i < len(s)-1 {
		copy(s[i+1:], s[i:])
		s[i] = v
	}
}

// remove deletes elements [i, j).
func (d *deque[T]) remove(i, j int) {
	s := d.view()
	n := i + copy(s[i:], s[j:])
	clear(s[n:])
	if d.buf = d.buf[:d.head+n]; n == 0 {
		d.buf, d.head = d.buf[:0], 0
	}
}

// reset empties d; a large buffer is given back.
func (d *deque[T]) reset() {
	if cap(d.buf) > 64 {
		d.buf = nil
	}
	clear(d.buf)
	d.buf, d.head = d.buf[:0], 0
}
