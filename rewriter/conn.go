// SPDX-License-Identifier: Apache-2.0

package rewriter

import "time"

// State bits of Half and Conn, as enum ls_conn_bit of bpf/abi.h has them.
type State uint32

const (
	HasPVM     State = 1 << iota // ISN of the PVM known
	HasSVM                       // ISN of the SVM known
	Active                       // the SVM's SYN had no ACK: opened by the guest
	GuestFIN                     // FIN seen from the guest
	RemoteFIN                    // FIN seen from the remote
	WasReset                     // RST seen from either, and the guest believed it
	Timestamps                   // Conn: both use timestamps
	PVMActive                    // Half: the PVM's SYN had no ACK
	PVMTS                        // Half: the PVM's SYN has a timestamp
	SVMTS                        // Half: the SVM's SYN has a timestamp
	Done                         // Half: became a Conn once, does not do so again
	Inherited                    // Conn: made by a takeover, without offset and incarnation
	Guarded                      // Conn: Guard was set
	Echoes                       // Conn: the remote echoes timestamps with the guard
	Unacked                      // Conn: the remote has sent no ACK since the guest's FIN, or what the guest repeated behind that
	Doubtful                     // Conn: made by a takeover: the offset, or none, as the guest's next segment shows
)

const bothFINs = GuestFIN | RemoteFIN

// String names the state of a Conn for status output.
func (s State) String() string {
	switch {
	case s&WasReset != 0:
		return "reset"
	case s&bothFINs != 0:
		return "closing"
	}
	return "open"
}

// Offset is what lies between two numberings of one connection, modulo 2^32.
type Offset struct {
	Seq uint32 // of sequence numbers: SVM's minus PVM's
	TS  uint32 // of TSval, likewise; 0 without timestamps
}

// Conn is a connection whose offset is known. It is never evicted (R11).
type Conn struct {
	Off     uint32 // ISN_SVM - ISN_PVM
	TSOff   uint32 // TSval_SVM - TSval_PVM
	Inc     uint32 // incarnation: ISN_PVM
	State   State
	CliAck  uint32 // highest ACK of the remote, PVM numbering
	ISNSVM  uint32
	Guard   uint32 // timestamp ticks that the remote sees more than the PVM's clock gave (R22)
	TSFirst uint32 // the first TSval with them, as the remote saw it; 0: none yet
	Last    int64  // boottime ns of the last segment
}

// Offset is the connection's translation without the guard.
func (c *Conn) Offset() Offset { return Offset{c.Off, c.TSOff} }

// Edge is the guest's numbers minus those that the remote knows, the guard included.
func (c *Conn) Edge() Offset { return Offset{c.Off, c.TSOff - c.Guard} }

// Behind is c translated once more, by the edge of a host that had taken over before. The entry has one offset then, so
// that counts of a Doubtful one that is behind an edge.
func (c Conn) Behind(edge Offset) Conn {
	if edge != (Offset{}) {
		c.State &^= Doubtful
	}
	c.Off += edge.Seq
	c.TSOff += edge.TS
	c.CliAck -= edge.Seq
	return c
}

// Settle decides on a Doubtful connection by the number of a segment of the guest, and reports whether it could. What
// the guest sends lies near what the remote has acknowledged: translated, or, after a checkpoint of which nobody knows,
// as it is. Where neither is a lot nearer the segment must not leave. That happens with much under way, since a copied
// guest chooses its ISNs as the other one does; a guest that repeats what was acknowledged as far back as the two
// numberings differ is taken for the other one.
func (c *Conn) Settle(seq uint32) bool {
	at := seq - c.CliAck
	asIs, translated := distance(at), distance(at-c.Off)
	if c.Off != 0 && asIs > translated/4 && translated > asIs/4 {
		return false
	}
	if asIs < translated {
		c.Off, c.TSOff = 0, 0
	}
	c.State &^= Doubtful
	return true
}

// distance is how far two numbers with the difference d lie apart.
func distance(d uint32) uint32 { return min(d, -d) }

// repeats is longer than a TCP waits before it repeats what is not acknowledged
// (Linux's TCP_RTO_MAX is 2 minutes).
const repeats = 3 * time.Minute

// Ended reports whether an entry can go at boottime now, in ns: both ends closed the
// connection, or one reset it, and it was idle for linger; or it was idle for idle (R11).
// Where the remote may not have the guest's FIN, and what lies before that, the guest goes on. After
// a takeover the remote may, if it missed the last ACK; and no more connections are made that are translated.
func (c *Conn) Ended(now int64, linger, idle time.Duration) bool {
	limit := idle
	switch {
	case c.State&WasReset != 0:
		limit = min(linger, idle)
	case c.State&bothFINs != bothFINs:
	case c.State&(Unacked|Guarded) == 0:
		limit = min(linger, idle)
	default:
		limit = min(repeats, idle)
	}
	return now-c.Last > int64(limit)
}
