// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/bpf/bpfmodel"
	"github.com/lockstep-ft/lockstep/compare"
	"github.com/lockstep-ft/lockstep/loader/core"
)

// This file is the model of bpf/fast_dgram.h: the fast path (R27) for UDP.

const bucketMax = int(bpf.LockstepLsConstLS_BUCKET_MAX)

// bucket is an element of ls_fast_udp. wait, oldest first, is in the place of s.Wait.
type bucket struct {
	armed bool
	s     bpf.LockstepLsBucketState
	wait  []bpf.LockstepLsBucketDgram
}

// buckets is the map ls_fast_udp, of which most elements are as they were at first.
type buckets map[uint32]*bucket

func (x *fastTable) bucket(t *bpf.LockstepLsTuple, frag uint16) (*bucket, uint32) {
	if t.Proto != core.ProtoUDP || frag != 0 {
		return nil, 0
	}
	i := core.Bucket(t)
	b := x.buckets[i]
	if b == nil {
		b = new(bucket)
		x.buckets[i] = b
	}
	return b, i + 1
}

func (x *fastTable) sameDatagram(a, b *bpf.LockstepLsBucketDgram) bool {
	return a.Seq == b.Seq && a.Paylen == b.Paylen && (a.Sum == b.Sum || x.m.off(bpf.LockstepLsMutationLS_MUTATE_FAST_R1))
}

// armBucket starts the timer, if something waits and it does not run.
func (x *fastTable) armBucket(number uint32, b *bucket) {
	if b.armed || len(b.wait) == 0 || x.m.host.Timer == nil {
		return
	}
	b.armed = true
	x.startBucket(number, b, x.m.host.Now()+fastWait)
}

func (x *fastTable) startBucket(number uint32, b *bucket, at int64) {
	x.m.host.Timer(at, func() {
		if x.buckets[number-1] == b {
			x.bucketTimeout(number, b)
		}
	})
}

func (x *fastTable) bucketTimeout(number uint32, b *bucket) {
	now := x.m.host.Now()
	if b.armed = len(b.wait) > 0; !b.armed {
		return
	}
	again := int64(b.s.Since) + fastWait - now
	if b.s.User != 0 || again <= 0 {
		b.s.User, again = 1, fastWait
		if e := x.m.ring.reserve(frameSize); e != nil {
			ev := e.frame()
			ev.Type, ev.Slot, ev.At, ev.T, ev.Number = uint32(bpf.LockstepLsEvTypeLS_EV_YIELD), uint32(compare.NoSlot), uint64(now), b.s.T, number
		}
	}
	x.startBucket(number, b, now+again)
}

// giveUpDatagram is the record of a datagram that user space decides about; 0: it is in no bucket.
func (x *fastTable) giveUpDatagram(t *bpf.LockstepLsTuple, frag uint16) uint32 {
	b, number := x.bucket(t, frag)
	if b != nil {
		b.s.User = 1
	}
	return number
}

// datagram decides about a datagram of the PVM, as pvm about a segment.
func (x *fastTable) datagram(frame []byte, gso uint16, p *bpfmodel.Segment) (v verdict, slot, number uint32) {
	m := x.m
	slot = uint32(compare.NoSlot)
	t := core.ToTuple(p.Tuple)
	b, number := x.bucket(&t, p.Frag)
	if b == nil {
		return fastNot, slot, 0
	}
	s := &b.s
	if !x.on || s.User != 0 || gso != 0 || len(frame) > fastLen || p.L4 > fastL4Max || p.VLAN != 0 {
		s.User = 1
		return fastNot, slot, number
	}
	sum, _ := m.digest(p, 0)
	waits := s.Svm != 0 && len(b.wait) > 0
	if !waits {
		var ev bpf.LockstepLsEv
		if m.keep(frame, p, false, &ev) != bpf.LockstepLsReasonLS_R_held {
			s.User = 1
			return fastNot, slot, number
		}
		slot = ev.Slot
	}
	d := bpf.LockstepLsBucketDgram{
		At: uint64(m.host.Now()), Sum: sum, Slot: slot, Seq: p.Pos, Paylen: uint32(p.End - p.Pay), FrameLen: uint32(len(frame)),
		L3Off: uint16(p.L3), L4Off: uint16(p.L4), PayOff: uint16(p.Pay),
	}
	switch {
	case len(b.wait) > 0 && s.T != t, waits && !x.sameDatagram(&b.wait[0], &d), !waits && len(b.wait) >= bucketMax:
		s.User = 1
		return fastNot, slot, number
	case waits:
		b.wait = b.wait[1:]
		s.Frames++
		v = fastPass
	default:
		if len(b.wait) == 0 {
			s.T, s.Since, s.Svm = t, d.At, 0
		}
		b.wait = append(b.wait, d)
		v = fastHeld
	}
	if v == fastPass {
		s.Since = d.At
	}
	x.armBucket(number, b)
	if v == fastHeld {
		m.count(bpf.LockstepLsReasonLS_R_fastHeld)
	} else {
		m.count(bpf.LockstepLsReasonLS_R_fastDgram)
	}
	return v, uint32(compare.NoSlot), 0
}

// datagramRecord decides about the record of a datagram in m.rec, as record about a segment's.
func (x *fastTable) datagramRecord() (number uint32, done bool) {
	m := x.m
	r := &m.rec
	b, number := x.bucket(&r.T, r.Frag)
	if b == nil {
		return 0, false
	}
	s := &b.s
	d := bpf.LockstepLsBucketDgram{
		At: uint64(m.host.Now()), Sum: r.Sum, Slot: uint32(compare.NoSlot), Seq: r.Seq, Paylen: r.End - r.Seq, Epoch: r.Epoch,
	}
	waits := s.Svm == 0 && len(b.wait) > 0
	if !x.on || s.User != 0 || r.T.Vlan != 0 || r.Epoch != m.conf.Epoch || len(b.wait) > 0 && s.T != r.T ||
		waits && !x.sameDatagram(&b.wait[0], &d) || !waits && len(b.wait) >= bucketMax {
		s.User = 1
		return number, false
	}
	if waits {
		d = b.wait[0]
		b.wait = b.wait[1:]
		s.Frames++
	} else {
		if len(b.wait) == 0 {
			s.T, s.Svm = r.T, 1
		}
		b.wait = append(b.wait, d)
	}
	s.Since = uint64(m.host.Now())
	x.armBucket(number, b)
	m.count(bpf.LockstepLsReasonLS_R_fastIn)
	if !waits {
		return 0, true
	}
	frame := append([]byte(nil), m.slots.Element(compare.Slot(d.Slot))[slotData:][:d.FrameLen]...)
	m.count(bpf.LockstepLsReasonLS_R_fastDgram)
	m.count(bpf.LockstepLsReasonLS_R_fastOut)
	m.freeSlot(d.Slot)
	m.fromGuest(frame, 0, released)
	return 0, true
}

// order carries out an order about a bucket, as ls_bucket_order does.
func (x *fastTable) order(c *bpf.LockstepLsBucketCtx) error {
	fetch := func(b *bucket) {
		b.s.User = 1
		c.S, c.Done = b.s, 1
		c.S.Head, c.S.N = 0, uint8(copy(c.S.Wait[:], b.wait))
		b.wait, b.s.Frames = nil, 0
	}
	c.Done = 0
	b := x.buckets[c.Index]
	switch bpf.LockstepLsBucketOp(c.Op) {
	case bpf.LockstepLsBucketOpLS_BUCKET_SWEEP:
		for i := c.Index; i < uint32(bpf.LockstepLsConstLS_BUCKETS); i++ {
			if b := x.buckets[i]; b != nil && len(b.wait) > 0 {
				fetch(b)
				c.Index = i
				return nil
			}
		}
	case bpf.LockstepLsBucketOpLS_BUCKET_TAKE:
		if b == nil {
			b = new(bucket)
			x.buckets[c.Index] = b
		}
		fetch(b)
	default:
		if b != nil && b.s.User != 0 && len(b.wait) == 0 {
			b.s.User, c.Done = 0, 1
		}
	}
	return nil
}

// TakeDatagrams implements [datapath.FastPath].
func (p *fastPath) TakeDatagrams(evs []compare.Event) ([]compare.Event, error) {
	return p.decoder.Buckets.All(p.decoder, p.table.m.host.Now(), evs)
}

// Even implements [datapath.FastPath].
func (p *fastPath) Even(t compare.Tuple, now int64) error { return p.decoder.Buckets.Even(t, now) }
