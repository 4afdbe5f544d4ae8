// SPDX-License-Identifier: Apache-2.0

package failover

import (
	"testing"
	"time"
)

// What a takeover, a host that goes on alone, and one that is fenced give as their reason is what has happened.
func TestWhy(t *testing.T) {
	const ms = int64(time.Millisecond)
	type at struct {
		ms int64
		ev Event
	}
	cfg := DefaultConfig(500*time.Millisecond, 400*time.Millisecond, 3*time.Second)
	up, covered := at{1, Event{Kind: EvLinkUp, OK: true, Term: 7}}, at{2, Event{Kind: EvCovered, Term: 7}}
	down := func(lives bool) at { return at{100, Event{Kind: EvLinkDown, OK: lives}} }
	tick := func(ms int64) at { return at{ms, Event{Kind: EvTick, Echoed: 90 * int64(time.Millisecond)}} }
	for want, events := range map[string][]at{
		"the secondary's host has sent nothing for heartbeat.timeout":                  {up, down(false), tick(700)},
		"the secondary's daemon has not come back within heartbeat.restart":            {up, {2, Event{Kind: EvTick, Echoed: 9000 * ms}}, down(true), tick(3200)},
		"the secondary's kernel has not answered for heartbeat.timeout":                {up, tick(700)},
		"nothing could leave, and no checkpoint with the secondary ended that":         {up, {10, Event{Kind: EvDoubt, OK: true}}, {10_010, Event{Kind: EvTick, Echoed: 10_000 * ms}}},
		"the secondary's guest has ended, or is of no use":                             {up, {10, Event{Kind: EvPeerDead, OK: true}}},
		"the secondary's disks may lack a write":                                       {up, {10, Event{Kind: EvReplica}}},
		"QEMU has lost the secondary's":                                                {up, {10, Event{Kind: EvCOLOExit}}},
		"an operator ordered it":                                                       {up, {10, Event{Kind: EvTakeOver}}},
		"the secondary's host came back with another guest than the one that followed": {up, {10, Event{Kind: EvLinkUp}}},
		"its QEMU is dead":                                {up, {10, Event{Kind: EvQEMUDead}}},
		"an operator has the secondary take over":         {up, {10, Event{Kind: EvYield}}},
		"the arbiter names the other node":                {up, {10, Event{Kind: EvEntry, Term: 8}}},
		"the other node won the arbiter":                  {up, {10, Event{Kind: EvReplica}}, {20, Event{Kind: EvClaimed, Term: 8}}},
		"its guest cannot go on, and the secondary's can": {up, {5, Event{Kind: EvCommitted}}, {10, Event{Kind: EvGuestFailed}}},
	} {
		p := NewPrimary(cfg, 7, PrimaryStart, false, 0)
		for _, x := range events {
			p.Step(x.ms*ms, x.ev)
		}
		if p.Why() != want || p.State() != PrimaryClaim && p.State() != PrimaryFenced {
			t.Errorf("P is in state %d because %s; want %q", p.State(), p.Why(), want)
		}
	}
	for want, events := range map[string][]at{
		"the primary's host has sent nothing for heartbeat.timeout":            {up, covered, down(false), tick(700)},
		"the primary's daemon has not come back within heartbeat.restart":      {up, covered, down(true), tick(3200)},
		"the primary's daemon and its QEMU have both closed their connections": {up, covered, {90, Event{Kind: EvCOLOExit}}, down(true), tick(700)},
		"the primary's daemon reports that its guest cannot go on":             {up, covered, {10, Event{Kind: EvPeerDead, OK: true}}},
		"the primary's daemon came back, and does not go on with the pair":     {up, covered, {10, Event{Kind: EvPeerDead}}},
		"an operator ordered it":                       {up, covered, {10, Event{Kind: EvTakeOver}}, {20, Event{Kind: EvPeerDead, OK: true}}},
		"the primary goes on without this secondary":   {up, {10, Event{Kind: EvDismissed}}},
		"its QEMU is dead":                             {up, {10, Event{Kind: EvQEMUDead}}},
		"its guest cannot go on":                       {up, {10, Event{Kind: EvGuestFailed}}},
		"its QEMU has lost the primary's, which lives": {up, {10, Event{Kind: EvCOLOExit}}, {400, Event{Kind: EvReceived}}, {800, Event{Kind: EvReceived}}, {1200, Event{Kind: EvReceived}}},
		"the primary won the arbiter":                  {up, covered, down(false), tick(700), {710, Event{Kind: EvClaimed, Term: 8}}},
	} {
		s := NewSecondary(cfg, 7, false, 0)
		for _, x := range events {
			s.Step(x.ms*ms, x.ev)
		}
		if s.Why() != want || s.State() != SecondaryClaim && s.State() != SecondaryFenced {
			t.Errorf("S is in state %d because %s; want %q", s.State(), s.Why(), want)
		}
	}
}
