// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lockstep-ft/lockstep/control/api"
)

func ptr[T any](v T) *T { return &v }

func TestPrintFlows(t *testing.T) {
	var out bytes.Buffer
	err := printFlows(&out, []api.Flow{
		{Guest: "10.0.0.2:80", Remote: "10.0.0.9:40000", State: "open", Owner: "kernel", Compared: ptr(uint32(0xfffffff0)), HeldPackets: 2, HeldBytes: 2896, Age: 1.25},
		{Guest: "[fd00::2]:80", Remote: "[fd00::9]:40000", State: "closing", VLAN: ptr(uint16(12)), Offset: ptr(uint32(99))},
	})
	want := `GUEST         REMOTE           VLAN  STATE    OWNER   OFFSET  COMPARED    HELD      AGE
10.0.0.2:80   10.0.0.9:40000   -     open     kernel  -       4294967280  2/2896 B  1.25s
[fd00::2]:80  [fd00::9]:40000  12    closing  -       99      -           0/0 B     0s
`
	if diff := cmp.Diff(want, out.String()); err != nil || diff != "" {
		t.Errorf("%v, -want +got\n%s", err, diff)
	}
}
