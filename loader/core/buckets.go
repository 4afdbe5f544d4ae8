// SPDX-License-Identifier: Apache-2.0

package core

import (
	"time"
	"unsafe"

	"github.com/lockstep-ft/lockstep/bpf"
	"github.com/lockstep-ft/lockstep/compare"
)

const (
	nbuckets = uint32(bpf.LockstepLsConstLS_BUCKETS)
	// A bucket stays here for so long after it was taken, and twice as long each time when the kernel has released
	// fewer datagrams than bucketWorth in between, up to bucketMost.
	bucketStay  = int64(time.Millisecond)
	bucketMost  = 128 * bucketStay
	bucketWorth = 32
)

// Buckets are user space's half of the fast path for UDP (R27): which buckets of flows are its own. Before an event
// of one that is not, what waits there is taken.
type Buckets struct {
	// Order carries out an order about a bucket (ls_bucket_order).
	Order func(*bpf.LockstepLsBucketCtx) error
	own   map[uint32]*ownBucket // those that were taken ever
}

// ownBucket is a bucket that was taken: user says that it has not been given back since. Of uneven flows something
// may wait here.
type ownBucket struct {
	user        bool
	stay, until int64 // ns
	uneven      map[bpf.LockstepLsTuple]struct{}
}

// NewBuckets has all buckets the kernel's, as they are when its maps are new.
func NewBuckets(order func(*bpf.LockstepLsBucketCtx) error) *Buckets {
	return &Buckets{Order: order, own: make(map[uint32]*ownBucket)}
}

// Bucket is the bucket of a UDP flow.
func Bucket(t *bpf.LockstepLsTuple) uint32 {
	h := uint32(2166136261)
	for _, w := range (*[unsafe.Sizeof(*t) / 4]uint32)(unsafe.Pointer(t)) {
		h = (h ^ w) * 16777619
	}
	return (h ^ h>>16) % nbuckets
}

// before appends what waits in the bucket of an event of flow t and of at, boottime ns, unless it is user space's
// already. number is the event's; 0: it is of no bucket.
func (b *Buckets) before(d *Decoder, t *bpf.LockstepLsTuple, number uint32, at int64, evs []compare.Event) ([]compare.Event, error) {
	if b == nil || number == 0 {
		return evs, nil
	}
	o := b.own[number-1]
	if o == nil || !o.user {
		ctx := bpf.LockstepLsBucketCtx{Op: uint32(bpf.LockstepLsBucketOpLS_BUCKET_TAKE), Index: number - 1}
		if err := b.Order(&ctx); err != nil {
			return evs, err
		}
		evs = b.taken(d, &ctx, at, evs)
		o = b.own[number-1]
	}
	o.uneven[*t] = struct{}{}
	return evs, nil
}

// All appends what waits in all buckets. The fast path is off.
func (b *Buckets) All(d *Decoder, at int64, evs []compare.Event) ([]compare.Event, error) {
	for next := uint32(0); next < nbuckets; {
		ctx := bpf.LockstepLsBucketCtx{Op: uint32(bpf.LockstepLsBucketOpLS_BUCKET_SWEEP), Index: next}
		if err := b.Order(&ctx); err != nil || ctx.Done == 0 {
			return evs, err
		}
		evs = b.taken(d, &ctx, at, evs)
		next = ctx.Index + 1
	}
	return evs, nil
}

// Even: nothing waits in user space of flow t, at a boottime in ns. Its bucket is the kernel's again, if that holds for
// all its flows and it has been here for long enough.
func (b *Buckets) Even(t compare.Tuple, now int64) error {
	if t.Proto != ProtoUDP {
		return nil
	}
	key := ToTuple(t)
	index := Bucket(&key)
	o := b.own[index]
	if o == nil || !o.user {
		return nil
	}
	if delete(o.uneven, key); len(o.uneven) > 0 || now < o.until {
		return nil
	}
	ctx := bpf.LockstepLsBucketCtx{Op: uint32(bpf.LockstepLsBucketOpLS_BUCKET_RELEASE), Index: index}
	if err := b.Order(&ctx); err != nil {
		return err
	}
	o.user = ctx.Done == 0
	return nil
}

// taken turns a bucket's state into events, which own what they point to.
func (b *Buckets) taken(d *Decoder, ctx *bpf.LockstepLsBucketCtx, at int64, evs []compare.Event) []compare.Event {
	o, s := b.own[ctx.Index], &ctx.S
	if o == nil {
		o = &ownBucket{uneven: make(map[bpf.LockstepLsTuple]struct{})}
		b.own[ctx.Index] = o
	}
	if o.stay = min(2*o.stay, bucketMost); s.Frames >= bucketWorth || o.stay == 0 {
		o.stay = bucketStay
	}
	o.user, o.until = true, at+o.stay
	if s.N > 0 {
		o.uneven[s.T] = struct{}{}
	}
	for i := range min(int(s.N), len(s.Wait)) {
		w := &s.Wait[(int(s.Head)+i)%len(s.Wait)]
		if s.Svm != 0 {
			ev := bpf.LockstepLsEvRec{Type: uint32(bpf.LockstepLsEvTypeLS_EV_REC), At: w.At}
			ev.Rec = bpf.LockstepLsRec{
				Type: uint8(bpf.LockstepLsRecTypeLS_REC_DGRAM), T: s.T, Seq: w.Seq, End: w.Seq + w.Paylen, Sum: w.Sum, Epoch: w.Epoch,
			}
			evs, _ = new(Buffer).peerRecord(&ev, evs)
			continue
		}
		ev := bpf.LockstepLsEv{
			Type: uint32(bpf.LockstepLsEvTypeLS_EV_PVM), Slot: w.Slot, At: w.At, T: s.T, Seq: w.Seq, Paylen: w.Paylen, Sum: w.Sum,
			Flags: w.Flags | uint8(bpf.LockstepLsEvFlagLS_EV_DGRAM), L3Off: w.L3Off, L4Off: w.L4Off, PayOff: w.PayOff,
			CsumStart: w.CsumStart, CsumOffset: w.CsumOffset, FrameLen: w.FrameLen,
		}
		evs, _ = d.frameEvent(new(Buffer), bpf.LockstepLsEvTypeLS_EV_PVM, &ev, evs)
	}
	return evs
}
