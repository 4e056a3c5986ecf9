package ledger

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// The file ledger.db is a bbolt file with these buckets. Numbers are eight octets, big-endian, so that keys sort as they count.
//
//	meta                          log, incarnation, trust domain, head, anchor, horizon, probe
//	events        number       →  the event's stored form
//	commits       first number →  count (4 octets), chain hash after the commit (32)
//	trustdomain/<td>              floor: the sequence number below which no bundle is handed out
//	  authorities id           →  authorityRow
//	  bundles     sequence     →  bundleRow
//	  holdings    chain, bundle, hour → count (8), latest notAfter (8)
//	  tokens      id           →  tokenRow
//	  revoked     serial       →  notAfter (8)
//	  settled     number of an issue  →  bits: confirmed, retired, superseded (1); then, if a Confirm told of one, the bundle (8)
const storeFile = "ledger.db"

var (
	bucketMeta         = []byte("meta")
	bucketEvents       = []byte("events")
	bucketCommits      = []byte("commits")
	bucketTrustDomains = []byte("trustdomain")

	bucketAuthorities = []byte("authorities")
	bucketBundles     = []byte("bundles")
	bucketHoldings    = []byte("holdings")
	bucketTokens      = []byte("tokens")
	bucketRevoked     = []byte("revoked")
	bucketSettled     = []byte("settled")

	keyLog         = []byte("log")          // 16 octets
	keyIncarnation = []byte("incarnation")  // 32
	keyTrustDomain = []byte("trust domain") // the name
	keyHead        = []byte("head")         // number (8), time (8), chain hash (32)
	keyAnchor      = []byte("anchor")       // first number kept (8), chain hash before it (32)
	keyHorizon     = []byte("horizon")      // the latest guarded time (8) that something was pruned at
	keyProbe       = []byte("probe")        // time of the last probe (8)
	keyFloor       = []byte("floor")        // sequence number (8)
)

const (
	lockTimeout = time.Second
	// initialMap is address space, not memory. As long as the file fits, growing it never waits for readers.
	initialMap = 1 << 30
	// syncedFree is up to how many free pages their list is written with every commit, so that opening need not look for them.
	// After a mass drop it is much longer, and would slow every commit.
	syncedFree = 1000
	// headEvents is about how many of the last events are read when a file is opened.
	headEvents = 256
)

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// toNumber reads what number wrote; anything else gives 0, which no event has.
func toNumber(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// contain runs fn and turns a panic in it into an error: bbolt asserts what it reads, and a file shorter than its map is a
// memory fault.
func contain(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch reason := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // what the disk does not give to a map into memory
			err = fmt.Errorf("the file cannot be read from the disk: %v", reason)
		default:
			err = damaged{fmt.Errorf("the file's structure is damaged: %v", reason)}
		}
	}()
	return fn()
}

// createStore makes a new file under its name only once it is complete.
func createStore(path, trustDomain string) error {
	temporary := path + temporarySuffix
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	db, err := bolt.Open(temporary, 0o600, &bolt.Options{Timeout: lockTimeout, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error { return initStore(tx, trustDomain) })
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func initStore(tx *bolt.Tx, trustDomain string) error {
	var log LogID
	var incarnation Hash
	rand.Read(log[:]) // never fails since Go 1.24
	rand.Read(incarnation[:])
	buckets := map[string]*bolt.Bucket{}
	for _, name := range [][]byte{bucketMeta, bucketEvents, bucketCommits, bucketTrustDomains} {
		b, err := tx.CreateBucket(name)
		if err != nil {
			return err
		}
		buckets[string(name)] = b
	}
	domain, err := buckets[string(bucketTrustDomains)].CreateBucket([]byte(trustDomain))
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketAuthorities, bucketBundles, bucketHoldings, bucketTokens, bucketRevoked, bucketSettled} {
		if _, err := domain.CreateBucket(name); err != nil {
			return err
		}
	}
	if err := domain.Put(keyFloor, number(0)); err != nil {
		return err
	}
	genesis := genesisHash(incarnation, log)
	for _, entry := range []struct{ key, value []byte }{
		{keyLog, log[:]}, {keyIncarnation, incarnation[:]}, {keyTrustDomain, []byte(trustDomain)}, {keyHorizon, number(0)},
		{keyHead, encodeHead(Head{Hash: genesis})}, {keyAnchor, encodeAnchor(1, genesis)},
	} {
		if err := buckets[string(bucketMeta)].Put(entry.key, entry.value); err != nil {
			return err
		}
	}
	return nil
}

func encodeHead(h Head) []byte {
	return append(binary.BigEndian.AppendUint64(number(h.Number), uint64(h.Time)), h.Hash[:]...)
}

func encodeAnchor(first uint64, before Hash) []byte { return append(number(first), before[:]...) }

func encodeCommit(count int, hash Hash) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(count)), hash[:]...)
}

func decodeCommit(value []byte) (count uint64, hash Hash, err error) {
	if len(value) != 4+len(hash) {
		return 0, hash, damaged{fmt.Errorf("a commit's record has %d octets", len(value))}
	}
	copy(hash[:], value[4:])
	return uint64(binary.BigEndian.Uint32(value)), hash, nil
}

// openStore opens an existing file. An error says what is wrong with the file. What a process before this one wrote and did not live to make durable
// is made so before anything is built on it: bbolt would write over pages that are free by its word, and after a power cut they would
// be missing under the meta page that is on the disk.
func openStore(path string, readOnly bool) (db *bolt.DB, err error) {
	page, err := inspect(path)
	if err != nil {
		return nil, err
	}
	var file *os.File // lost when bbolt panics
	options := &bolt.Options{
		Timeout: lockTimeout, ReadOnly: readOnly, NoFreelistSync: true, FreelistType: bolt.FreelistMapType, InitialMmapSize: initialMap,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			file, err = os.OpenFile(name, flag&^os.O_CREATE, mode)
			return file, err
		},
	}
	if !readOnly && page.freelist == math.MaxUint64 {
		// bbolt will look for the free pages, in a goroutine where a damaged page would end the process.
		if err := walkFile(path); err != nil {
			return nil, err
		}
	}
	returned := false
	err = contain(func() (err error) {
		db, err = bolt.Open(path, 0o600, options)
		returned = true
		return err
	})
	switch {
	case !returned && file != nil:
		// The map that bbolt made stays, and would keep the lock.
		err = errors.Join(err, unix.Flock(int(file.Fd()), unix.LOCK_UN), file.Close())
	case errors.Is(err, bolterrors.ErrTimeout):
		err = fmt.Errorf("another process has it open (waited %v for its lock)", lockTimeout)
	}
	if err != nil {
		return nil, err
	}
	if !readOnly {
		if err := db.Sync(); err != nil {
			return nil, errors.Join(undurable{fmt.Errorf("making durable what is there: %w", err)}, db.Close())
		}
	}
	return db, nil
}

// walkFile reads every page of the file.
func walkFile(path string) error {
	db, err := openStore(path, true)
	if err != nil {
		return err
	}
	return errors.Join(contain(func() error { return db.View(walk) }), db.Close())
}

// walk visits every key, and so every page but the tails of long values.
func walk(tx *bolt.Tx) error {
	if err := checkPages(tx, math.MaxInt); err != nil {
		return err
	}
	var visit func(b *bolt.Bucket) error
	visit = func(b *bolt.Bucket) error {
		return b.ForEach(func(key, value []byte) error {
			if value == nil {
				return visit(b.Bucket(key))
			}
			return nil
		})
	}
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return visit(b) })
}

// metaPage is what bbolt's meta page says: the file has two, and the later valid one counts.
type metaPage struct {
	pageSize, pages, transaction, freelist uint64
	alone                                  bool // the other one is damaged
}

// inspect looks at a file before bbolt maps it into memory, where a page beyond its end would be a memory fault.
func inspect(path string) (page metaPage, err error) {
	f, err := os.Open(path)
	if err != nil {
		return page, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return page, err
	}
	start := make([]byte, 128<<10)
	n, err := f.ReadAt(start, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return page, err
	}
	start = start[:n]
	page, first := readMetaPage(start)
	second := false
	for offset := 1 << 10; offset <= len(start)/2 && !second; offset <<= 1 { // the second page is one page size further, whatever that is
		var p metaPage
		if p, second = readMetaPage(start[offset:]); second && p.pageSize != uint64(offset) {
			second = false
		}
		if second && (!first || p.transaction > page.transaction) {
			page = p
		}
	}
	if !first && !second {
		return page, damaged{errors.New("it is not a bbolt file, or both of its meta pages are damaged")}
	}
	page.alone = !first || !second
	if need := page.pages * page.pageSize; uint64(info.Size()) < need {
		return page, damaged{fmt.Errorf("it is cut short: it has %d octets, and its pages need %d", info.Size(), need)}
	}
	return page, nil
}

// readMetaPage reads a page that begins at b: a page header of 16 octets, then bbolt's meta structure in the machine's order.
func readMetaPage(b []byte) (page metaPage, ok bool) {
	const header, checked, magic, version = 16, 56, 0xED0CDAED, 2
	if len(b) < header+checked+8 {
		return page, false
	}
	b = b[header:]
	order := binary.NativeEndian
	sum := fnv.New64a()
	sum.Write(b[:checked])
	if order.Uint32(b) != magic || order.Uint32(b[4:]) != version || order.Uint64(b[checked:]) != sum.Sum64() {
		return page, false
	}
	return metaPage{
		pageSize: uint64(order.Uint32(b[8:])), freelist: order.Uint64(b[32:]), pages: order.Uint64(b[40:]), transaction: order.Uint64(b[48:]),
	}, true
}

// dropCache asks the kernel to forget what it has of a file, so that it is read from the disk again.
func dropCache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}

// state is what the ledger keeps in memory of its file.
type state struct {
	head    Head
	floor   uint64
	revoked map[string]struct{}
}

// loadState reads the state of a file and verifies its head: the last commits must hash to what the head says.
func loadState(tx *bolt.Tx, trustDomain string) (s state, err error) {
	if err := checkPages(tx, newestPages); err != nil {
		return s, err
	}
	meta := tx.Bucket(bucketMeta)
	if meta == nil || tx.Bucket(bucketEvents) == nil || tx.Bucket(bucketCommits) == nil || tx.Bucket(bucketTrustDomains) == nil {
		return s, damaged{errors.New("it is a bbolt file, but not a ledger: its buckets are missing")}
	}
	if have := string(meta.Get(keyTrustDomain)); have != trustDomain {
		return s, fmt.Errorf("it belongs to the trust domain %q, and this CA is configured for %q: "+
			"correct the configuration, or begin with an empty data folder", have, trustDomain)
	}
	domain := tx.Bucket(bucketTrustDomains).Bucket([]byte(trustDomain))
	for _, name := range [][]byte{bucketAuthorities, bucketBundles, bucketHoldings, bucketTokens, bucketRevoked, bucketSettled} {
		if domain == nil || domain.Bucket(name) == nil {
			return s, damaged{fmt.Errorf("its table %q is missing", name)}
		}
	}
	if s.head, err = readHead(tx); err != nil {
		return s, err
	}
	if err := verifyHead(tx, s.head); err != nil {
		return s, err
	}
	s.floor = toNumber(domain.Get(keyFloor))
	s.revoked = map[string]struct{}{}
	err = domain.Bucket(bucketRevoked).ForEach(func(serial, _ []byte) error {
		s.revoked[string(serial)] = struct{}{}
		return nil
	})
	return s, err
}

func readHead(tx *bolt.Tx) (h Head, err error) {
	meta := tx.Bucket(bucketMeta)
	head, anchor := meta.Get(keyHead), meta.Get(keyAnchor)
	log, incarnation := meta.Get(keyLog), meta.Get(keyIncarnation)
	if len(head) != 48 || len(anchor) != 40 || len(log) != len(h.Log) || len(incarnation) != len(h.Incarnation) {
		return h, damaged{errors.New("its head is damaged")}
	}
	h = Head{Number: toNumber(head[:8]), Time: Time(toNumber(head[8:16])), Hash: Hash(head[16:]), First: toNumber(anchor[:8])}
	copy(h.Log[:], log)
	copy(h.Incarnation[:], incarnation)
	if h.First == 0 || h.First > h.Number+1 {
		return h, damaged{fmt.Errorf("its head says that it holds the events %d to %d", h.First, h.Number)}
	}
	return h, nil
}

// verifyHead recomputes the chain over the last commits, at least one when there is one.
func verifyHead(tx *bolt.Tx, head Head) error {
	anchor := Hash(tx.Bucket(bucketMeta).Get(keyAnchor)[8:])
	events, commits := tx.Bucket(bucketEvents), tx.Bucket(bucketCommits).Cursor()
	if last, _ := events.Cursor().Last(); last != nil && toNumber(last) != head.Number {
		return damaged{fmt.Errorf("its last event is %d, and its head says %d", toNumber(last), head.Number)}
	}
	end, want := head.Number, head.Hash
	key, value := commits.Last()
	for read := uint64(0); read < headEvents && end >= head.First; {
		if key == nil {
			return damaged{fmt.Errorf("the commit with event %d is missing", end)}
		}
		first := toNumber(key)
		count, hash, err := decodeCommit(value)
		if err != nil {
			return err
		}
		if count == 0 || first+count-1 != end || first < head.First {
			return damaged{fmt.Errorf("the commit with event %d says that it holds %d from %d on", end, count, first)}
		}
		key, value = commits.Prev()
		previous := anchor
		if key != nil {
			if _, previous, err = decodeCommit(value); err != nil {
				return err
			}
		}
		raws := make([][]byte, 0, count)
		for n := first; n <= end; n++ {
			raws = append(raws, events.Get(number(n)))
		}
		if hash != want || commitHash(previous, raws) != want {
			return damaged{fmt.Errorf("the commit of the events %d to %d does not match the hash chain", first, end)}
		}
		end, want, read = first-1, previous, read+count
	}
	if end < head.First && want != anchor {
		return damaged{fmt.Errorf("event %d does not follow on the hash that stands before it", head.First)}
	}
	return nil
}
