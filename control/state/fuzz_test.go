// SPDX-License-Identifier: Apache-2.0

package state

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// FuzzLoad: a file that a crash, a disk or somebody else has written is refused by name, or
// is a whole state. With signed the line has its checksum.
func FuzzLoad(f *testing.F) {
	s, err := Open(f.TempDir(), "web1", "alpha")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, content []byte, signed bool) {
		if signed {
			line, _, _ := bytes.Cut(content, []byte("\n"))
			content = append(append(bytes.Clone(line), '\n'), checksum(line)...)
		}
		if err := os.WriteFile(s.Path(), content, 0o600); err != nil {
			t.Fatal(err)
		}
		st, err := s.Load()
		if err != nil {
			if st != (State{}) || !strings.Contains(err.Error(), s.Path()) {
				t.Errorf("%+v, %v", st, err)
			}
			return
		}
		if line, _, _ := bytes.Cut(content, []byte("\n")); st.Role != "primary" && st.Role != "secondary" || !json.Valid(line) {
			t.Errorf("%q is taken for %+v", content, st)
		}
		if err := s.Save(st); err != nil {
			t.Fatal(err)
		}
		if again, err := s.Load(); again != st || err != nil {
			t.Errorf("%+v is read back as %+v, %v", st, again, err)
		}
		// What a write that was cut off leaves is no state.
		whole, err := os.ReadFile(s.Path())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.decode(whole[:len(whole)-1-len(content)%len(whole)]); err == nil {
			t.Errorf("a part of %q is taken for a state", whole)
		}
	})
}
