// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// TLS protects the connections between the two hosts' QEMUs, for memory and disks: both
// sides show a certificate of the pair's, and take the other node's only. The files are
// read when a QEMU becomes part of a new pair, so a renewal needs no restart.
type TLS struct {
	CA, Cert, Key string // this node's PEM files
	Peer          string // the name that the other node's certificate has as its DNS name, and alone as its subject's CN
	Dir           string // the folder in which QEMU finds the files for a moment; it is made and removed
}

// Ends of a connection, as QEMU names them.
const (
	tlsServer = "server"
	tlsClient = "client"
)

// tlsPeer is the ID of the object by which a server knows its peer.
const tlsPeer = "lockstep-tls-peer"

// tlsCreds is the ID of the object that has the certificates for an end.
func tlsCreds(end string) string { return "lockstep-tls-" + end }

// folder makes the folder with the certificates for an end, in which they have the names that
// QEMU wants, and which uid and gid may read. remove removes it again: it has the private key.
// One that a killed daemon left is replaced.
func (t *TLS) folder(end string, uid, gid int) (remove func() error, err error) {
	remove = func() error { return os.RemoveAll(t.Dir) }
	if err := remove(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(t.Dir, 0o700); err != nil {
		return nil, err
	}
	for name, from := range map[string]string{"ca-cert.pem": t.CA, end + "-cert.pem": t.Cert, end + "-key.pem": t.Key} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(t.Dir, name), b, 0o400)
		}
		if err == nil {
			err = os.Chown(filepath.Join(t.Dir, name), uid, gid)
		}
		if err != nil {
			return nil, errors.Join(err, remove())
		}
	}
	if err := os.Chown(t.Dir, uid, gid); err != nil {
		return nil, errors.Join(err, remove())
	}
	return remove, nil
}

// use has QEMU's migration be TLS at an end, with the certificates as they are on disk now. A
// nil TLS has it be in the clear.
func (t *TLS) use(m *qmp.Monitor, end string) error {
	if t == nil {
		return m.Execute("migrate-set-parameters", map[string]string{"tls-creds": ""}, nil)
	}
	err := t.load(m, end)
	if err == nil {
		params := map[string]string{"tls-creds": tlsCreds(end), "tls-hostname": t.Peer, "tls-authz": tlsPeer}
		err = m.Execute("migrate-set-parameters", params, nil)
	}
	if err != nil {
		return fmt.Errorf("tls between the QEMUs: %w", err)
	}
	return nil
}

// load makes QEMU's objects anew. A connection goes on with those that it began with.
func (t *TLS) load(m *qmp.Monitor, end string) error {
	uid, gid, err := userOf(m)
	if err != nil {
		return err
	}
	remove, err := t.folder(end, uid, gid)
	if err != nil {
		return err
	}
	defer remove()
	dir, err := filepath.Abs(t.Dir) // QEMU's working directory may be another
	if err != nil {
		return err
	}
	for _, object := range []map[string]any{
		{"qom-type": "tls-creds-x509", "id": tlsCreds(end), "endpoint": end, "dir": dir, "verify-peer": true, "priority": tlsPriority},
		{"qom-type": "authz-simple", "id": tlsPeer, "identity": "CN=" + t.Peer},
	} {
		_ = m.Execute("object-del", map[string]any{"id": object["id"]}, nil) // an error means that there is none
		// 7.2 makes the parameters of a key exchange that TLS 1.3 does not use, which takes up to a second.
		if err := m.ExecuteWithin(ioTimeout, "object-add", object, nil); err != nil {
			return fmt.Errorf("QEMU does not take %s, %s and %s: %w", t.CA, t.Cert, t.Key, err)
		}
	}
	return nil
}

// tlsPriority has TLS 1.3 alone, in GnuTLS's notation, and without AES: after 2^24 records,
// some 64 GiB, GnuTLS changes an AES key, in which QEMU may crash (qemu-project/qemu issue
// 1937). A change of key that was made on purpose ended the migration of a 7.2.
const tlsPriority = "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+CHACHA20-POLY1305"

// wire is the connection of a migration under TLS. QEMU does not make it itself: one that it
// makes blocks, so that a peer which does not answer in the TLS handshake would halt the whole
// QEMU, guest and monitor, and neither yank nor migrate_cancel knows of it before the handshake
// is over (7.2). The zero wire is none.
type wire struct{ file *os.File }

// connect makes the connection, and returns by which URI QEMU has it. A migration in the
// clear is left to QEMU.
func (w *wire) connect(ctx context.Context, m *qmp.Monitor, to Incoming, o Options) (uri string, err error) {
	if to.TLS == nil || o.ownConnection {
		return to.Migration, nil
	}
	const name = "lockstep-migration"
	network, address, _ := strings.Cut(to.Migration, ":")
	d := net.Dialer{Timeout: cutAfter}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return "", fmt.Errorf("migration: %w", err)
	}
	defer conn.Close()
	f, err := conn.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return "", fmt.Errorf("migration: %w", err)
	}
	w.file = f
	if err := m.PassFile(name, f); err != nil {
		return "", err
	}
	// QEMU has it block once the handshake is over.
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		return "", fmt.Errorf("migration: %w", err)
	}
	return "fd:" + name, nil
}

// cut ends a handshake that the peer does not answer.
func (w *wire) cut() {
	if w.file != nil {
		_ = unix.Shutdown(int(w.file.Fd()), unix.SHUT_RDWR)
	}
}

// release leaves the connection to QEMU alone.
func (w *wire) release() {
	if w.file != nil {
		w.file.Close()
	}
}

// InClear reports whether a QEMU that is in COLO is so without TLS.
func InClear(m *qmp.Monitor) (bool, error) {
	var params struct {
		Creds string `json:"tls-creds"`
	}
	err := m.Execute("query-migrate-parameters", nil, &params)
	return params.Creds == "", err
}

// nbd adds to an NBD client's options what TLS needs. A nil TLS adds nothing.
func (t *TLS) nbd(options map[string]any) map[string]any {
	if t != nil {
		options["tls-creds"], options["tls-hostname"] = tlsCreds(tlsClient), t.Peer
	}
	return options
}

// userOf returns the user and group that QEMU has become. It has executed a command before,
// which it does not until then.
func userOf(m *qmp.Monitor) (uid, gid int, err error) {
	p, err := Owner(m.Conn())
	if err != nil {
		return 0, 0, err
	}
	defer p.Release()
	// The owner of /proc/PID would be root: a process that has changed its user is not dumpable.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, 0, err
	}
	ids := map[string]int{"Uid:": -1, "Gid:": -1}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // "Uid:", real, effective, saved, of file accesses
		if len(f) != 5 || ids[f[0]] != -1 {
			continue
		}
		if n, err := strconv.Atoi(f[4]); err == nil {
			ids[f[0]] = n
		}
	}
	if ids["Uid:"] < 0 || ids["Gid:"] < 0 {
		return 0, 0, fmt.Errorf("process %d: its user is not known", p.pid)
	}
	return ids["Uid:"], ids["Gid:"], nil
}
