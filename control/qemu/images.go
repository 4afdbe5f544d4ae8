// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// ErrRuns means that a guest runs, so that its images may change while they are compared.
var ErrRuns = errors.New("the guest runs")

// DifferentError names a disk whose images on the two hosts differ.
type DifferentError struct {
	Disk   string
	Offset int64 // bytes, of the first difference
}

func (e *DifferentError) Error() string {
	return fmt.Sprintf("disk %s: the images differ at byte %d", e.Disk, e.Offset)
}

// CompareImages compares the contents of this guest's disks with those of the secondary's
// images at to, the NBD server of [PrepareSecondary]. It returns a [*DifferentError] when
// one differs, and [ErrRuns] when the guest runs. sizes are the disks' in bytes; socket is
// a path on which QEMU listens meanwhile.
//
// Both QEMUs serve their disks over NBD, so what is compared is what the guest would
// read, whatever the images' format and whoever started QEMU. Holes are skipped.
func CompareImages(ctx context.Context, m *qmp.Monitor, disks []Disk, sizes []int64, to Incoming, socket string, progress func(Progress)) (err error) {
	before, err := atRest(m)
	if err != nil {
		return err
	}
	if err := exportDisks(m, disks, socket); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, m.ExecuteWithin(ioTimeout, "nbd-server-stop", nil, nil))
		os.Remove(socket)
	}()
	object := "" // qemu-img's certificates
	if to.TLS != nil {
		remove, err := to.TLS.folder(tlsClient, os.Geteuid(), os.Getegid())
		if err != nil {
			return err
		}
		defer remove()
		object = fmt.Sprintf("tls-creds-x509,id=%s,endpoint=%s,dir=%s,priority=%s", tlsCreds(tlsClient), tlsClient, esc(to.TLS.Dir), tlsPriority)
	}
	for i := range disks {
		d := &disks[i]
		own := []string{"server.type=unix", "server.path=" + esc(socket), "export=" + esc(d.ID)}
		peers := []string{"server.type=inet", "server.host=" + to.NBD.Addr().String(), fmt.Sprint("server.port=", to.NBD.Port()), "export=" + parentNode(i)}
		for name, value := range to.TLS.nbd(map[string]any{}) {
			peers = append(peers, fmt.Sprintf("%s=%s", name, value))
		}
		if err := compareExports(ctx, d, sizes[i], object, own, peers, progress); err != nil {
			return err
		}
	}
	after, err := atRest(m)
	if err == nil && after != before {
		err = ErrRuns // it did in between
	}
	return err
}

// atRest returns QEMU's name for the state of a guest that does not run; [ErrRuns]: it runs.
func atRest(m *qmp.Monitor) (string, error) {
	running, state, err := m.Status()
	if err == nil && running {
		err = ErrRuns
	}
	return state, err
}

// exportDisks has QEMU export the images of its disks on socket, read-only and under the
// disks' IDs. Each export is the quorum's first child: a read of the quorum itself may
// also go to the stand-in for the other host's image.
func exportDisks(m *qmp.Monitor, disks []Disk, socket string) error {
	g, err := blockGraph(m)
	if err != nil {
		return err
	}
	images := make(map[string]string)
	for i := range disks {
		name, ok := g.first(&disks[i])
		if !ok {
			return fmt.Errorf("disk %s: QEMU has no quorum of this name over an image", disks[i].ID)
		}
		images[disks[i].ID] = name
	}
	var exports []struct{ ID string }
	if err := m.Execute("query-block-exports", nil, &exports); err != nil {
		return err
	}
	for _, e := range exports {
		if images[e.ID] == "" {
			return fmt.Errorf("QEMU has the block export %q, which is not lockstep's: to compare the images it has to go", e.ID)
		}
	}
	// A daemon that was killed may have left its server. An error means that there is none.
	_ = m.ExecuteWithin(ioTimeout, "nbd-server-stop", nil, nil)
	if err := serveNBD(m, socket); err != nil {
		return err
	}
	for id, image := range images {
		if err := m.Execute("nbd-server-add", map[string]any{"device": image, "name": id}, nil); err != nil {
			return errors.Join(fmt.Errorf("disk %s: %w", id, err), m.ExecuteWithin(ioTimeout, "nbd-server-stop", nil, nil))
		}
	}
	return nil
}

// serveNBD has QEMU's NBD server listen on path. The socket is passed as a descriptor,
// because QEMU's user may have no right to make a file there.
func serveNBD(m *qmp.Monitor, path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	const name = "lockstep-nbd"
	if err := m.PassFile(name, f); err != nil {
		return err
	}
	return m.Execute("nbd-server-start", map[string]any{"addr": map[string]any{"type": "fd", "data": map[string]string{"str": name}}}, nil)
}

// first returns the first child of a disk's quorum, which is this host's image.
func (g *graph) first(d *Disk) (string, bool) {
	disk, ok := g.disk(d)
	for _, e := range g.Edges {
		if ok && e.Parent == disk && e.Name == "children.0" {
			return g.name(e.Child), true
		}
	}
	return "", false
}

// compareExports has qemu-img compare two NBD exports; own and peers are their options.
// object is one that they refer to; "": none.
func compareExports(ctx context.Context, d *Disk, size int64, object string, own, peers []string, progress func(Progress)) error {
	image := func(options []string) string { // raw, because the QEMU behind the export knows the format
		return "driver=raw,file.driver=nbd,file." + strings.Join(options, ",file.")
	}
	args := []string{"compare", "-p"}
	if object != "" {
		args = append(args, "--object", object)
	}
	cmd := exec.CommandContext(ctx, "qemu-img", append(args, "--image-opts", image(own), image(peers))...)
	cmd.WaitDelay = time.Second
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("qemu-img: %w", err)
	}
	different := mismatch(out, func(share float64) {
		progress(Progress{What: d.ID, Compare: true, Done: int64(share * float64(size)), Total: size})
	})
	err = cmd.Wait()
	switch code := cmd.ProcessState.ExitCode(); {
	case ctx.Err() != nil:
		return fmt.Errorf("disk %s: comparing the images: %w", d.ID, context.Cause(ctx))
	case code == 1 && different >= 0:
		return &DifferentError{d.ID, different}
	case err != nil:
		return fmt.Errorf("disk %s: comparing the images: qemu-img: %w: %s", d.ID, err, strings.Join(strings.Fields(complaint.String()), " "))
	}
	return nil
}

// mismatch reads what `qemu-img compare -p` prints: "    (12.50/100%)\r" again and again, then
// "Content mismatch at offset 512!\n" if so. It returns that offset; -1: none. share, from 0 to
// 1, is how much was compared.
func mismatch(out io.Reader, compared func(share float64)) (offset int64) {
	offset = -1
	lines := bufio.NewScanner(out)
	lines.Split(scanReturns)
	for lines.Scan() {
		word := strings.TrimSpace(lines.Text())
		if percent, ok := strings.CutPrefix(word, "("); ok {
			percent, _, _ = strings.Cut(percent, "/")
			if p, err := strconv.ParseFloat(percent, 64); err == nil && p >= 0 && p <= 100 {
				compared(p / 100)
			}
		} else if at, ok := strings.CutPrefix(word, "Content mismatch at offset "); ok {
			if n, err := strconv.ParseInt(strings.TrimSuffix(at, "!"), 10, 64); err == nil && n >= 0 {
				offset = n
			}
		}
	}
	return offset
}

// scanReturns is a [bufio.SplitFunc] for line feeds and carriage returns.
func scanReturns(b []byte, atEOF bool) (advance int, word []byte, err error) {
	if i := bytes.IndexAny(b, "\r\n"); i >= 0 {
		return i + 1, b[:i], nil
	}
	if atEOF && len(b) > 0 {
		return len(b), b, nil
	}
	return 0, nil, nil
}
