// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// settings are the scenario's fields that have a line of their own, by the line's first word.
var settings = []string{
	"Seed", "Arbiter", "Period", "Periodic", "Epoch", "NetDelay", "NetLoss", "NetReorder", "PeerLoss", "PeerDup", "PeerReorder", "RefuseCheckpoint",
	"MSS", "NoSACK", "NoTimestamps", "NoScale", "Autocork", "RcvBuf", "RandomISN", "GSO", "Slow", "Announce", "Slots", "Skew", "Drift",
	"IPv6", "HopOptions", "DestOptions", "SynCookies", "FastOpen", "ECN", "Mark", "Keepalive", "SeqWrap", "TSWrap", "Healed",
}

// String is the scenario as text, which [Parse] reads.
func (sc *Scenario) String() string {
	var b strings.Builder
	v := reflect.ValueOf(sc).Elem()
	for _, name := range settings {
		if f := v.FieldByName(name); !f.IsZero() {
			fmt.Fprintf(&b, "%s %s\n", name, strings.Trim(fmt.Sprint(f), "[]"))
		}
	}
	for _, c := range sc.Conns {
		fmt.Fprintf(&b, "conn %v %d", time.Duration(c.At), c.Pipelined)
		for _, r := range c.Requests {
			fmt.Fprintf(&b, " %c%d", r.Kind, r.N)
		}
		b.WriteByte('\n')
	}
	for _, f := range sc.Floods {
		fmt.Fprintf(&b, "flood %v %d\n", time.Duration(f.At), f.SYNs)
	}
	for _, x := range sc.Exchanges {
		fmt.Fprintf(&b, "ask %v %c %d %v %d\n", time.Duration(x.At), x.Kind, x.Times, time.Duration(x.Pause), x.Size)
	}
	for _, a := range sc.Actions {
		if a.Behind > 0 {
			fmt.Fprintf(&b, "behind %d ", a.Behind)
		}
		fmt.Fprintf(&b, "at %v %s %s", time.Duration(a.At), a.Kind, names[a.Host])
		if a.For != 0 {
			fmt.Fprintf(&b, " for %v", time.Duration(a.For))
		}
		if a.After != 0 {
			fmt.Fprintf(&b, " after %v", time.Duration(a.After))
		}
		if a.On != "" {
			fmt.Fprintf(&b, " on %s", a.On)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Parse reads a scenario. Empty lines, and what follows a #, are left out.
func Parse(r io.Reader) (*Scenario, error) {
	sc := new(Scenario)
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		if err := sc.line(words); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return sc, lines.Err()
}

func (sc *Scenario) line(words []string) error {
	switch words[0] {
	case "conn":
		return sc.conn(words)
	case "flood":
		return sc.flood(words)
	case "ask":
		return sc.exchange(words)
	case "at":
		return sc.action(words, 0)
	case "behind":
		if len(words) > 2 {
			n, err := strconv.Atoi(words[1])
			if err != nil {
				return err
			}
			return sc.action(words[2:], n)
		}
	}
	f := reflect.ValueOf(sc).Elem().FieldByName(words[0])
	if !f.IsValid() {
		return fmt.Errorf("there is no setting %q", words[0])
	}
	if f.Kind() == reflect.Array {
		if len(words) != 1+f.Len() {
			return fmt.Errorf("%s takes %d values", words[0], f.Len())
		}
		for i := range f.Len() {
			if err := set(f.Index(i), words[1+i]); err != nil {
				return err
			}
		}
		return nil
	}
	if len(words) != 2 {
		return fmt.Errorf("%s takes one value", words[0])
	}
	return set(f, words[1])
}

func set(f reflect.Value, text string) (err error) {
	switch f.Kind() {
	case reflect.String:
		f.SetString(text)
	case reflect.Bool:
		var v bool
		v, err = strconv.ParseBool(text)
		f.SetBool(v)
	case reflect.Uint64:
		var v uint64
		v, err = strconv.ParseUint(text, 10, 64)
		f.SetUint(v)
	default:
		var v int64
		v, err = strconv.ParseInt(text, 10, 64)
		f.SetInt(v)
	}
	return err
}

func (sc *Scenario) conn(words []string) (err error) {
	if len(words) < 3 {
		return fmt.Errorf("a connection has a time and how many requests are under way at once")
	}
	var c Conn
	at, err := time.ParseDuration(words[1])
	if err != nil {
		return err
	}
	c.At = int64(at)
	if c.Pipelined, err = strconv.Atoi(words[2]); err != nil {
		return err
	}
	for _, word := range words[3:] {
		n, err := strconv.ParseInt(word[1:], 10, 64)
		if err != nil {
			return err
		}
		c.Requests = append(c.Requests, Request{word[0], n})
	}
	sc.Conns = append(sc.Conns, c)
	return nil
}

func (sc *Scenario) flood(words []string) error {
	if len(words) != 3 {
		return fmt.Errorf("a flood is: flood TIME SYNS")
	}
	at, err1 := time.ParseDuration(words[1])
	n, err2 := strconv.Atoi(words[2])
	sc.Floods = append(sc.Floods, Flood{int64(at), n})
	return errors.Join(err1, err2)
}

func (sc *Scenario) exchange(words []string) error {
	if len(words) != 6 || len(words[2]) != 1 {
		return fmt.Errorf("an exchange of datagrams is: ask TIME KIND TIMES PAUSE SIZE")
	}
	x := Exchange{Kind: words[2][0]}
	at, err1 := time.ParseDuration(words[1])
	times, err2 := strconv.Atoi(words[3])
	pause, err3 := time.ParseDuration(words[4])
	size, err4 := strconv.Atoi(words[5])
	x.At, x.Times, x.Pause, x.Size = int64(at), times, int64(pause), size
	sc.Exchanges = append(sc.Exchanges, x)
	return errors.Join(err1, err2, err3, err4)
}

func (sc *Scenario) action(words []string, behind int) error {
	if len(words) < 4 {
		return fmt.Errorf("an action is: at TIME KIND HOST, and perhaps: for TIME, after TIME, on WHAT IS REACHED; in front of it perhaps: behind FRAMES")
	}
	at, err := time.ParseDuration(words[1])
	if err != nil {
		return err
	}
	a := Action{Behind: behind, At: int64(at), Kind: words[2]}
	if _, ok := actions[a.Kind]; !ok {
		return fmt.Errorf("there is no action %q", a.Kind)
	}
	switch words[3] {
	case names[0]:
	case names[1]:
		a.Host = 1
	default:
		return fmt.Errorf("there is no host %q", words[3])
	}
	for rest := words[4:]; len(rest) > 0; rest = rest[2:] {
		if len(rest) == 1 {
			return fmt.Errorf("nothing follows %q", rest[0])
		}
		if rest[0] == "on" {
			a.On = strings.Join(rest[1:], " ")
			break
		}
		d, err := time.ParseDuration(rest[1])
		if err != nil {
			return err
		}
		switch rest[0] {
		case "for":
			a.For = int64(d)
		case "after":
			a.After = int64(d)
		default:
			return fmt.Errorf("an action has no %q", rest[0])
		}
	}
	sc.Actions = append(sc.Actions, a)
	return nil
}
