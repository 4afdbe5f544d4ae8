// SPDX-License-Identifier: Apache-2.0

package sim

import "bytes"

// chunk is the size of a stream's parts, bytes.
const chunk = 4096

// stream is what was sent on a connection, from its first byte on. A copy shares what was there
// before: a checkpoint copies all that the guest has ever sent.
type stream struct {
	chunks [][]byte // all but the last are full
	len    int
}

func (s *stream) append(data []byte) {
	for len(data) > 0 {
		if s.len%chunk == 0 {
			s.chunks = append(s.chunks, make([]byte, 0, min(chunk, 2*len(data))))
		}
		last := &s.chunks[len(s.chunks)-1]
		n := min(len(data), chunk-len(*last))
		*last = append(*last, data[:n]...)
		data = data[n:]
		s.len += n
	}
}

// clone returns a copy. Both append to parts of their own.
func (s *stream) clone() stream {
	for i, c := range s.chunks {
		s.chunks[i] = c[:len(c):len(c)]
	}
	n := *s
	n.chunks = append([][]byte(nil), s.chunks...)
	return n
}

// holds reports whether data was sent, its first byte at from.
func (s *stream) holds(from int, data []byte) bool {
	if from+len(data) > s.len {
		return false
	}
	for len(data) > 0 {
		part := s.chunks[from/chunk][from%chunk:]
		part = part[:min(len(part), len(data))]
		if !bytes.Equal(part, data[:len(part)]) {
			return false
		}
		data = data[len(part):]
		from += len(part)
	}
	return true
}
