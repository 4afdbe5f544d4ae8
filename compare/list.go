// SPDX-License-Identifier: Apache-2.0

package compare

// list is a linked list of elements that hold their own [link], so that linking one
// allocates nothing.
type list[T any] struct {
	n           int
	first, last *link[T]
}

// link makes of an element of a list. An element is in one list at most.
type link[T any] struct {
	of         T
	in         *list[T]
	prev, next *link[T]
}

// push adds k at the end.
func (l *list[T]) push(k *link[T]) {
	k.in, k.prev, k.next = l, l.last, nil
	if l.last != nil {
		l.last.next = k
	} else {
		l.first = k
	}
	l.last = k
	l.n++
}

// unlink takes k out of its list, if it is in one.
func (k *link[T]) unlink() {
	l := k.in
	if l == nil {
		return
	}
	if k.prev != nil {
		k.prev.next = k.next
	} else {
		l.first = k.next
	}
	if k.next != nil {
		k.next.prev = k.prev
	} else {
		l.last = k.prev
	}
	l.n--
	k.in, k.prev, k.next = nil, nil, nil
}
