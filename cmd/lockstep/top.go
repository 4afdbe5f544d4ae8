// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/gdamore/tcell/v2"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/lockstep-ft/lockstep/control/api"
)

// maxListed is of how many connections top asks for the list: it is long, and the daemon has other work.
const maxListed = 10_000

func newTop(e env) *cobra.Command {
	var t target
	var every time.Duration
	var count int
	cmd := &cobra.Command{
		Use:   "top -c pair.yaml --node NAME",
		Short: "Watch the pair: state, lease, rates, checkpoints, busiest connections, drops",
		Long:  "top shows what this host's daemon is doing, again and again, until q is pressed. Where the output is not a\nterminal it prints a line each time.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, self, _, err := t.load(e)
			if err != nil {
				return err
			}
			if every < 100*time.Millisecond {
				return usageError{fmt.Errorf("--every %v is too often: take 100ms or more", every)}
			}
			w := &watcher{socket: c.Socket(self.Name), none: noDaemonError{c.VM, self.Name, c.Socket(self.Name)}}
			first := w.look(cmd.Context())
			if errors.Is(first.err, api.ErrNoDaemon) {
				return first.err
			}
			if out, ok := e.stdout.(*os.File); ok && term.IsTerminal(int(out.Fd())) && count == 0 {
				screen, err := tcell.NewScreen()
				if err != nil {
					return fmt.Errorf("this terminal cannot show a screen (%w): `lockstep top | cat` prints lines", err)
				}
				return topScreen(cmd.Context(), screen, w, first, every)
			}
			return topLines(cmd.Context(), e, w, first, every, count)
		},
	}
	t.flags(cmd)
	cmd.Flags().DurationVar(&every, "every", time.Second, "time between two looks")
	cmd.Flags().IntVar(&count, "count", 0, "print so many lines, and end; 0: until it is interrupted")
	return cmd
}

// watcher asks a daemon.
type watcher struct {
	socket string
	none   noDaemonError
	before sample // the newest one that is good
}

// sample is what a daemon answered, with what it had answered before.
type sample struct {
	at     time.Time
	status api.Status
	flows  []api.Flow
	err    error
	before *sample // nil: none of this daemon
}

func (w *watcher) look(ctx context.Context) sample {
	s := sample{at: time.Now()}
	if s.status, s.err = api.FetchStatus(ctx, w.socket); s.err == nil && s.status.Connections <= maxListed {
		s.flows, s.err = api.FetchFlows(ctx, w.socket)
	}
	if errors.Is(s.err, api.ErrNoDaemon) {
		s.err = w.none
	}
	if s.err == nil {
		before := w.before
		if before.before = nil; !before.at.IsZero() && before.status.Role == s.status.Role {
			s.before = &before
		}
		w.before = s
	}
	return s
}

// topLines prints a line for each look.
func topLines(ctx context.Context, e env, w *watcher, s sample, every time.Duration, count int) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 1; ; n++ {
		if _, err := fmt.Fprintln(e.stdout, topLine(&s)); err != nil {
			return err
		}
		if n == count {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s = w.look(ctx)
		}
	}
}

// topScreen shows the samples on a terminal.
func topScreen(ctx context.Context, screen tcell.Screen, w *watcher, s sample, every time.Duration) error {
	if err := screen.Init(); err != nil {
		return fmt.Errorf("this terminal cannot show a screen (%w): `lockstep top | cat` prints lines", err)
	}
	defer screen.Fini()
	events, quit := make(chan tcell.Event), make(chan struct{})
	defer close(quit)
	go screen.ChannelEvents(events, quit)
	looks := make(chan sample)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(every):
			}
			select {
			case <-ctx.Done():
			case looks <- w.look(ctx):
			}
		}
	}()
	for {
		drawTop(screen, &s)
		select {
		case <-ctx.Done():
			return nil
		case now := <-looks:
			s = s.then(now)
		case ev := <-events:
			switch ev := ev.(type) {
			case *tcell.EventResize:
				screen.Sync()
			case *tcell.EventKey:
				if ev.Key() == tcell.KeyCtrlC || ev.Key() == tcell.KeyEscape || ev.Rune() == 'q' {
					return nil
				}
			}
		}
	}
}

// then is what to show when now comes: of a daemon that does not answer, what was known last.
func (s sample) then(now sample) sample {
	if now.err != nil {
		now.status, now.flows, now.before = s.status, s.flows, s.before
	}
	return now
}

var topStyles = map[topStyle]tcell.Style{
	topHead:  tcell.StyleDefault.Bold(true),
	topAlarm: tcell.StyleDefault.Bold(true).Foreground(tcell.ColorMaroon),
}

func drawTop(screen tcell.Screen, s *sample) {
	screen.Clear()
	_, height := screen.Size()
	for y, l := range topView(s, height) {
		for x, r := range []rune(l.text) {
			screen.SetContent(x, y, r, nil, topStyles[l.style])
		}
	}
	screen.Show()
}
