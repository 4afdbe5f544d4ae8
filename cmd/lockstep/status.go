// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"
)

// askTimeout is longer than any answer takes: a daemon that is later is stuck.
const askTimeout = 10 * time.Second

// ask gets what the daemon says about topic and prints it.
func (t *target) ask(ctx context.Context, topic string, asJSON bool, out io.Writer, show func(io.Writer, []byte) error) error {
	c, self, _, err := t.load()
	if err != nil {
		return err
	}
	socket := c.Socket(self.Name)
	client := http.Client{
		Timeout: askTimeout,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://lockstep/"+topic, nil)
	if err != nil {
		return fmt.Errorf("ask for %s: %w", topic, err)
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return noDaemonError{vm: c.VM, node: self.Name, socket: socket, err: cause(err)}
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s is not yours to read; run this as root", socket)
	case err != nil:
		return fmt.Errorf("the daemon behind %s does not answer: %w", socket, cause(err))
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the daemon refused to tell its %s: %s", topic, bytes.TrimSpace(body))
	}
	if asJSON {
		_, err = out.Write(body)
		return err
	}
	return show(out, body)
}

// cause strips what net and http put around a system's error.
func cause(err error) error {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return errno
	}
	return err
}

func printStatus(out io.Writer, body []byte) error {
	var s Status
	if err := json.Unmarshal(body, &s); err != nil {
		return fmt.Errorf("the daemon's answer makes no sense, is it of another version? %w", err)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s on %s:\t%s, %s, epoch %d\n", s.VM, s.Node, s.Role, s.State, s.Epoch)
	if s.Peer.Connected {
		fmt.Fprintf(w, "peer:\t%s, connected\n", s.Peer.Node)
	} else {
		fmt.Fprintf(w, "peer:\t%s, NOT CONNECTED\n", s.Peer.Node)
	}
	fmt.Fprintf(w, "connections:\t%d\n", s.Connections)
	fmt.Fprintf(w, "held:\t%d packets, %d bytes\n", s.HeldPackets, s.HeldBytes)
	fmt.Fprintf(w, "released:\t%d packets\n", s.ReleasedPackets)
	fmt.Fprintf(w, "checkpoints:\t%d requested, %d done\n", s.CheckpointsRequested, s.CheckpointsDone)
	printCounts(w, "dropped", s.Dropped)
	for i, p := range s.Programs {
		label := ""
		if i == 0 {
			label = "programs:"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", label, p.Name, p.Device, p.Attach)
	}
	return w.Flush()
}

// printCounts lists what is not zero, the largest first.
func printCounts(w io.Writer, label string, counts map[string]uint64) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	none := true
	for _, name := range names {
		if counts[name] == 0 {
			continue
		}
		if none {
			fmt.Fprintf(w, "%s:\t%d %s\n", label, counts[name], name)
		} else {
			fmt.Fprintf(w, "\t%d %s\n", counts[name], name)
		}
		none = false
	}
	if none {
		fmt.Fprintf(w, "%s:\tnothing\n", label)
	}
}

func printFlows(out io.Writer, body []byte) error {
	var flows []Flow
	if err := json.Unmarshal(body, &flows); err != nil {
		return fmt.Errorf("the daemon's answer makes no sense, is it of another version? %w", err)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "GUEST\tREMOTE\tVLAN\tSTATE\tOFFSET\tCOMPARED\tHELD\tAGE")
	for _, f := range flows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d/%d B\t%v\n", f.Guest, f.Remote, dash(f.VLAN), f.State,
			dash(f.Offset), dash(f.Compared), f.HeldPackets, f.HeldBytes,
			time.Duration(f.Age*float64(time.Second)).Round(time.Millisecond))
	}
	return w.Flush()
}

// dash prints what is not known, or does not apply, as a dash.
func dash[T any](v *T) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprint(*v)
}
