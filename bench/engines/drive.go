// SPDX-License-Identifier: Apache-2.0

package engines

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

const (
	patience = 10 * time.Second       // for what must come
	grain    = 20 * time.Millisecond  // the longest wait of take
	repeat   = 200 * time.Millisecond // after it the SVM repeats a SYN|ACK
)

// guest is one of the two.
type guest int

const (
	pvm guest = iota
	svm
)

// engine compares what two guests send, and releases it.
type engine interface {
	greet(*flow) error             // the client opens a connection
	feed(guest, []frame) error     // a guest sends; the PVM before the SVM
	ack(f *flow, pos uint32) error // the client acknowledges
	// take gives visit the frames that are released, from their Ethernet headers on. It
	// returns when it has given some, or after grain.
	take(visit func(frame []byte)) error
	cpu() (time.Duration, error)      // of its processes so far
	programs() (time.Duration, error) // run time of its kernel programs while the kernel counts it
	port() (uint16, error)            // of a client's connection that there was none of yet
	renew() error                     // after it has got stuck
}

// load is what is sent.
type load struct {
	*stream
	flows int
	rate  int           // frames/s; 0: as many as leave
	span  time.Duration // for so long
	most  int           // frames; 0: as many as come in span
	// From this one on, counted from 1, a byte differs in the SVM's copy; 0: in none.
	wrong int
	quiet time.Duration // without a release in it, none is expected any more
}

// outcome is what became of a load.
type outcome struct {
	fed, released int
	bytes         int           // payload released
	reordered     int           // released before an older one of its connection
	took          time.Duration // until the last release
	latencies     []int64       // ns, from the SVM's frame on, in the order of the releases

	engine   time.Duration // CPU of the engine's processes
	programs time.Duration
	harness  time.Duration // CPU of this process
	softirq  time.Duration // CPU of the kernel's softirq threads
	kernel   time.Duration // what of the harness and the softirq threads is the engine's
}

// run is one load on its way through an engine.
type run struct {
	load
	e      engine
	flows  []*flow
	byPort map[uint16]*flow
	began  time.Time
	room   chan struct{} // something was released

	mu   sync.Mutex
	out  outcome
	last int64 // ns of the run, of the last release
	stop bool
	err  error // of take
}

// drive opens connections, sends the load over them, and waits until it is released.
func drive(ctx context.Context, e engine, l load) (*outcome, error) {
	r := &run{load: l, e: e, byPort: make(map[uint16]*flow), room: make(chan struct{}, 1)}
	for i := range l.flows {
		p, err := e.port()
		if err != nil {
			return nil, err
		}
		// Not all in step: a short run has the stream's sizes too.
		f := newFlow(l.stream, p, i*len(l.packets)/l.flows)
		r.flows, r.byPort[p] = append(r.flows, f), f
	}
	if err := r.handshake(); err != nil {
		return nil, err
	}
	before, err := costs(e)
	if err != nil {
		return nil, err
	}
	r.began = time.Now()
	var reader sync.WaitGroup
	reader.Go(r.receive)
	err = r.send(ctx)
	r.halt(nil)
	reader.Wait()
	if err = errors.Join(err, r.err); err != nil {
		return nil, err
	}
	after, err := costs(e)
	if err != nil {
		return nil, err
	}
	r.out.engine, r.out.programs = after.engine-before.engine, after.programs-before.programs
	r.out.harness, r.out.softirq = after.harness-before.harness, after.softirq-before.softirq
	r.out.took = time.Duration(r.last)
	if r.out.released < r.out.fed {
		return &r.out, nil
	}
	return &r.out, r.finish()
}

// handshake opens the connections.
func (r *run) handshake() error {
	answers, ends := make([]frame, len(r.flows)), make([]uint32, len(r.flows))
	for i, f := range r.flows {
		answers[i], ends[i] = f.synAck(), f.isn+1
		if err := r.e.greet(f); err != nil {
			return err
		}
	}
	if err := r.exchange(answers, ends); err != nil {
		return err
	}
	return r.ackAll()
}

// finish has the client acknowledge everything, and the guests send a last byte on each
// connection: lockstep's secondary takes note of what is acknowledged, and frees its
// copies of that, when the SVM goes on.
func (r *run) finish() error {
	if err := r.ackAll(); err != nil {
		return err
	}
	frames, ends := make([]frame, len(r.flows)), make([]uint32, len(r.flows))
	for i, f := range r.flows {
		frames[i], ends[i] = f.last(), f.next+1
	}
	return r.exchange(frames, ends)
}

func (r *run) ackAll() error {
	for _, f := range r.flows {
		if err := r.e.ack(f, f.next); err != nil {
			return err
		}
	}
	return nil
}

// exchange sends a frame on each connection and waits until it is released up to its end.
// The SVM repeats what the engine may have had no use for when it came.
func (r *run) exchange(frames []frame, ends []uint32) error {
	missing := make(map[uint16]int) // by port
	for i, f := range r.flows {
		missing[f.port] = i
		if err := r.e.feed(pvm, []frame{frames[i].clone()}); err != nil {
			return err
		}
	}
	var again time.Time
	for start := time.Now(); len(missing) > 0; {
		if time.Since(start) > patience {
			return fmt.Errorf("%w: on %d of %d connections a single frame was not released within %v", errStuck, len(missing), len(r.flows), patience)
		}
		if time.Now().After(again) {
			again = time.Now().Add(repeat)
			for _, i := range missing {
				if err := r.e.feed(svm, []frame{frames[i].clone()}); err != nil {
					return err
				}
			}
		}
		err := r.e.take(func(b []byte) {
			port, end, ok := endOf(b)
			if i, waits := missing[port]; ok && waits && end == ends[i] {
				delete(missing, port)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (f frame) clone() frame { return frame{bytes.Clone(f.head), f.payload} }

// send feeds until the load is through, and waits until all of it is released or the
// engine has been quiet for too long.
func (r *run) send(ctx context.Context) error {
	frames, heads := make([]frame, r.batch), make([][]byte, r.batch)
	for i := range heads {
		heads[i] = make([]byte, 0, tcpAt+60)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, over := r.due()
		switch {
		case over:
			return r.drain()
		case n == 0:
			if !r.wait() {
				return nil
			}
		case n < 0:
			time.Sleep(time.Duration(-n))
		default:
			if err := r.sendBatch(frames[:n], heads); err != nil {
				return err
			}
		}
	}
}

// due is how many frames to send now. 0: none before something is released; below that:
// none for so many ns.
func (r *run) due() (n int, over bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Since(r.began)
	if now >= r.span || r.most > 0 && r.out.fed == r.most || r.err != nil {
		return 0, true
	}
	n = r.batch
	if r.most > 0 {
		n = min(n, r.most-r.out.fed)
	}
	if r.rate > 0 {
		ready := int(now.Seconds()*float64(r.rate)) + 1 - r.out.fed
		if ready <= 0 {
			return int(now) - int(float64(r.out.fed)/float64(r.rate)*1e9) - 1, false
		}
		n = min(n, ready)
	}
	if r.window-(r.out.fed-r.out.released) < n {
		return 0, false
	}
	return n, false
}

// wait waits for a release. It reports whether there was one in time.
func (r *run) wait() bool {
	t := time.NewTimer(r.quiet)
	defer t.Stop()
	select {
	case <-r.room:
		return true
	case <-t.C:
		return false
	}
}

func (r *run) drain() error {
	for {
		r.mu.Lock()
		left := r.out.fed - r.out.released
		err := r.err
		r.mu.Unlock()
		if left == 0 || err != nil || !r.wait() {
			return nil
		}
	}
}

func (r *run) sendBatch(frames []frame, heads [][]byte) error {
	for i := range frames {
		frames[i] = r.flows[(r.out.fed+i)%len(r.flows)].frame(r.stream, heads[i])
	}
	if err := r.e.feed(pvm, frames); err != nil {
		return err
	}
	r.mu.Lock()
	at := int64(time.Since(r.began))
	for i := range frames {
		f := r.flows[r.out.fed%len(r.flows)]
		f.pending = append(f.pending, waiting{frames[i].end(), len(frames[i].payload), at})
		r.out.fed++
		if r.out.fed == r.wrong {
			frames[i].payload = bytes.Clone(frames[i].payload)
			frames[i].payload[len(frames[i].payload)/2] ^= 1
		}
	}
	r.mu.Unlock()
	return r.e.feed(svm, frames)
}

func (r *run) receive() {
	for {
		r.mu.Lock()
		stop := r.stop
		r.mu.Unlock()
		if stop {
			return
		}
		if err := r.e.take(r.release); err != nil {
			r.halt(err)
			return
		}
	}
}

func (r *run) halt(err error) {
	r.mu.Lock()
	r.stop, r.err = true, cmp.Or(r.err, err)
	r.mu.Unlock()
}

// release notes a released frame. An engine may release a connection's frames in another
// order: colo-compare does where its output socket is full.
func (r *run) release(b []byte) {
	port, end, ok := endOf(b)
	f := r.byPort[port]
	if !ok || f == nil {
		return
	}
	r.mu.Lock()
	i := slices.IndexFunc(f.pending, func(w waiting) bool { return w.end == end })
	if i < 0 {
		r.mu.Unlock()
		return // a repetition
	}
	now := int64(time.Since(r.began))
	r.out.latencies = append(r.out.latencies, now-f.pending[i].at)
	r.out.bytes += f.pending[i].size
	if i == 0 {
		f.pending = f.pending[1:]
	} else {
		r.out.reordered++
		f.pending = slices.Delete(f.pending, i, i+1)
	}
	r.out.released++
	r.last = now
	r.mu.Unlock()
	select {
	case r.room <- struct{}{}:
	default: // the sender has not seen the one before
	}
	if f.unacked++; f.unacked >= r.acks {
		f.unacked = 0
		if err := r.e.ack(f, end); err != nil {
			r.halt(err)
		}
	}
}

// costs reads the clocks.
func costs(e engine) (o outcome, err error) {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return o, fmt.Errorf("CPU time of this process: %w", err)
	}
	o.harness = time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	if o.softirq, err = softirqThreads(); err != nil {
		return o, err
	}
	if o.programs, err = e.programs(); err != nil {
		return o, err
	}
	o.engine, err = e.cpu()
	return o, err
}

// cpuOf is the time that a process's threads have run.
func cpuOf(pid int) (time.Duration, error) {
	u, err := lab.UsageOf(pid)
	return u.CPU, err
}

// ksoftirqd finds the kernel's threads for softirqs that have waited for too long.
var ksoftirqd = sync.OnceValues(func() (pids []int, err error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range names {
		b, err := os.ReadFile(f)
		if err != nil || !strings.HasPrefix(string(b), "ksoftirqd/") {
			continue // it has ended, or is another
		}
		var pid int
		if _, err := fmt.Sscanf(f, "/proc/%d/comm", &pid); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		pids = append(pids, pid)
	}
	return pids, err
})

func softirqThreads() (sum time.Duration, err error) {
	pids, err := ksoftirqd()
	for _, pid := range pids {
		ran, err := cpuOf(pid)
		if err != nil {
			return 0, err
		}
		sum += ran
	}
	return sum, err
}
