// SPDX-License-Identifier: Apache-2.0

package bpfmodel

import "iter"

// LRU is a bounded map that makes room by forgetting the entry least lately used. The
// kernel's are not as exact.
type LRU[V any] struct {
	index map[Tuple]int32
	nodes []node[V] // nodes[0] is the list's anchor: next the newest, prev the oldest
	free  []int32
	max   int
}

type node[V any] struct {
	prev, next int32
	key        Tuple
	val        V
}

// NewLRU holds at most max entries, and one at least.
func NewLRU[V any](max int) *LRU[V] {
	l := &LRU[V]{max: max}
	if max < 1 {
		l.max = 1
	}
	l.Reset()
	return l
}

// Reset forgets everything.
func (l *LRU[V]) Reset() {
	l.index, l.nodes, l.free = make(map[Tuple]int32), make([]node[V], 1), nil
}

func (l *LRU[V]) unlink(i int32) {
	n := &l.nodes[i]
	l.nodes[n.prev].next, l.nodes[n.next].prev = n.next, n.prev
}

func (l *LRU[V]) push(i int32) {
	n, head := &l.nodes[i], l.nodes[0].next
	n.prev, n.next = 0, head
	l.nodes[head].prev, l.nodes[0].next = i, i
}

// Get returns the entry of key, nil without one. It is valid until the next Make.
func (l *LRU[V]) Get(key Tuple) *V {
	i, ok := l.index[key]
	if !ok {
		return nil
	}
	l.unlink(i)
	l.push(i)
	return &l.nodes[i].val
}

// Make returns the entry of key, an empty one without one. It is valid until the next.
func (l *LRU[V]) Make(key Tuple) *V {
	if v := l.Get(key); v != nil {
		return v
	}
	var i int32
	switch n := len(l.free); {
	case n > 0:
		i, l.free = l.free[n-1], l.free[:n-1]
	case len(l.nodes) <= l.max:
		i = int32(len(l.nodes))
		l.nodes = append(l.nodes, node[V]{})
	default:
		i = l.nodes[0].prev
		l.unlink(i)
		delete(l.index, l.nodes[i].key)
	}
	l.nodes[i] = node[V]{key: key}
	l.index[key] = i
	l.push(i)
	return &l.nodes[i].val
}

// Delete forgets key.
func (l *LRU[V]) Delete(key Tuple) {
	i, ok := l.index[key]
	if !ok {
		return
	}
	l.unlink(i)
	delete(l.index, key)
	l.free = append(l.free, i)
}

// All are the entries, the latest used first.
func (l *LRU[V]) All() iter.Seq2[Tuple, V] {
	return func(yield func(Tuple, V) bool) {
		for i := l.nodes[0].next; i != 0 && yield(l.nodes[i].key, l.nodes[i].val); i = l.nodes[i].next {
		}
	}
}
