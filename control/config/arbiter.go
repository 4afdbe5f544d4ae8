// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Values of Arbiter.Type.
const (
	ArbiterEtcd = "etcd"
	ArbiterFile = "file"
	ArbiterExec = "exec"
	ArbiterNone = "none"
)

// Arbiter decides which host may transmit alone (R21).
type Arbiter struct {
	Type      string        // "": there is none, so no host takes over by itself
	Endpoints []string      // etcd: host:port of each member
	TLS       *TLSFiles     // etcd; nil: in the clear
	Path      string        // file: a directory, absolute, on storage that both hosts share
	Command   []string      // exec: the fencing command
	Timeout   time.Duration // of one request
}

// TLSFiles protect a client's connection. Cert and Key may be empty: then the
// server asks for none.
type TLSFiles struct{ CA, Cert, Key string }

// On are a node's files: {node} is replaced.
func (t *TLSFiles) On(node string) TLSFiles {
	return TLSFiles{forNode(t.CA, node), forNode(t.Cert, node), forNode(t.Key, node)}
}

const arbiterTypes = "etcd, file, exec or none"

func (r *reader) arbiter(v value, a *Arbiter) {
	before := len(r.errs)
	r.mapping(v, []field{
		{"type", "it names what decides which host may transmit alone: " + arbiterTypes, r.word(&a.Type, ArbiterEtcd, ArbiterFile, ArbiterExec, ArbiterNone)},
		{"endpoints", "", func(v value) {
			r.list(v, `a list like ["192.0.2.9:2379"]`, 16, func(v value) { r.endpoint(v, &a.Endpoints) })
		}},
		{"tls", "", func(v value) { r.arbiterTLS(v, a) }},
		{"path", "", func(v value) {
			r.text(v, "an absolute path", func(s string) {
				switch {
				case strings.Contains(s, "{node}"):
					r.refuse(v.pos, "path contains {node}, which makes two records of one", "both hosts must use the same directory, on storage they share")
				case !filepath.IsAbs(s) || strings.ContainsRune(s, 0):
					r.refuse(v.pos, fmt.Sprintf("path %q is not absolute", s), "both hosts must use the same directory, on storage they share")
				default:
					a.Path = filepath.Clean(s)
				}
			})
		}},
		{"command", "", func(v value) {
			r.list(v, `a list like ["fence-host", "--ipmi"]`, maxWords, func(v value) {
				word := ""
				if len(a.Command) == 0 {
					r.program(&word)(v)
				} else {
					r.text(v, "one argument (put numbers in quotes)", func(s string) { word = s })
				}
				a.Command = append(a.Command, word)
			})
		}},
		{"timeout", "", r.duration(&a.Timeout, 10*time.Millisecond, 10*time.Minute)},
	})
	if len(r.errs) > before {
		return
	}
	for _, k := range []struct {
		key, of string
		there   bool
		why     string
	}{
		{"endpoints", ArbiterEtcd, len(a.Endpoints) > 0, "they are etcd's members"},
		{"tls", ArbiterEtcd, a.TLS != nil, ""},
		{"path", ArbiterFile, a.Path != "", "it is a directory for the records, on storage that both hosts share"},
		{"command", ArbiterExec, len(a.Command) > 0, "it is the program that fences the other host"},
	} {
		switch _, written := r.at[v.path+"."+k.key]; {
		case written && k.of != a.Type:
			r.refuse(r.at[v.path+"."+k.key], fmt.Sprintf("%s does not go with type %s", k.key, a.Type), fmt.Sprintf("remove it, or write type: %s", k.of))
		case k.of == a.Type && !k.there && k.why != "":
			r.refuse(v.pos, fmt.Sprintf("%s.%s is missing", v.path, k.key), k.why)
		}
	}
	if a.Timeout == 0 {
		a.Timeout = map[string]time.Duration{ArbiterEtcd: DefaultEtcdTimeout, ArbiterFile: DefaultFileTimeout, ArbiterExec: DefaultExecTimeout}[a.Type]
	}
}

// arbiterTLS: without any file it is as if the key were absent.
func (r *reader) arbiterTLS(v value, a *Arbiter) {
	var t TLSFiles
	before := len(r.errs)
	r.mapping(v, []field{
		{"ca", "", r.path(&t.CA)},
		{"cert", "", r.path(&t.Cert)},
		{"key", "", r.path(&t.Key)},
	})
	switch {
	case len(r.errs) > before || t == (TLSFiles{}):
	case t.CA == "":
		r.refuse(v.pos, "tls lacks ca", "it is the CA that signed the etcd servers' certificates")
	case (t.Cert == "") != (t.Key == ""):
		r.refuse(v.pos, "tls has one of cert and key", "they go together; leave both out where etcd asks for no client certificate")
	default:
		a.TLS = &t
	}
}

func (r *reader) endpoint(v value, to *[]string) {
	const want = `a host and a port like "192.0.2.9:2379"`
	r.text(v, want, func(s string) {
		host, port, err := net.SplitHostPort(s)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || perr != nil || n == 0 || host == "" || strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c == '/' || c > '~' }) {
			r.refuse(v.pos, fmt.Sprintf("%q cannot be an endpoint", s), "it must be "+want+"; arbiter.tls decides whether TLS is used")
			return
		}
		if slices.Contains(*to, s) {
			r.refuse(v.pos, fmt.Sprintf("endpoint %q is there twice", s), "keep one of the two")
		}
		*to = append(*to, s)
	})
}
