package crash

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// sector is what a disk writes as a whole or not at all, in octets.
const sector = 512

// platter is a disk that a recording is played to: it knows what is there, what of it is surely on the disk, and what a power cut may still take.
//
// Nothing is durable before its own fsync has ended: not what is in a file, and not the name of a file or folder, which is its folder's.
// Real file systems promise more.
type platter struct {
	root   *node
	lies   bool // it says that it has written what it has not: its fsync does nothing
	events []event
	killed []*call // begun by a process that is gone, and not known to have come about
}

// event is the beginning of a call, or the end of one that makes things durable.
type event struct {
	*call
	line int
	end  bool
}

// node is a file or a folder.
type node struct {
	now, sure content
	loose     []change // what makes now of sure, in order
}

// content is a folder's names, or a file's octets.
type content struct {
	names   map[string]*node // nil: it is a file
	size    int64
	sectors map[int64][]byte // those that were written; never changed, only replaced
}

// change is what a call changes.
type change struct {
	ended      int    // line
	gone, name string // of a folder: this name goes, and that one is now …
	child      *node  // … this
	cut        bool   // of a file: it ends at size
	size       int64
	offset     int64 // of a file: data is written there
	data       []byte
}

func newFolder() *node {
	return &node{now: content{names: map[string]*node{}}, sure: content{names: map[string]*node{}}}
}

func newFile() *node {
	return &node{now: content{sectors: map[int64][]byte{}}, sure: content{sectors: map[int64][]byte{}}}
}

func (c content) clone() content {
	c.names, c.sectors = maps.Clone(c.names), maps.Clone(c.sectors)
	return c
}

// apply makes a change. torn says which of the sectors that it writes to stay as they are; nil: none.
func (c *content) apply(x change, torn func() bool) {
	if c.names != nil {
		delete(c.names, x.gone)
		if x.child != nil {
			c.names[x.name] = x.child
		}
		return
	}
	if x.cut {
		for n := range c.sectors {
			if n*sector >= x.size {
				delete(c.sectors, n)
			}
		}
		if part := x.size % sector; part > 0 && c.sectors[x.size/sector] != nil {
			c.sectors[x.size/sector] = append(bytes.Clone(c.sectors[x.size/sector][:part]), make([]byte, sector-part)...)
		}
		c.size = x.size
	}
	for offset, data := x.offset, x.data; len(data) > 0; {
		begin := offset % sector
		piece := min(int64(len(data)), sector-begin)
		if torn == nil || !torn() {
			fresh := make([]byte, sector)
			copy(fresh, c.sectors[offset/sector])
			copy(fresh[begin:], data[:piece])
			c.sectors[offset/sector] = fresh
			c.size = max(c.size, offset+piece)
		}
		offset, data = offset+piece, data[piece:]
	}
}

// clone copies a tree in which everything is durable.
func (n *node) clone() *node {
	c := &node{now: n.now.clone(), sure: n.sure.clone()}
	for name, child := range n.now.names {
		c.now.names[name] = child.clone()
		c.sure.names[name] = c.now.names[name]
	}
	return c
}

// read returns what a file has from offset on, at most size octets.
func (c content) read(offset, size int64) (data []byte) {
	zero := make([]byte, sector)
	for n := offset / sector; n*sector < min(offset+size, c.size); n++ {
		if c.sectors[n] != nil {
			data = append(data, c.sectors[n]...)
		} else {
			data = append(data, zero...)
		}
	}
	data = data[min(offset%sector, int64(len(data))):]
	return data[:min(size, int64(len(data)), max(c.size-offset, 0))]
}

// newPlatter holds what there was before the recording began, all of it durable.
func newPlatter(before *node, r *recording) *platter {
	p := &platter{root: before.clone()}
	for _, c := range r.calls {
		if c.name == "" {
			continue
		}
		p.events = append(p.events, event{c, c.began, false})
		if (c.name == "fsync" || c.name == "fdatasync") && c.ended != never {
			p.events = append(p.events, event{c, c.ended, true})
		}
	}
	slices.SortStableFunc(p.events, func(a, b event) int { return a.line - b.line })
	return p
}

// readDisk reads a folder, all of it durable. What is neither file nor folder is passed over.
func readDisk(dir string) (*node, error) {
	n := newFolder()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		child := newFile()
		switch {
		case entry.IsDir():
			if child, err = readDisk(filepath.Join(dir, entry.Name())); err != nil {
				return nil, err
			}
		case entry.Type().IsRegular():
			data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			if err != nil {
				return nil, err
			}
			child.now.size = int64(len(data))
			for at := 0; at < len(data); at += sector {
				if piece := data[at:min(at+sector, len(data))]; slices.ContainsFunc(piece, func(b byte) bool { return b != 0 }) {
					child.now.apply(change{offset: int64(at), data: piece}, nil)
				}
			}
			child.sure = child.now.clone()
		default:
			continue
		}
		n.now.names[entry.Name()], n.sure.names[entry.Name()] = child, child
	}
	return n, nil
}

// find is the node at a path that is there now; nil: none is.
func (p *platter) find(name string) *node {
	n := p.root
	for _, step := range strings.Split(name, "/") {
		if step == "." {
			continue
		}
		if n = n.now.names[step]; n == nil {
			return nil
		}
	}
	return n
}

// moments are the kinds of moments at which a power cut is telling, each as indices of the events before which it comes: any; in the middle of an
// fsync, when the most is under way; and, if there was such a thing, in the first of them after a process was killed, when what it
// had not made durable still is not, and is built on.
func (p *platter) moments() [][]int {
	kinds := make([][]int, 2)
	var first []int
	fresh := 0
	for i, e := range p.events {
		kinds[0] = append(kinds[0], i)
		switch {
		case e.name == "death":
			fresh = 8
		case e.end:
			kinds[1] = append(kinds[1], i)
			if fresh > 0 {
				fresh--
				first = append(first, i)
			}
		}
	}
	if len(first) > 0 {
		kinds = append(kinds, first)
	}
	return kinds
}

// next plays the recording's next event.
func (p *platter) next() error {
	e := p.events[0]
	p.events = p.events[1:]
	switch {
	case e.end:
		p.settle(e.call)
		return nil
	case e.name == "death":
		return p.bury(e.left, e.line)
	case e.name == "fsync", e.name == "fdatasync":
		return nil
	case e.ended == never:
		p.killed = append(p.killed, e.call)
		return nil
	}
	return p.play(e.call)
}

// settle makes durable what an fsync finds: what had ended before it began.
func (p *platter) settle(c *call) {
	n := p.find(c.path)
	if n == nil || p.lies {
		return
	}
	left := n.loose[:0:0]
	for _, x := range n.loose {
		if x.ended < c.began {
			n.sure.apply(x, nil)
		} else {
			left = append(left, x)
		}
	}
	n.loose = left
}

// bury compares what is there with what the process really left: the recording has all of it. Of a call that its end cut short that much came about as
// is there.
func (p *platter) bury(left *node, line int) error {
	really := &platter{root: left}
	for _, c := range p.killed {
		part := *c
		part.ended = line
		switch n, there := p.find(c.path), really.find(c.path); {
		case len(c.data) == 0 && differ(p.root, left, "") == nil:
			continue
		case len(c.data) > 0 && (n == nil || there == nil):
			continue
		case len(c.data) > 0:
			if c.name == "write" {
				part.offset = n.now.size
			}
			part.name, part.data = "pwrite64", there.now.read(part.offset, int64(len(c.data)))
		}
		if err := p.play(&part); err != nil {
			return err
		}
	}
	p.killed = nil
	if err := differ(p.root, left, ""); err != nil {
		return fmt.Errorf("the recording is not what happened: %w", err)
	}
	return nil
}

// differ says where what is there is not as it should be.
func differ(have, want *node, at string) error {
	if have == nil || want == nil || (have.now.names == nil) != (want.now.names == nil) {
		return fmt.Errorf("%s is not there, or should not be, or is of the wrong kind", at)
	}
	for name := range maps.Keys(have.now.names) {
		if err := differ(have.now.names[name], want.now.names[name], at+"/"+name); err != nil {
			return err
		}
	}
	for name := range maps.Keys(want.now.names) {
		if have.now.names[name] == nil {
			return fmt.Errorf("%s/%s is missing", at, name)
		}
	}
	if have.now.size != want.now.size {
		return fmt.Errorf("%s has %d octets, and not %d", at, have.now.size, want.now.size)
	}
	for octet := int64(0); octet < have.now.size; octet += sector {
		if !bytes.Equal(have.now.read(octet, sector), want.now.read(octet, sector)) {
			return fmt.Errorf("%s differs from octet %d on", at, octet)
		}
	}
	return nil
}

// play makes a call come about. It is loose until something settles it.
func (p *platter) play(c *call) error {
	add := func(n *node, x change) error {
		if n == nil {
			return fmt.Errorf("%s %s: it is not there", c.name, c.path)
		}
		x.ended = c.ended
		n.now.apply(x, nil)
		n.loose = append(n.loose, x)
		return nil
	}
	folder, name := p.find(path.Dir(c.path)), path.Base(c.path)
	n := p.find(c.path)
	switch c.name {
	case "openat":
		switch {
		case n == nil && c.makes:
			return add(folder, change{name: name, child: newFile()})
		case c.cuts && n != nil && n.now.size > 0:
			return add(n, change{cut: true})
		}
		return nil
	case "mkdirat":
		return add(folder, change{name: name, child: newFolder()})
	case "unlinkat":
		return add(folder, change{gone: name})
	case "renameat":
		if path.Dir(c.path) != path.Dir(c.to) || n == nil {
			return errors.New("a rename from folder to folder is not known")
		}
		return add(folder, change{gone: name, name: path.Base(c.to), child: n})
	case "write": // from beginning to end: nobody here does it otherwise
		if n != nil {
			return add(n, change{offset: n.now.size, data: c.data})
		}
	case "pwrite64":
		return add(n, change{offset: c.offset, data: c.data})
	case "ftruncate":
		return add(n, change{cut: true, size: c.size})
	}
	return add(n, change{})
}

// cut writes to dir what a power cut may leave: everything that is sure, and of the rest some, in a random choice. Of what was being written each sector
// is old or new.
func (p *platter) cut(dir string, random *rand.Rand) error { return p.root.cut(dir, random) }

func (n *node) cut(to string, random *rand.Rand) error {
	c := n.sure.clone()
	chance := []float64{0, 0.5, 0.5, 0.9, 1}[random.IntN(5)] // that something of this node came about
	for _, x := range n.loose {
		if random.Float64() >= chance {
			continue
		}
		var torn func() bool
		if random.IntN(4) == 0 {
			torn = func() bool { return random.IntN(2) == 0 }
		}
		c.apply(x, torn)
	}
	if c.names == nil {
		return c.write(to)
	}
	if err := os.Mkdir(to, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(c.names)) { // in an order that the seed repeats
		if err := c.names[name].cut(filepath.Join(to, name), random); err != nil {
			return err
		}
	}
	return nil
}

func (c content) write(to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(c.size); err != nil {
		return err
	}
	numbers := slices.Sorted(maps.Keys(c.sectors))
	for len(numbers) > 0 {
		run, first := []byte{}, numbers[0]
		for len(numbers) > 0 && numbers[0] == first+int64(len(run))/sector {
			run, numbers = append(run, c.sectors[numbers[0]]...), numbers[1:]
		}
		if over := first*sector + int64(len(run)) - c.size; over > 0 {
			run = run[:max(int64(len(run))-over, 0)]
		}
		if _, err := f.WriteAt(run, first*sector); err != nil {
			return err
		}
	}
	return nil
}
