// SPDX-License-Identifier: Apache-2.0

package tcp

const (
	optEnd       = 0
	optNOP       = 1
	optMSS       = 2
	optScale     = 3
	optPermitted = 4
	optSACK      = 5
	optTimestamp = 8
	optFastOpen  = 34
	optAccECN0   = 172

	timestampLen = 12 // with the NOPs in front
	maxScale     = 14
	defaultMSS   = 536 // of a peer that names none
	minMSS       = 48
)

// options are those of a segment that came in.
type options struct {
	timestamps    bool
	tsVal, tsEcr  uint32
	mss           int // 0: none
	scale         int // -1: none
	sackPermitted bool
	fastOpen      bool
	cookie        []byte // of fast open
	blocks        [4]span
	sacks         int // of blocks
}

func (o *options) parse(b []byte, syn bool) {
	// What nearly all segments have.
	if len(b) == timestampLen && be.Uint32(b) == optNOP<<24|optNOP<<16|optTimestamp<<8|10 && !syn {
		o.timestamps, o.tsVal, o.tsEcr, o.sacks = true, be.Uint32(b[4:]), be.Uint32(b[8:]), 0
		return
	}
	*o = options{scale: -1}
	for len(b) > 0 {
		kind := b[0]
		if kind == optEnd {
			return
		}
		if kind == optNOP {
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return
		}
		v := b[2:b[1]]
		b = b[b[1]:]
		switch {
		case kind == optMSS && syn && len(v) == 2:
			o.mss = int(be.Uint16(v))
		case kind == optScale && syn && len(v) == 1:
			o.scale = min(int(v[0]), maxScale)
		case kind == optPermitted && syn && len(v) == 0:
			o.sackPermitted = true
		case kind == optFastOpen && syn && len(v) <= 16:
			o.fastOpen, o.cookie = true, v
		case kind == optTimestamp && len(v) == 8:
			o.timestamps, o.tsVal, o.tsEcr = true, be.Uint32(v), be.Uint32(v[4:])
		case kind == optSACK && !syn && len(v) >= 8 && len(v)%8 == 0 && len(v) <= 32:
			for o.sacks = 0; len(v) > 0; v = v[8:] {
				o.blocks[o.sacks] = span{be.Uint32(v), be.Uint32(v[4:])}
				o.sacks++
			}
		}
	}
}

// appendTimestamp appends the option in the place of two NOPs and it, as Linux does.
func appendTimestamp(b []byte, val, ecr uint32) []byte {
	b = append(b, optNOP, optNOP, optTimestamp, 10)
	return be.AppendUint32(be.AppendUint32(b, val), ecr)
}

func appendSACK(b []byte, blocks []span) []byte {
	b = append(b, optNOP, optNOP, optSACK, uint8(2+8*len(blocks)))
	for _, s := range blocks {
		b = be.AppendUint32(be.AppendUint32(b, s.from), s.to)
	}
	return b
}

// synOptions are those of a SYN, in Linux's order.
func (c *conn) synOptions(b []byte, now int64) []byte {
	b = append(b, optMSS, 4)
	b = be.AppendUint16(b, uint16(c.s.cfg.MSS))
	switch {
	case c.timestamps && c.sack:
		b = append(b, optPermitted, 2, optTimestamp, 10)
		b = be.AppendUint32(be.AppendUint32(b, c.tsNow(now)), c.tsRecent)
	case c.timestamps:
		b = appendTimestamp(b, c.tsNow(now), c.tsRecent)
	case c.sack:
		b = append(b, optNOP, optNOP, optPermitted, 2)
	}
	if c.scaling {
		b = append(b, optNOP, optScale, 3, c.rcv.scale)
	}
	b = fastOptions(c, b)
	if c.acc.on && c.state == SynReceived {
		b = c.acc.option(b, true)
	}
	return b
}
