// SPDX-License-Identifier: Apache-2.0

// Package engines measures what comparing a packet costs, without guests and without a
// TCP stack: QEMU's colo-compare alone against lockstep, with the same packet streams.
//
//	            feeder ─ PVM's frame, then SVM's ─┐
//	                                              ▼
//	colo-compare:  two Unix sockets ─► QEMU ─► Unix socket ─► reader
//	lockstep:      tapP, tapS ─► programs, daemons, peer link ─► bridge ─► client's tap ─► reader
//
// A stream is what a guest sends on a connection: frames of one size, GSO trains, or what
// a real TCP transfer looked like. The feeder opens connections and sends, with a window
// of unreleased frames at saturation, or at a rate. The reader knows a released frame by
// its end in its connection's stream, so frames may come in another order and in parts.
//
// Before anything is measured each engine has to show that it compares: of a stream with
// one differing byte it may release only what lies before the frame with that byte.
//
// What is in the figures and what is not, [Run] says in the part's notes.
package engines

import (
	"fmt"
	"runtime"
)

// notes say what the figures hold, so that they can be judged.
func (b *bench) notes() []string {
	recorded := b.streams[len(b.streams)-1]
	total := 0
	for i := range recorded.packets {
		total += len(recorded.packets[i].payload)
	}
	all := []string{
		"Both engines get the same frames from the same feeder: as a guest with virtio-net sends them, the TCP checksum left to the device, the PVM's before the SVM's. " +
			"A frame is released when the client's side has read it. Latency counts from just before the SVM's frame is handed over until then.",
		"colo-compare runs in a QEMU without a guest (vnet_hdr_support=on, an iothread of its own, everything else as it is by default). Frames come by two Unix stream sockets in QEMU's framing and leave by a third; " +
			fmt.Sprintf("at saturation up to %d frames are written at once, which costs less than the one by one of filter-mirror and filter-redirector. ", b.streams[0].batch) +
			"Its figures hold none of what a COLO pair needs around it: these filters, filter-rewriter, the taps, and the TCP connection between the hosts.",
		"lockstep is two daemons as `lockstep run` starts them, with their control link and heartbeats, and all kernel programs. Frames enter the guests' taps one by one and leave by a third tap in the PVM's bridge. " +
			"Its figures hold, beyond comparing: the digest record's way over the peer link (a veth pair), the translation of the SVM's sequence numbers, the copy that S keeps, the release by a packet socket through the tap's programs, the bridge, " +
			fmt.Sprintf("and the mirrored ACKs of the client, one for every %d frames of a connection (%d for large ones).", b.streams[0].acks, recorded.acks),
		"CPU of the engine: of colo-compare QEMU's threads; what its sockets cost in the system calls of feeder and reader is not in it. Of lockstep the threads of both daemons, and what feeder and reader " +
			"(and the kernel's softirq threads, which others use too) take more than with the same taps and bridge without lockstep: the kernel programs, the redirects, the peer link. In CPU of engine and harness nothing is left out on either side.",
		"CPU of the kernel programs is their run time as the kernel counts it, in a round of its own because the counting costs time. It is no further cost: a part lies in the daemons' time (a release passes two programs), the rest in what the harness takes more.",
		fmt.Sprintf("At saturation at most %d frames are unreleased (%d of GSO trains and the recorded transfer), over all connections; of more than 1024 of one connection colo-compare drops the rest. "+
			"Feeder, reader and engine share this machine's %d cores: packets/s are what they reach together, and CPU per packet tells the engines apart.", b.streams[0].window, recorded.window, runtime.NumCPU()),
		"Released out of order is the share of frames that left before an older one of their connection. colo-compare sends last what has waited longest when its output socket is full; to a client's TCP that looks like loss.",
		"At a rate frames are sent when they are due, as finely as a timer wakes the feeder (some 60 µs): at 50 000 packets/s they come in small bursts. A rate is carried when at least 95 % of it could be sent and all of that was released.",
		fmt.Sprintf("The recorded transfer is %d frames of %d bytes on average: answers of 180 bytes to 1 MiB over loopback with an MTU of 1500, as the server's TCP cut them. Frames without data are left out. It is repeated on every connection, and each begins elsewhere in it.",
			len(recorded.packets), total/len(recorded.packets)),
		"Both guests' frames are cut alike and come at the same time, none is lost, and nothing is retransmitted: real guests do worse, with both engines.",
	}
	if b.lost != "" {
		all = append(all, fmt.Sprintf("lockstep had no room now and then, by its counters: %s, of %d frames of each guest. A copy that is lost was not paid for.", b.lost, b.frames))
	}
	return all
}
