// SPDX-License-Identifier: Apache-2.0

package compare

// mutation turns rules off, so that tests can show that they would notice. Only
// tests can set one.
type mutation uint32

const (
	mutR1       mutation = 1 << iota // sums count as equal
	mutR2                            // the PVM alone acknowledges
	mutR3                            // SYN and FIN need not match
	mutR4                            // repetitions of what has left are dropped
	mutR5                            // nothing is cut
	mutR6                            // nothing is done about loss on the peer link
	mutR7                            // the clock runs in spite of progress
	mutR8                            // records of any incarnation count
	mutR11                           // nothing bounds half-open connections
	mutR14                           // frames captured behind the commit point leave too
	mutR15                           // freezing does nothing
	mutR16                           // S: all that was parked is delivered
	mutR17                           // records of the next epoch are dropped
	mutR22                           // S: nothing is transmitted again
	mutEnded                         // S: a takeover transmits what belongs to connections that are over
	mutR23                           // what an earlier daemon's tables tell is not used
	mutDatagram                      // datagrams need not match
	mutRoom                          // no frame makes room for another
	mutURG                           // a cut leaves the urgent pointer as it is
	mutOrder                         // nothing is done about guests that take another order
	mutSealed                        // what a digest covers is changed
)

func (s *Secondary) off(m mutation) bool { return s.mut&m != 0 }

// mutations by the names of the rules, for the simulator's tests.
var mutations = map[string]mutation{
	"R1": mutR1, "R2": mutR2, "R3": mutR3, "R4": mutR4, "R5": mutR5, "R6": mutR6, "R7": mutR7, "R8": mutR8, "R11": mutR11,
	"R14": mutR14, "R15": mutR15, "R16": mutR16, "R17": mutR17, "R22": mutR22, "R22 ended": mutEnded, "R23": mutR23, "room": mutRoom, "datagram": mutDatagram,
}

// Mutate switches a rule off. Only tests may; TestMutate of the repository looks after that.
func (p *Primary) Mutate(rule string) { p.mut |= mutations[rule] }

// Mutate is likewise S's.
func (s *Secondary) Mutate(rule string) { s.mut |= mutations[rule] }
