// SPDX-License-Identifier: Apache-2.0

package guestagent_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-ft/lockstep/control/guestagent"
)

// agent is one that plays a guest's: answers are what it sends for each command that it gets, "ID" in them is that of
// the last guest-sync-delimited. Without an answer it is silent. It returns its socket, and the commands as it gets them.
func agent(t *testing.T, greeting string, answers map[string]string) (path string, got <-chan string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	commands := make(chan string, 16)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(c, greeting)
		id := ""
		for r := bufio.NewScanner(c); r.Scan(); {
			name := regexp.MustCompile(`"execute":"([^"]*)"`).FindStringSubmatch(r.Text())[1]
			if m := regexp.MustCompile(`"id":(\d+)`).FindStringSubmatch(r.Text()); m != nil {
				id = m[1]
			}
			commands <- r.Text()
			fmt.Fprint(c, strings.ReplaceAll(answers[name], "ID", id))
		}
	}()
	return path, commands
}

const synced = "\xff{\"return\": ID}\n"

func TestClock(t *testing.T) {
	path, got := agent(t, `{"return": {}}`+"\n\xff{\"return\": 1}\n", map[string]string{ // what another client asked for
		"guest-sync-delimited": synced,
		"guest-get-time":       `{"return": 1700000000123456789}` + "\n",
		"guest-set-time":       `{"return": {}}` + "\n",
	})
	a, err := guestagent.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if at, err := a.Time(); err != nil || at.UnixNano() != 1700000000123456789 {
		t.Errorf("%v, %v", at, err)
	}
	if err := a.SetTime(time.Unix(1800000000, 5)); err != nil {
		t.Error(err)
	}
	if sync := <-got; !strings.HasPrefix(sync, "\xff{") {
		t.Errorf("%q does not begin with the delimiter", sync)
	}
	for _, want := range []string{`{"execute":"guest-get-time"}`, `{"execute":"guest-set-time","arguments":{"time":1800000000000000005}}`} {
		if line := <-got; line != want {
			t.Errorf("sent %s, want %s", line, want)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, x := range []struct{ name, sync, time, want string }{
		{"silent", "", "", "is qemu-guest-agent running in the guest?"},
		{"ends", "\xff", "", "is qemu-guest-agent running in the guest?"},
		{"no JSON", "\xffnonsense\n", "", "guest-sync-delimited: the answer is none"},
		{"refused", synced, `{"error": {"class": "GenericError", "desc": "this feature or command is not currently supported"}}` + "\n", `guest-get-time: "this feature`},
		{"another type", synced, `{"return": "noon"}` + "\n", "guest-get-time: the answer is none"},
		{"without end", synced, strings.Repeat("x", 70_000), "guest-get-time: EOF"},
	} {
		t.Run(x.name, func(t *testing.T) {
			path, _ := agent(t, "", map[string]string{"guest-sync-delimited": x.sync, "guest-get-time": x.time})
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			a, err := guestagent.Dial(ctx, path)
			if err == nil {
				defer a.Close()
				_, err = a.Time()
			}
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("%v, want %q", err, x.want)
			}
		})
	}
	if _, err := guestagent.Dial(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no socket: %v", err)
	}
}
