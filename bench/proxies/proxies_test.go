// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/lockstep-ft/lockstep/bench/lab"
	"github.com/lockstep-ft/lockstep/bench/report"
	lt "github.com/lockstep-ft/lockstep/loader/loadertest"
)

// The test binary is also the service of the guests and the client.
func TestMain(m *testing.M) {
	if len(os.Args) < 3 || os.Args[1] != "bench" || os.Args[2] != "act" {
		os.Exit(m.Run())
	}
	if err := lab.Act(os.Stdin, os.Stdout, os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestQEMUThatDies: the end of a QEMU is a result, not the end of the run.
func TestQEMUThatDies(t *testing.T) {
	lt.NeedRoot(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		lt.Missing(t, "needs QEMU: %v", err)
	}
	o := lab.Options{Quick: true, QEMU: qemu, Only: "datagrams"}
	vs := variants(o)
	v := vs[len(vs)-1]
	if v.world, err = lab.NewWorld(v.taps); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(v.end(), v.world.Close()); err != nil {
			t.Error(err)
		}
	}()
	if err := v.begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	job := measures(o, v.taps)[0].job
	if r, stalled, err := v.carry(t.Context(), job); err != nil || stalled != "" || r.result.Done != job.N {
		t.Fatalf("with QEMU: %+v, %q, %v", r, stalled, err)
	}
	v.proxy.OnP.Kill()
	if _, stalled, err := v.carry(t.Context(), job); err != nil || !strings.Contains(stalled, "QEMU ended") {
		t.Errorf("without QEMU: %q, %v", stalled, err)
	}
}

// TestStalledRounds: a round that failed has no figure, and the case says in how many that was so.
func TestStalledRounds(t *testing.T) {
	v := &variant{name: "v"}
	rs := &results{took: make(map[int]map[string][]float64), stalled: make(map[int]map[string]int),
		cases: []report.Case{{Series: make(map[string]report.Series)}}}
	f := figure{cdf: true, of: func(*variant, *run) (float64, string) { return 7, "" }}
	r := &run{}
	r.result.Took = []int64{1000, 3000}
	rs.add(0, &f, v, r, "")
	rs.add(0, &f, v, nil, "it stopped")
	rs.add(0, &f, v, nil, "it stopped again")
	rs.finish(3)
	s := rs.cases[0].Series["v"]
	if len(s.Rounds) != 1 || s.Rounds[0] != 7 || s.Instead != "in 2 of 3 rounds: it stopped" || len(s.CDF) != 2 || s.CDF[1] != [2]float64{3, 1} {
		t.Errorf("%+v", s)
	}
}
