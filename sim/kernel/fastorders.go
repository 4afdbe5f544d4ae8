// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"errors"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// fastPath is a daemon's view of it.
type fastPath struct {
	table   *fastTable
	decoder *core.Decoder
}

// SetFast implements [datapath.FastPath].
func (p *fastPath) SetFast(on bool) error {
	p.table.on = on
	return nil
}

// Grant implements [datapath.FastPath].
func (p *fastPath) Grant(t compare.Tuple, h *compare.Handover) (bool, error) {
	seen, known := p.decoder.Seen.Of(t)
	if !known {
		p.table.of[t] = new(fastConn)
		p.decoder.Seen.Begin(t)
		return false, nil
	}
	f := p.table.of[t]
	if f.s.Owner != ownerUser || f.s.Number != seen {
		if p.decoder.Seen.Refused(t) {
			return false, p.Forget(t)
		}
		return false, nil
	}
	f.s = core.ToFast(h)
	if f.s.TmplPartial != 0 { // no frame of the model's is left to a device to complete
		tcp := f.s.Tmpl[f.s.TmplL4:f.s.TmplLen]
		binary.BigEndian.PutUint16(tcp[core.TCPCsum:], ^core.Checksum(tcp))
		f.s.TmplPartial = 0
	}
	f.s.Owner, f.s.Number, f.untold = ownerKernel, seen, false
	f.s.Since = uint64(p.table.m.host.Now())
	p.table.arm(t, f)
	return true, nil
}

// Take implements [datapath.FastPath].
func (p *fastPath) Take(t compare.Tuple, evs []compare.Event) (*compare.Handover, []compare.Event, error) {
	f := p.table.of[t]
	if f == nil {
		return nil, evs, errors.New("no such connection")
	}
	f.s.Owner, f.untold = ownerUser, false
	h, evs := p.decoder.Fast(&bpf.LockstepLsFastCtx{T: core.ToTuple(t), S: f.s}, evs)
	return h, evs, nil
}

// Forget implements [datapath.FastPath].
func (p *fastPath) Forget(t compare.Tuple) error {
	p.decoder.Seen.End(t)
	delete(p.table.of, t)
	return nil
}

// ForgetAll implements [datapath.FastPath].
func (p *fastPath) ForgetAll() error {
	p.decoder.Seen.EndAll()
	clear(p.table.of)
	return nil
}
