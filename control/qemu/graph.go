// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"

	"github.com/lockstep-ft/lockstep/control/qmp"
)

// A disk is a quorum of two children with the vote threshold 2 (R24): a write or a
// flush is reported to the guest as done when both replicas took it. When one did
// not, the request stays queued in the device and QEMU stops the guest (werror=stop).
// So a write that was confirmed to the guest is never missing on either replica, in
// whatever order and however late events come. The event QUORUM_REPORT_BAD names the
// replica that failed, and the failover machine decides what happens next.
//
// While there is no secondary, the second child is a stand-in for its replica: it
// accepts every write and keeps none, so it fails every read.
//
//	guest's device ── quorum "ID", threshold 2 ─┬─ parentN (P) or childsN (S): this host's image
//	                                            └─ absentN, or nbdN (P): the secondary's image
//
// A QEMU that lockstep did not start may have a quorum of threshold 1, as in QEMU's
// docs/COLO-FT.txt. That reports a write as done when one replica failed ([Masked]).

// Names of block nodes; a quorum's is the disk's ID. A QEMU that lockstep did not start
// needs "parentN" and the IDs.
func parentNode(i int) string { return fmt.Sprintf("parent%d", i) } // S: the image; also the NBD export
func activeNode(i int) string { return fmt.Sprintf("active%d", i) } // S: what the SVM wrote since the checkpoint
func hiddenNode(i int) string { return fmt.Sprintf("hidden%d", i) } // S: what the PVM overwrote since
func childNode(i int) string  { return fmt.Sprintf("childs%d", i) } // S: replication
func nbdNode(i int) string    { return fmt.Sprintf("nbd%d", i) }    // P: the secondary's image
func absentNode(i int) string { return fmt.Sprintf("absent%d", i) }

// absent is the stand-in of size bytes for the replica that is not there.
func absent(i int, size int64) node {
	return node{
		"driver": "blkdebug", "node-name": absentNode(i),
		"image":        node{"driver": "null-co", "size": size, "read-zeroes": true},
		"inject-error": []node{{"event": "none", "iotype": "read", "errno": 5}}, // EIO
	}
}

// quorum is disk i over child, which leads to this host's image, and the stand-in.
func (s *Spec) quorum(i int, child string) node {
	threshold := 2
	if s.mask {
		threshold = 1
	}
	n := node{
		"driver": "quorum", "node-name": s.Disks[i].ID, "read-pattern": "fifo", "vote-threshold": threshold,
		"children": []string{child, absentNode(i)},
	}
	if s.Disks[i].Discard { // a quorum passes zeroes on, and no discard (7.2 to 11)
		n["discard"], n["detect-zeroes"] = "unmap", "unmap"
	}
	return n
}

// graph is QEMU's graph of block nodes.
type graph struct {
	Nodes []struct {
		ID   int
		Type string // "block-driver", "block-backend", "block-job"
		Name string // two of different types may have one
	}
	Edges []struct {
		Parent, Child int
		Name          string
	}
}

func blockGraph(m *qmp.Monitor) (g graph, err error) {
	err = m.Execute("x-debug-query-block-graph", nil, &g)
	return g, err
}

// disk finds the quorum of a disk: the node whose name is the disk's ID, or the root of
// the drive of that name, as in QEMU's docs/COLO-FT.txt.
func (g *graph) disk(d *Disk) (id int, ok bool) {
	drive := 0
	for _, n := range g.Nodes {
		switch {
		case n.Name != d.ID:
		case n.Type == "block-driver":
			return n.ID, true
		case n.Type == "block-backend":
			drive = n.ID
		}
	}
	for _, e := range g.Edges {
		if e.Parent == drive && e.Name == "root" {
			return e.Child, true
		}
	}
	return 0, false
}

// child returns the name of the quorum's edge to a child; false: that is no child of it.
func (g *graph) child(d *Disk, child string) (string, bool) {
	disk, ok := g.disk(d)
	for _, e := range g.Edges {
		if ok && e.Parent == disk && g.name(e.Child) == child {
			return e.Name, true
		}
	}
	return "", false
}

func (g *graph) name(id int) string {
	for _, n := range g.Nodes {
		if n.ID == id {
			return n.Name
		}
	}
	return ""
}

func (g *graph) has(name string) bool {
	for _, n := range g.Nodes {
		if n.Name == name {
			return true
		}
	}
	return false
}

func addChild(m *qmp.Monitor, d *Disk, name string) error {
	return m.ExecuteWithin(ioTimeout, "x-blockdev-change", map[string]any{"parent": d.ID, "node": name}, nil)
}

// removeChild removes a node from a disk's quorum, if it is a child, and deletes it.
func removeChild(m *qmp.Monitor, g *graph, d *Disk, name string) error {
	if edge, is := g.child(d, name); is {
		if err := m.ExecuteWithin(ioTimeout, "x-blockdev-change", map[string]any{"parent": d.ID, "child": edge}, nil); err != nil {
			return err
		}
	}
	if !g.has(name) {
		return nil
	}
	return m.ExecuteWithin(ioTimeout, "blockdev-del", map[string]any{"node-name": name}, nil)
}

// attach makes the secondary's image the second replica of every disk. The guest is
// stopped, and the image is the same as this host's.
func attach(m *qmp.Monitor, disks []Disk) error {
	for i := range disks {
		d := &disks[i]
		if err := addChild(m, d, nbdNode(i)); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		g, err := blockGraph(m)
		if err == nil {
			// As a third child the stand-in's vote and one replica's would reach the threshold.
			err = removeChild(m, &g, d, absentNode(i))
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// detach removes the secondary's images from the disks, where they are replicas. It may
// be repeated.
func detach(m *qmp.Monitor, disks []Disk) error {
	if len(disks) == 0 {
		return nil
	}
	g, err := blockGraph(m)
	if err != nil {
		return err
	}
	for i := range disks {
		d := &disks[i]
		if _, is := g.child(d, nbdNode(i)); is && !g.hasStandIn(i, d) {
			threshold, err := threshold(m, &g, d)
			if err == nil && threshold > 1 {
				err = addStandIn(m, &g, i, d)
			}
			if err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, err)
			}
		}
		if err := removeChild(m, &g, d, nbdNode(i)); err != nil {
			return fmt.Errorf("disk %s: the secondary's image stays: %w", d.ID, err)
		}
	}
	return nil
}

// hasStandIn reports whether the stand-in is a child of the disk's quorum.
func (g *graph) hasStandIn(i int, d *Disk) bool {
	_, is := g.child(d, absentNode(i))
	return is
}

// addStandIn adds the stand-in to a disk's quorum.
func addStandIn(m *qmp.Monitor, g *graph, i int, d *Disk) error {
	if !g.has(absentNode(i)) {
		info, err := quorumNode(m, g, d)
		if err != nil {
			return err
		}
		if err := m.ExecuteWithin(ioTimeout, "blockdev-add", absent(i, info.Image.Size), nil); err != nil {
			return err
		}
	}
	return addChild(m, d, absentNode(i))
}

type namedNode struct {
	Name  string `json:"node-name"`
	File  string // of a quorum: "json:{…}" with its options
	Image struct {
		Size int64 `json:"virtual-size"`
	}
	Bitmaps []bitmap `json:"dirty-bitmaps"`
}

func quorumNode(m *qmp.Monitor, g *graph, d *Disk) (namedNode, error) {
	var list []namedNode
	if err := m.Execute("query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return namedNode{}, err
	}
	id, ok := g.disk(d)
	i := slices.IndexFunc(list, func(n namedNode) bool { return n.Name == g.name(id) })
	if !ok || i < 0 {
		return namedNode{}, fmt.Errorf("QEMU has neither a block node nor a drive %q", d.ID)
	}
	return list[i], nil
}

// threshold is the quorum's vote threshold. QEMU has no query for a node's options: they
// are in its file name, "json:{…}", whose end may be cut off.
func threshold(m *qmp.Monitor, g *graph, d *Disk) (int, error) {
	info, err := quorumNode(m, g, d)
	if err != nil {
		return 0, err
	}
	found := voteThreshold.FindStringSubmatch(info.File)
	if found == nil {
		return 0, fmt.Errorf("QEMU does not tell the quorum's vote threshold: %.200q", info.File)
	}
	return strconv.Atoi(found[1])
}

// voteThreshold: the value is a number if -blockdev set it, a string if -drive did.
var voteThreshold = regexp.MustCompile(`"vote-threshold": "?([0-9]{1,9})\b`)

// Masked returns the IDs of the disks whose vote threshold is 1: QEMU hides from the
// guest that one of the replicas failed.
func Masked(m *qmp.Monitor, disks []Disk) ([]string, error) {
	g, err := blockGraph(m)
	if err != nil {
		return nil, err
	}
	var ids []string
	for i := range disks {
		n, err := threshold(m, &g, &disks[i])
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", disks[i].ID, err)
		}
		if n < 2 {
			ids = append(ids, disks[i].ID)
		}
	}
	return ids, nil
}

// Unreplicated returns the IDs of the disks whose replicas are not this host's image and
// the secondary's, or that have the stand-in. It is for a primary. An error says nothing
// about the disks: QEMU did not answer.
func Unreplicated(m *qmp.Monitor, disks []Disk) (ids []string, err error) {
	if len(disks) == 0 {
		return nil, nil
	}
	g, err := blockGraph(m)
	if err != nil {
		return nil, err
	}
	for i := range disks {
		d := &disks[i]
		if _, is := g.child(d, nbdNode(i)); !is || g.hasStandIn(i, d) {
			ids = append(ids, d.ID)
		}
	}
	return ids, nil
}

// Replica returns the ID of the disk that a block node named in an event belongs to, and
// whether the node is the secondary's image, which a primary has.
func Replica(node string, disks []Disk) (disk string, secondarys bool) {
	for i := range disks {
		if node == nbdNode(i) {
			return disks[i].ID, true
		}
		if slices.Contains([]string{disks[i].ID, parentNode(i), childNode(i), activeNode(i), hiddenNode(i)}, node) {
			return disks[i].ID, false
		}
	}
	return node, false
}

// nodes returns the names of all block nodes.
func nodes(m *qmp.Monitor) (map[string]bool, error) {
	var list []struct {
		Name string `json:"node-name"`
	}
	if err := m.Execute("query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(list))
	for _, n := range list {
		names[n.Name] = true
	}
	return names, nil
}
