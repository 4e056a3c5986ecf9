package ledger

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"

	bolt "go.etcd.io/bbolt"
)

// newestPages is how many pages of each tree are looked at when a file is opened: those of its last keys, more than are read then.
const newestPages = 256

// pages looks at the pages of a bbolt file before bbolt goes down from one to the next: it does so for ever, and takes memory for each step, when one leads back
// up. A disk leaves such a file that lost a write which it had called durable.
type pages struct {
	file *os.File
	size int64 // of a page
	seen map[uint64]bool
	left int // pages that are still to be looked at, of this tree
}

// checkPages makes sure that no page is used twice, which is also to say that every way down ends: of each tree up to limit pages, those of its last
// keys first.
func checkPages(tx *bolt.Tx, limit int) error {
	f, err := os.Open(tx.DB().Path())
	if err != nil {
		return err
	}
	defer f.Close()
	p := &pages{file: f, size: int64(tx.DB().Info().PageSize), seen: map[uint64]bool{}}
	return p.tree(uint64(tx.Cursor().Bucket().Root()), limit)
}

// tree looks at a tree, and at those of the buckets that it holds.
func (p *pages) tree(root uint64, limit int) error {
	p.left = limit
	buckets, err := p.down(root)
	for _, bucket := range buckets {
		if err == nil {
			err = p.tree(bucket, limit)
		}
	}
	return err
}

// down looks at a page and those below it, and returns the roots of the buckets that it finds. bbolt itself looks at everything else in a page.
func (p *pages) down(id uint64) (buckets []uint64, err error) {
	const header, element, branch, leaf, bucketFlag = 16, 16, 0x01, 0x02, 0x01
	if p.left--; p.left < 0 {
		return nil, nil
	}
	if p.seen[id] {
		return nil, damaged{fmt.Errorf("the file's structure is damaged: page %d is used twice", id)}
	}
	p.seen[id] = true
	broken := damaged{fmt.Errorf("the file's structure is damaged: page %d is none", id)}
	if id > math.MaxInt64/uint64(p.size) {
		return nil, broken
	}
	at := int64(id) * p.size
	page := make([]byte, p.size)
	if _, err := p.file.ReadAt(page, at); err != nil {
		return nil, damaged{fmt.Errorf("the file's structure is damaged: page %d cannot be read: %w", id, err)}
	}
	order := binary.NativeEndian
	kind, count := order.Uint16(page[8:]), int(order.Uint16(page[10:]))
	if order.Uint64(page) != id || kind != branch && kind != leaf {
		return nil, broken
	}
	if need := header + count*element; need > len(page) { // it runs on over the next ones
		page = make([]byte, need)
		if _, err := p.file.ReadAt(page, at); err != nil {
			return nil, broken
		}
	}
	for i := count - 1; i >= 0; i-- {
		e := page[header+i*element:][:element]
		if kind == branch {
			below, err := p.down(order.Uint64(e[8:]))
			if err != nil {
				return nil, err
			}
			buckets = append(buckets, below...)
			continue
		}
		if order.Uint32(e) != bucketFlag {
			continue
		}
		root := make([]byte, 8) // a bucket's value begins with it; 0: the bucket has no page of its own
		if _, err := p.file.ReadAt(root, at+int64(header+i*element)+int64(order.Uint32(e[4:]))+int64(order.Uint32(e[8:]))); err != nil {
			return nil, broken
		}
		if id := order.Uint64(root); id != 0 {
			buckets = append(buckets, id)
		}
	}
	return buckets, nil
}
