// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"golang.org/x/sys/unix"
)

// The guest's registers: numbers that clients read, write, and swap if they have a value
// (CAS), on a disk that both hosts have. The model that a history of them is checked with
// is here too.

// registerKeys is the number of registers. Each is 0 at first.
const registerKeys = 8

// registerOp is an operation. Of a read To and From mean nothing, of a write From.
type registerOp struct {
	Kind     byte // 'r', 'w', 'c'
	Key      int
	To, From uint64 // the new value, and which one it replaces
	Loose    bool   // the guest's clock decides how soon: both guests may take another order
}

// registerAnswer is what the guest answered to an operation.
type registerAnswer struct {
	Pending bool   // there was no answer: nobody knows whether it took place
	Value   uint64 // of a read
	Done    bool   // of a swap: the register had the value From
}

// Requests and answers are lines. An answer is as long as every other, so that only its
// bytes show that the guests differ.
const (
	requestLine = "%c %d %d %d %t\n"
	answerLine  = "%016x %5t\n"
)

// registers is the guest's side: each answer is given when the disk has what it says.
type registers struct {
	mu     sync.Mutex
	disk   *os.File
	block  []byte // for direct I/O
	memory [registerKeys]uint64
}

// registerBlock is the room of a register on the disk.
const registerBlock = 4096

// openRegisters reads the registers from the guest's disk, where they are made at first.
func openRegisters() (*registers, error) {
	f, err := os.OpenFile("/disk/registers", os.O_RDWR|os.O_CREATE|unix.O_DIRECT|unix.O_DSYNC, 0o600)
	if err != nil {
		return nil, err
	}
	block, err := unix.Mmap(-1, 0, registerBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	r := &registers{disk: f, block: block}
	info, err := f.Stat()
	for key := range registerKeys {
		if err == nil && info.Size() < int64(key+1)*registerBlock {
			err = r.write(key, 0)
		}
		if err == nil {
			r.memory[key], err = r.read(key)
		}
	}
	return r, err
}

func (r *registers) read(key int) (uint64, error) {
	_, err := r.disk.ReadAt(r.block, int64(key)*registerBlock)
	return binary.LittleEndian.Uint64(r.block), err
}

func (r *registers) write(key int, v uint64) error {
	binary.LittleEndian.PutUint64(r.block, v)
	_, err := r.disk.WriteAt(r.block, int64(key)*registerBlock)
	r.memory[key] = v
	return err
}

// do carries an operation out. The register is read from the disk, and it is an error when
// the guest's memory has another value.
func (r *registers) do(o registerOp) (a registerAnswer, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.Key < 0 || o.Key >= registerKeys {
		return a, fmt.Errorf("register %d: there are %d", o.Key, registerKeys)
	}
	if a.Value, err = r.read(o.Key); err != nil {
		return a, err
	}
	if a.Value != r.memory[o.Key] {
		return a, fmt.Errorf("register %d is %#x in memory and %#x on the disk", o.Key, r.memory[o.Key], a.Value)
	}
	a.Done = o.Kind != 'c' || a.Value == o.From
	if o.Kind != 'r' {
		a.Value = 0 // nobody asked
		if a.Done {
			err = r.write(o.Key, o.To)
		}
	}
	return a, err
}

// serveRegisters serves one client.
func serveRegisters(c *net.TCPConn) {
	r, err := guestRegisters()
	for in := bufio.NewReader(c); ; {
		var o registerOp
		if _, bad := fmt.Fscanf(in, requestLine, &o.Kind, &o.Key, &o.To, &o.From, &o.Loose); bad != nil {
			return
		}
		if o.Loose {
			time.Sleep(time.Duration(time.Now().UnixMicro()%20) * time.Millisecond)
		}
		var a registerAnswer
		if err == nil {
			a, err = r.do(o)
		}
		if err != nil {
			fmt.Fprintln(c, "error:", err)
			return
		}
		fmt.Fprintf(c, answerLine, a.Value, a.Done)
	}
}

var guestRegisters = sync.OnceValues(openRegisters)

// registerHistory is what clients have done so far, and what they wait for.
type registerHistory struct {
	began time.Time
	quiet atomic.Bool // clients read only
	mu    sync.Mutex
	ops   []porcupine.Operation
}

// call adds an operation, as one that may take place at any time from now on.
func (h *registerHistory) call(client int, o registerOp) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{
		ClientId: client, Input: o, Call: int64(time.Since(h.began)), Output: registerAnswer{Pending: true}, Return: math.MaxInt64,
	})
	return len(h.ops) - 1
}

// answered adds what call's operation n has led to.
func (h *registerHistory) answered(n int, a registerAnswer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops[n].Output, h.ops[n].Return = a, int64(time.Since(h.began))
}

// check checks the history so far.
func (h *registerHistory) check() ([]porcupine.Operation, porcupine.CheckResult) {
	h.mu.Lock()
	ops := slices.Clone(h.ops)
	h.mu.Unlock()
	return ops, porcupine.CheckOperationsTimeout(registerModel, ops, time.Minute)
}

// registerClient uses the registers over one connection.
type registerClient struct {
	*registerHistory
	id, loose int // one of so many operations is
	c         net.Conn
	in        *bufio.Reader
	rng       *rand.Rand
	n         int                  // operations so far
	last      [registerKeys]uint64 // what this client knows of the registers
}

// patience is how long a client waits for an answer. Hosts may die meanwhile.
const patience = 2 * time.Minute

// next draws an operation. Each value is written once.
func (c *registerClient) next() registerOp {
	kinds := "rrwwc"
	if c.quiet.Load() {
		kinds = "r"
	}
	o := registerOp{Kind: kinds[c.rng.IntN(len(kinds))], Key: c.rng.IntN(registerKeys), Loose: c.rng.IntN(c.loose) == 0}
	if o.Kind != 'r' {
		o.To = uint64(c.id+1)<<32 | uint64(c.n)
	}
	if o.Kind == 'c' {
		o.From = c.last[o.Key]
	}
	return o
}

// do carries an operation out, which the history has then, with its answer or without.
func (c *registerClient) do() error {
	c.n++
	o := c.next()
	n := c.call(c.id, o)
	a, err := c.ask(o)
	if err != nil {
		return fmt.Errorf("client %d has lost its connection at operation %d: %w", c.id, c.n, err)
	}
	c.answered(n, a)
	if o.Kind == 'r' {
		c.last[o.Key] = a.Value
	} else if a.Done {
		c.last[o.Key] = o.To
	}
	return nil
}

func (c *registerClient) ask(o registerOp) (a registerAnswer, err error) {
	c.c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(c.c, requestLine, o.Kind, o.Key, o.To, o.From, o.Loose); err != nil {
		return a, err
	}
	line, err := c.in.ReadString('\n')
	if err != nil {
		return a, err
	}
	if _, err := fmt.Sscanf(line, answerLine, &a.Value, &a.Done); err != nil {
		return a, fmt.Errorf("the guest answered %q", line)
	}
	return a, nil
}

// registerModel is what registers do, one operation after the other: a register's
// state is its value.
var registerModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		keys := make([][]porcupine.Operation, registerKeys)
		for _, o := range history {
			key := o.Input.(registerOp).Key
			keys[key] = append(keys[key], o)
		}
		return slices.DeleteFunc(keys, func(k []porcupine.Operation) bool { return len(k) == 0 })
	},
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		v, o, a := state.(uint64), input.(registerOp), output.(registerAnswer)
		switch o.Kind {
		case 'r':
			return a.Pending || a.Value == v, v
		case 'w':
			return true, o.To
		}
		if swaps := o.From == v; a.Pending || a.Done == swaps {
			if swaps {
				v = o.To
			}
			return true, v
		}
		return false, v
	},
	DescribeOperation: func(input, output any) string {
		o, a := input.(registerOp), output.(registerAnswer)
		answer := map[bool]string{true: "done", false: "not done"}[a.Done]
		if o.Kind == 'r' {
			answer = fmt.Sprintf("%#x", a.Value)
		}
		if a.Pending {
			answer = "no answer"
		}
		return fmt.Sprintf(map[byte]string{
			'r': "read %[1]d: %[4]s", 'w': "write %[1]d ← %#[2]x: %[4]s", 'c': "swap %[1]d: %#[3]x ← %#[2]x: %[4]s",
		}[o.Kind], o.Key, o.To, o.From, answer)
	},
	DescribeState: func(state any) string { return fmt.Sprintf("%#x", state) },
}

// TestRegisterModel: which histories the registers' model takes, and that one in which a
// write is lost is none of them.
func TestRegisterModel(t *testing.T) {
	op := func(client int, o registerOp, a registerAnswer, call, returned int64) porcupine.Operation {
		return porcupine.Operation{ClientId: client, Input: o, Output: a, Call: call, Return: returned}
	}
	done, refused, pending := registerAnswer{Done: true}, registerAnswer{}, registerAnswer{Pending: true}
	write := func(to uint64) registerOp { return registerOp{Kind: 'w', To: to} }
	swap := func(from, to uint64) registerOp { return registerOp{Kind: 'c', From: from, To: to} }
	read, got := registerOp{Kind: 'r'}, func(v uint64) registerAnswer { return registerAnswer{Value: v} }
	const never = math.MaxInt64
	for _, x := range []struct {
		name string
		want porcupine.CheckResult
		ops  []porcupine.Operation
	}{
		{"as written", porcupine.Ok, []porcupine.Operation{
			op(0, read, got(0), 0, 1), op(0, write(5), done, 2, 3), op(1, read, got(5), 4, 5),
			op(1, swap(5, 6), done, 6, 7), op(0, swap(5, 7), refused, 8, 9), op(0, read, got(6), 10, 11),
		}},
		{"a confirmed write is lost", porcupine.Illegal, []porcupine.Operation{
			op(0, write(5), done, 0, 1), op(1, write(6), done, 2, 3), op(0, read, got(5), 4, 5),
		}},
		{"a write is lost that was read", porcupine.Illegal, []porcupine.Operation{
			op(0, write(5), done, 0, 10), op(1, read, got(5), 1, 2), op(1, read, got(0), 3, 4),
		}},
		{"two writes at a time, in one order for one client and in the other for another", porcupine.Illegal, []porcupine.Operation{
			op(0, write(5), done, 0, 10), op(1, write(6), done, 0, 10),
			op(2, read, got(5), 11, 12), op(3, read, got(6), 13, 14),
		}},
		{"a swap is confirmed twice", porcupine.Illegal, []porcupine.Operation{
			op(0, swap(0, 5), done, 0, 10), op(1, swap(0, 6), done, 0, 10),
		}},
		{"a swap that took place is refused", porcupine.Illegal, []porcupine.Operation{
			op(0, swap(0, 5), refused, 0, 1),
		}},
		{"what has no answer may take place late", porcupine.Ok, []porcupine.Operation{
			op(0, write(5), pending, 0, never), op(1, read, got(0), 2, 3), op(1, read, got(5), 4, 5),
		}},
		{"or never", porcupine.Ok, []porcupine.Operation{
			op(0, swap(0, 5), pending, 0, never), op(1, read, got(0), 2, 3), op(1, swap(0, 6), done, 4, 5), op(1, read, got(6), 6, 7),
		}},
		{"but not twice", porcupine.Illegal, []porcupine.Operation{
			op(0, write(5), pending, 0, never), op(1, read, got(5), 2, 3), op(1, write(6), done, 4, 5), op(1, read, got(5), 6, 7),
		}},
		{"registers are apart", porcupine.Ok, []porcupine.Operation{
			op(0, write(5), done, 0, 1), op(0, registerOp{Kind: 'r', Key: 1}, got(0), 2, 3), op(0, registerOp{Kind: 'w', Key: 1, To: 9}, done, 4, 5), op(0, read, got(5), 6, 7),
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			if is := porcupine.CheckOperationsTimeout(registerModel, x.ops, time.Minute); is != x.want {
				t.Errorf("%v, want %v", is, x.want)
				for _, o := range x.ops {
					t.Log(registerModel.DescribeOperation(o.Input, o.Output))
				}
			}
		})
	}
}
