// SPDX-License-Identifier: Apache-2.0

package bpfmodel_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
)

// FuzzSegment: no frame brings the model down, whatever it holds of connections; what is
// translated keeps its length and, but for TCP's and ICMP's own fields, its bytes. Each frame
// of the input stands behind a byte of what it is and two of its length.
func FuzzSegment(f *testing.F) {
	fl := flow{guest: 1, rem: 2, gport: 80, rport: 4000}
	six := fl
	six.v6 = true
	for _, fl := range []flow{fl, six} {
		var in []byte
		for _, s := range []seg{
			{flow: fl, seq: isnSVM, ack: isnCli + 1, flags: syn | ackF, opts: tsOpt(1, 2)},
			{flow: fl, toGuest: true, seq: isnCli + 1, ack: isnPVM + 1, flags: ackF, opts: sackOpt(1, 2)},
			{flow: fl, seq: isnSVM + 1, ack: isnCli + 1, flags: ackF, payload: []byte("data")},
		} {
			kind := byte(1)
			if s.toGuest {
				kind = 0
			}
			in = binary.LittleEndian.AppendUint16(append(in, kind), uint16(len(s.bytes())))
			in = append(in, s.bytes()...)
		}
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		tab := bpfmodel.New(2, 2, 2)
		for now := int64(1); len(in) >= 3; now++ {
			kind, n := in[0], int(binary.LittleEndian.Uint16(in[1:]))
			in = in[3:]
			frame := bytes.Clone(in[:min(n, len(in))])
			in = in[len(frame):]
			was := bytes.Clone(frame)
			toGuest := kind&1 == 0
			s := bpfmodel.Segment{Partial: kind&2 != 0, TCI: uint16(kind) >> 6}
			var e bpfmodel.ICMPError
			var r bpfmodel.Record
			switch is := s.Parse(frame, toGuest); {
			case is == bpfmodel.ClassTCP && kind&4 != 0:
				tab.Alone(&s, toGuest, kind&8 != 0, now)
			case is == bpfmodel.ClassTCP && toGuest:
				tab.Inbound(&s, now)
			case is == bpfmodel.ClassTCP:
				if _, sent := tab.Outbound(&s, now, &r); sent {
					a := r // what S reported P may announce
					a.Inherited = false
					tab.Announce(&a, now, &r)
				}
			case e.Parse(frame, toGuest):
				tab.Error(&e, toGuest, kind&4 != 0)
				e.ClearChecksum()
			default:
				if !bytes.Equal(frame, was) {
					t.Errorf("a frame that is none of TCP changed")
				}
			}
			if len(frame) != len(was) || !bytes.Equal(frame[:min(26, len(frame))], was[:min(26, len(was))]) {
				t.Errorf("% x became % x", was, frame)
			}
		}
	})
}
