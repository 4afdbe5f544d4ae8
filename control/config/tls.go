// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"time"
)

// TLS is how the control link is protected, and what the QEMUs send each other: with
// three files, or not at all.
type TLS struct {
	Insecure      bool          // nothing is
	QEMU          bool          // what the QEMUs send each other is: memory and disks
	CA, Cert, Key string        // may contain {node}: see Files
	Rekey         time.Duration // between two rotations of the session's keys
}

// Files are a node's CA, certificate and private key.
func (t *TLS) Files(node string) (ca, cert, key string) {
	return forNode(t.CA, node), forNode(t.Cert, node), forNode(t.Key, node)
}

func forNode(s, node string) string { return strings.ReplaceAll(s, "{node}", node) }

const needTLS = "name the files that `lockstep keys` makes (ca, cert, key), or write `tls: {insecure: true}` to let session keys travel in the clear"

func (r *reader) tls(v value, t *TLS) {
	before, qemu := len(r.errs), false
	r.mapping(v, []field{
		{"insecure", "", r.boolean(&t.Insecure)},
		{"qemu", "", func(v value) { r.boolean(&t.QEMU)(v); qemu = t.QEMU }},
		{"ca", "", r.path(&t.CA)},
		{"cert", "", r.path(&t.Cert)},
		{"key", "", r.path(&t.Key)},
		{"rekey", "", r.duration(&t.Rekey, time.Second, 24*time.Hour)},
	})
	if len(r.errs) > before {
		return
	}
	var named, missing []string
	for _, f := range []struct{ key, path string }{{"ca", t.CA}, {"cert", t.Cert}, {"key", t.Key}} {
		if f.path == "" {
			missing = append(missing, f.key)
		} else {
			named = append(named, f.key)
		}
	}
	t.QEMU = t.QEMU && !t.Insecure
	switch {
	case t.Insecure && qemu:
		r.refuse(v.pos, "tls has both insecure: true and qemu: true", "name certificates, with which QEMU protects memory and disks, or remove qemu")
	case t.Insecure && len(named) > 0:
		r.refuse(v.pos, "tls has both insecure: true and "+strings.Join(named, ", "), "keep the files for a protected link, or insecure: true for one in the clear")
	case !t.Insecure && len(named) == 0:
		r.refuse(v.pos, "tls names no files", needTLS)
	case !t.Insecure && len(missing) > 0:
		r.refuse(v.pos, "tls lacks "+strings.Join(missing, " and "), "ca, cert and key go together; `lockstep keys` makes all three")
	}
}
