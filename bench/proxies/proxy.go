// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"github.com/lockstep-ft/lockstep/bench/lab"
)

// place is a device.
type place struct {
	ns     *lab.NS
	device string
}

// Proxy is what runs between client and guests.
type Proxy struct {
	OnP, OnS *lab.Process           // nil without one
	frames   func() (frames, error) // nil if it does not count them
	Trouble  func() string          // what it reports when a case stalls; nil if it reports nothing
	Stop     func() error
}

// Died says that one of the processes, a QEMU, has ended by itself, which is a result. "" if none has.
func (p *Proxy) Died() string {
	for _, q := range []*lab.Process{p.OnP, p.OnS} {
		if q == nil {
			continue
		}
		select {
		case <-q.Ended():
			return "QEMU ended: " + lab.Short(q.Log())
		default:
		}
	}
	return ""
}

// frames are lockstep's counters of the PVM's frames.
type frames struct {
	held     uint64 // those that were held
	released uint64 // frames that left: a frame that was cut counts as more than one
}
