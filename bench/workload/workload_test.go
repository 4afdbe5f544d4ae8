// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// The test binary is also the service, because that never ends.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "serve" {
		if err := Serve(Port, os.Stdout); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// serve runs the service until the test ends.
func serve(t *testing.T) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	service := exec.Command(exe, "serve")
	service.Stderr = os.Stderr
	out, err := service.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = service.Process.Kill()
		_ = service.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("service: %q, %v", line, err)
	}
}

// TestJobs: each kind of job does all that it is asked for.
func TestJobs(t *testing.T) {
	serve(t)
	var in, results bytes.Buffer
	jobs := []Job{
		{Do: Echo, Conns: 1, N: 50},
		{Do: Echo, Conns: 64, N: 1000},
		{Do: Connect, N: 20},
		{Do: Source, N: 1<<20 + 7, Size: chunk},
		{Do: Source, N: 10_050, Size: Message},
		{Do: Sink, N: 1<<20 + 7},
		{Do: Fetch, N: 3, Size: chunk},
		{Do: UDP, Conns: 16, N: 500},
		{Do: Hold, Conns: 4, N: 30},
		{Do: Pick, Conns: 8, N: 100},
		{Do: Hold, Conns: 1, N: 5},
		{Do: Pick, Conns: 64, N: 100}, // more than there are
		{Do: Drop},
		{Do: HTTP, N: 3},
		{Do: Differ, Conns: 1, N: 50},
		{Do: Differ, Conns: 4, N: 200, Share: 10},
		{Do: Pipeline, Conns: 1, N: 100, Under: 10, Size: 32},
		{Do: Pipeline, Conns: 3, N: 100, Under: 5, Size: 32, Piece: 7, Nagle: true},
		{Do: Dirty, N: 20 << 20},
		{Do: Echo, Conns: 1, N: 50},
	}
	for i := range jobs {
		j := &jobs[i]
		j.Stall, j.Limit = 5*time.Second, 20*time.Second
		if j.Size == 0 {
			j.Size = Message
		}
		if err := json.NewEncoder(&in).Encode(j); err != nil {
			t.Fatal(err)
		}
	}
	if err := Client("127.0.0.1:7000", &in, &results); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(&results)
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatalf("client: %q, %v", line, err)
	}
	for _, j := range jobs {
		line, _ := r.ReadString('\n')
		text, err := r.ReadString('\n')
		var got Result
		if line != "done\n" || err != nil || json.Unmarshal([]byte(text), &got) != nil {
			t.Fatalf("job %c: %q %q, %v", j.Do, line, text, err)
		}
		if got.Done != j.N || got.Stalled != "" || got.Wall <= 0 && j.Do != Drop {
			t.Errorf("job %c: %d of %d in %v, stalled: %q", j.Do, got.Done, j.N, got.Wall, got.Stalled)
		}
		if latencies := slices.Contains([]Do{Echo, Connect, Fetch, HTTP, Differ, Hold, Pick, Pipeline}, j.Do); latencies && len(got.Took) != j.N {
			t.Errorf("job %c: %d latencies of %d", j.Do, len(got.Took), j.N)
		}
	}
}

// TestStalled: a guest that does not answer makes no error, but a result that says so.
func TestStalled(t *testing.T) {
	var out bytes.Buffer
	job := `{"Do":101,"Conns":1,"N":1,"Size":100,"Stall":50000000,"Limit":1000000000}`
	if err := Client("127.0.0.2:7000", io.MultiReader(strings.NewReader(job)), &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "a connection broke") {
		t.Errorf("the client says %q, want that the connection was refused", out.String())
	}
}

// TestNothingInTime: a job whose time is over before anything is done has stalled, so nobody looks for
// the latencies of nothing.
func TestNothingInTime(t *testing.T) {
	var out bytes.Buffer
	job := `{"Do":99,"N":5,"Size":100,"Stall":50000000,"Limit":1}`
	if err := Client("127.0.0.2:7000", strings.NewReader(job), &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "nothing was done in 1ns") {
		t.Errorf("the client says %q", out.String())
	}
}

// TestHoldGivesUp: connections on which nothing comes back are counted, and do not keep the others.
func TestHoldGivesUp(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0") // it accepts, and answers nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var out bytes.Buffer
	job := `{"Do":104,"Conns":3,"N":8,"Size":100,"Stall":50000000,"Limit":5000000000}`
	if err := Client(l.Addr().String(), strings.NewReader(job), &out); err != nil {
		t.Fatal(err)
	}
	var got Result
	if _, text, _ := strings.Cut(out.String(), "done\n"); json.Unmarshal([]byte(text), &got) != nil || got.Done != 0 || got.Lost != 8 || got.Stalled != "" {
		t.Errorf("the client says %q, want that all 8 were given up", out.String())
	}
}

// TestDiffer: the responses that are asked for so are never the same, and the others are the requests.
func TestDiffer(t *testing.T) {
	serve(t)
	c, err := net.Dial("tcp", "127.0.0.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(head(&Job{Do: Differ, Size: Message}, 0)); err != nil {
		t.Fatal(err)
	}
	ask := func(first byte) string {
		request := bytes.Repeat([]byte{first}, Message)
		answer := make([]byte, Message)
		if _, err := c.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, answer); err != nil {
			t.Fatal(err)
		}
		if (first == differs) == bytes.Equal(request, answer) {
			t.Errorf("the answer to %q is %q", request, answer)
		}
		return string(answer)
	}
	ask(2)
	if first := ask(differs); first == ask(differs) {
		t.Error("two answers are the same")
	}
}

// TestHTTP: what a browser gets.
func TestHTTP(t *testing.T) {
	serve(t)
	r, err := http.Get("http://127.0.0.1:7000/123456")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if body, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(body, pattern()[:123456]) || r.Header.Get("Date") != "" {
		t.Errorf("%v: %d bytes, %v", r.Header, len(body), err)
	}
}
