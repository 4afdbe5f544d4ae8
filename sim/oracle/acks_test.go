// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// ackSchedule is a stream of both guests, cut as each likes, while the client sends and each guest
// acknowledges when it likes.
func ackSchedule(seed uint64) (order []*packet, length int) {
	const ofClient = 100 // bytes in a segment of the client's
	r := rand.New(rand.NewPCG(seed, 1))
	length = 1 + r.IntN(300)
	sent := uint32(1) // position behind what the client has sent
	next, acked := map[who]int{}, map[who]uint32{pvm: 1, svm: 1}
	for next[pvm] < length || next[svm] < length || acked[pvm] < sent || acked[svm] < sent {
		p := &packet{from: []who{client, pvm, svm}[r.IntN(3)], kind: "tcp", conn: 1, flags: flagACK, ack: 1, win: defaultWin, ttl: defaultTTL}
		if p.from == client {
			if sent < 5*ofClient {
				p.seq, p.payload = sent, streamAt(sent, ofClient)
				sent += ofClient
				order = append(order, p)
			}
			continue
		}
		at := next[p.from]
		acked[p.from] += ofClient * uint32(r.IntN(1+int(sent-acked[p.from])/ofClient))
		n := min(r.IntN(80), length-at)
		p.seq, p.ack, p.payload = uint32(1+at), acked[p.from], streamAt(uint32(1+at), n)
		next[p.from] += n
		order = append(order, p)
	}
	return order, length
}

// playACKs: lockstep never acknowledges more than both guests have, and in the end all that both
// have (R2).
func playACKs(e engine, seed uint64, base uint16) error {
	r := &scenario{engine: e, world: newWorld(base)}
	if _, err := r.open(nil); err != nil {
		return err
	}
	e.take()
	order, length := ackSchedule(seed)
	acked, last, got := map[who]uint32{pvm: 1, svm: 1}, uint32(1), make(map[int]byte)
	look := func() error {
		for _, ev := range e.take() {
			if ev.to == 0 {
				return fmt.Errorf("a checkpoint was asked for, though the guests sent the same")
			}
			if ev.to != client {
				continue
			}
			ack := binary.BigEndian.Uint32(ev.frame[42:]) - r.of(1).client
			if most := min(acked[pvm], acked[svm]); ack > most || ack < last {
				return fmt.Errorf("ack %d left; before it %d did, and both guests have %d", ack, last, most)
			}
			last = ack
			if err := note(got, ev.frame, r.world); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range order {
		if p.from != client {
			acked[p.from] = max(acked[p.from], p.ack)
		}
		if err := e.send(p.from, p.frame(r.world)); err != nil {
			return err
		}
		if err := e.settle(); err != nil {
			return err
		}
		if err := look(); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if len(got) == length && last == min(acked[pvm], acked[svm]) {
			return nil
		}
		if err := errors.Join(e.settle(), look()); err != nil {
			return err
		}
	}
	return fmt.Errorf("%d of %d bytes left; %d was acknowledged, and both guests have %d", len(got), length, last, min(acked[pvm], acked[svm]))
}
