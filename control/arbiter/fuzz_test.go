// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/lockstep-ft/lockstep/control/config"
)

// sound fails for an answer that is half an entry.
func sound(t *testing.T, r Entry, err error) {
	t.Helper()
	if (r.Term == 0) != (r.Speaker == "") || err != nil && r != (Entry{}) {
		t.Errorf("%+v, %v", r, err)
	}
}

// FuzzEtcd: whatever stands in etcd, it is an entry as a whole or none.
func FuzzEtcd(f *testing.F) {
	f.Fuzz(func(t *testing.T, value []byte) {
		resp := &clientv3.GetResponse{Kvs: []*mvccpb.KeyValue{{Value: value, ModRevision: 7}}}
		r, rev, err := new(etcd).found(resp)
		sound(t, r, err)
		if err != nil {
			return
		}
		if rev != 7 || !json.Valid(value) {
			t.Errorf("%q is taken for %s", value, r)
		}
		if again, err := decode(r.encode()); again != r || err != nil {
			t.Errorf("%s is read back as %s, %v", r, again, err)
		}
	})
}

// FuzzExec: whatever the command prints, it is an entry as a whole or none.
func FuzzExec(f *testing.F) {
	f.Fuzz(func(t *testing.T, out string) {
		r, err := parseAnswer(out)
		sound(t, r, err)
		if err == nil && (len(strings.Fields(out)) > 2 || len(out) > maxEntry) {
			t.Errorf("%q is taken for %s", out, r)
		}
	})
}

// FuzzFile: whatever file stands in the directory, and with whatever name, the arbiter
// answers with an entry, which can be changed, or with an error that names the file.
func FuzzFile(f *testing.F) {
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		if name == "" || name == "." || name == ".." || len(name) > 64 || strings.ContainsAny(name, "/\x00") {
			return
		}
		dir, err := os.MkdirTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := os.WriteFile(filepath.Join(dir, "web1."+name), content, 0o600); err != nil {
			t.Fatal(err)
		}
		a := open(t, "alpha", config.Arbiter{Type: config.ArbiterFile, Path: dir, Timeout: long})
		now, err := a.Read(t.Context())
		sound(t, now, err)
		if err != nil {
			if !strings.Contains(err.Error(), "web1.") {
				t.Errorf("which file? %v", err)
			}
			return
		}
		if settled, err := a.Settle(t.Context()); err != nil || settled != now {
			t.Fatalf("%s settles as %s, %v", now, settled, err)
		}
		if now.Term+1 == 0 {
			return // no entry can follow it
		}
		next := Entry{now.Term + 1, "beta"}
		if got, swapped, err := a.Swap(t.Context(), now, next); got != next || !swapped || err != nil {
			t.Errorf("from %s to %s: %v, %v", now, got, swapped, err)
		}
		if got, err := a.Read(t.Context()); got != next || err != nil {
			t.Errorf("%s is read back as %s, %v", next, got, err)
		}
	})
}
