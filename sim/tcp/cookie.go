// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"net/netip"
	"time"
)

// SYN cookies, as Linux makes them with tcp_syncookies=2: nothing is kept of a SYN. Its options are in the low bits
// of the SYN|ACK's timestamp, without timestamps there are none. The ACK brings both back.

const (
	cookieMinute = int64(time.Minute) // the counter's step; a cookie is valid for two
	cookieBits   = 24                 // below the counter
)

// cookieMSS are those that a cookie can name.
var cookieMSS = [...]int{536, 1300, 1440, 1460}

// What the low bits of the timestamp say.
const (
	cookieNoScale = 15
	cookieSACK    = 1 << 4
	cookieECN     = 1 << 5
	cookieOptions = 1<<6 - 1
)

// synCookie is the initial sequence number that answers a SYN.
func synCookie(s *Stack, t tuple, irs uint32, minute uint32, mss uint32) uint32 {
	return cookieHash(s, t, 0) + irs + minute<<cookieBits + (cookieHash(s, t, 1+uint64(minute))+mss)&(1<<cookieBits-1)
}

// cookieHash draws its key when it is needed first, as Linux does: guests that were copies then do not share it.
func cookieHash(s *Stack, t tuple, salt uint64) uint32 {
	if s.cookieKey == 0 {
		s.cookieKey = mix(s.rng.Uint64()^uint64(s.now)) | 1
	}
	return uint32(mix(s.hash(t, 16+salt) ^ s.cookieKey))
}

// answerWithCookie answers a SYN, and keeps nothing.
func answerWithCookie(s *Stack, now int64, t tuple, g *segment) {
	c := newConn(s, -1, t)
	c.state = SynReceived
	c.agree(now, g)
	c.ecn = s.cfg.ECN && g.flags&(ece|cwr) == ece|cwr
	n := uint32(0)
	for i, mss := range cookieMSS {
		if mss <= c.snd.mss {
			n = uint32(i)
		}
	}
	c.iss = synCookie(s, t, g.seq, uint32(now/cookieMinute), n)
	c.snd.start(c.iss)
	if c.timestamps {
		c.tsOffset += cookieStamp(c, now) - c.tsNow(now)
	} else {
		c.sack, c.scaling, c.ecn = false, false, false
	}
	c.sendSYN(now)
}

// cookieStamp is the newest timestamp that has the options in it.
func cookieStamp(c *conn, now int64) uint32 {
	opts := uint32(cookieNoScale)
	if c.scaling {
		opts = uint32(c.snd.scale)
	}
	if c.sack {
		opts |= cookieSACK
	}
	if c.ecn {
		opts |= cookieECN
	}
	ts := c.tsNow(now)
	stamp := ts&^cookieOptions | opts
	if after(stamp, ts) {
		stamp -= cookieOptions + 1
	}
	return stamp
}

// byCookie makes the connection that an ACK with a cookie is for; nil: it has none.
func byCookie(s *Stack, now int64, remote netip.Addr, g *segment) *conn {
	if !s.cfg.SynCookies || g.has(syn|rst) || !g.has(ack) {
		return nil
	}
	t := tuple{remote, g.from, g.to}
	cookie, irs := g.ack-1, g.seq-1
	minute := uint32(now / cookieMinute)
	made := (cookie - irs - cookieHash(s, t, 0)) >> cookieBits
	age := (minute - made) & 0xff
	if age > 1 {
		return nil
	}
	n := (cookie - irs - cookieHash(s, t, 0) - cookieHash(s, t, 1+uint64(minute-age))) & (1<<cookieBits - 1)
	if n >= uint32(len(cookieMSS)) {
		return nil
	}
	c := s.add(t)
	c.state, c.iss, c.listener, c.cookie = SynReceived, cookie, true, true
	s.ports[g.to].pending++
	c.snd.start(cookie)
	c.snd.nxt++
	told := segment{seq: irs, wnd: g.wnd}
	told.options = options{mss: cookieMSS[n], scale: -1, timestamps: g.timestamps, tsVal: g.tsVal}
	if g.timestamps {
		told.sackPermitted = g.tsEcr&cookieSACK != 0
		if scale := int(g.tsEcr & cookieNoScale); scale != cookieNoScale {
			told.scale = scale
		}
		c.ecn = s.cfg.ECN && g.tsEcr&cookieECN != 0
	}
	c.agree(now, &told)
	return c
}
