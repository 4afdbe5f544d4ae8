// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/program"
)

// execArbiter runs a command, which fences the other host and keeps the entry
// (docs/ARBITER.md):
//
//	COMMAND... read PAIR
//	COMMAND... swap PAIR TERM OLD NEW OTHER
//
// It prints the entry in force then, "TERM SPEAKER" or "0", and exits with 0.
// Anything else is an unknown outcome.
type execArbiter struct {
	pair, self, other string
	command           []string
	timeout           time.Duration

	open *[2]Entry // old and next of a Swap of unknown outcome
}

func (e *execArbiter) Close() error { return nil }

func (e *execArbiter) Read(ctx context.Context) (Entry, error) {
	return e.run(ctx, "read", e.pair)
}

func (e *execArbiter) Swap(ctx context.Context, old, next Entry) (now Entry, swapped bool, err error) {
	if err := checkSwap(old, next); err != nil {
		return Entry{}, false, err
	}
	if next.Speaker != e.self {
		return Entry{}, false, fmt.Errorf("arbiter exec: %s cannot fence on behalf of %s", e.self, next.Speaker)
	}
	if e.open != nil && *e.open != [2]Entry{old, next} {
		return Entry{}, false, fmt.Errorf("arbiter exec: the outcome of the change to %s is still unknown; settle it first", e.open[1])
	}
	e.open = &[2]Entry{old, next}
	was := "-"
	if old.Speaker != "" {
		was = old.Speaker
	}
	now, err = e.run(ctx, "swap", e.pair, strconv.FormatUint(next.Term, 10), was, next.Speaker, e.other)
	if err == nil {
		err = checkNow(old, now)
	}
	if err != nil {
		return Entry{}, false, err
	}
	e.open = nil
	return now, now == next, nil
}

// Settle repeats the Swap whose outcome is unknown. What the command began cannot be
// cancelled, and its contract is to do the same for the same fencing term.
func (e *execArbiter) Settle(ctx context.Context) (Entry, error) {
	if e.open == nil {
		return e.Read(ctx)
	}
	now, _, err := e.Swap(ctx, e.open[0], e.open[1])
	return now, err
}

func (e *execArbiter) run(ctx context.Context, args ...string) (Entry, error) {
	ctx, done := context.WithTimeout(ctx, e.timeout)
	defer done()
	stdout, stderr, err := program.Output(ctx, e.command[0], append(e.command[1:len(e.command):len(e.command)], args...)...)
	var r Entry
	if err == nil {
		r, err = parseAnswer(stdout)
	} else if errors.Is(err, program.ErrGivenUp) {
		err = fmt.Errorf("no answer in time, killed: %w", err)
	}
	if err != nil {
		if stderr != "" {
			err = fmt.Errorf("%w; it printed: %s", err, stderr[max(0, len(stderr)-maxEntry):])
		}
		return Entry{}, fmt.Errorf("arbiter exec: %s %s: %w", e.command[0], args[0], err)
	}
	return r, nil
}

// parseAnswer takes one line "TERM SPEAKER", or "0".
func parseAnswer(s string) (r Entry, err error) {
	bad := fmt.Errorf(`it printed %q, where the entry in force was expected, as "TERM SPEAKER" or "0"`, s[max(0, len(s)-maxEntry):])
	line, rest, _ := strings.Cut(s, "\n")
	words := strings.Fields(line)
	if len(s) > maxEntry || rest != "" || len(words) == 0 || len(words) > 2 {
		return Entry{}, bad
	}
	if r.Term, err = strconv.ParseUint(words[0], 10, 64); err != nil || (r.Term == 0) != (len(words) == 1) {
		return Entry{}, bad
	}
	if len(words) == 2 {
		r.Speaker = words[1]
	}
	return r, nil
}
