package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Options of a ledger. Only TrustDomain has no default.
type Options struct {
	TrustDomain    string           // whose ledger it is. A folder belongs to the one it was made for
	ProgramVersion string           // stated in format.json, and named in errors about the format; default "unknown"
	Now            func() time.Time // wall clock; default time.Now
	Retention      time.Duration    // how long an event stays after it last mattered: an Issue after its notAfter, others after their time. Default 30 days
	ArchiveDir     string           // folder that gets what is pruned, before it is pruned; "": pruned events are gone
	Logger         *slog.Logger     // default: nothing is logged
	OnCommit       func(Commit)     // called after every commit, by the goroutine that writes: it must be quick. Default: none
	MaxBatch       int              // drafts (calls of Append) in one commit; default 512
	MaxQueue       int              // drafts that may wait; beyond that Append is refused with ErrBusy. Default 16384
}

// Commit is what OnCommit is told.
type Commit struct {
	Events   int           // recorded by it; 0: a probe, or a step of Prune
	Bytes    int           // of these events, as stored
	Duration time.Duration // from the start of the transaction until it was durable
	Err      error         // nil: it is durable
}

// Head is where the log stands.
type Head struct {
	Log         LogID  `json:"log"`
	Incarnation Hash   `json:"incarnation"` // of the store: 32 random octets made with it
	Number      uint64 `json:"number"`      // of the last event; 0: there was none yet
	First       uint64 `json:"first"`       // number of the first event that is kept; Number+1 when there is none
	Hash        Hash   `json:"hash"`        // of the last commit, and with it of everything before
	Time        Time   `json:"time"`        // of the last event
}

// Ledger is an open ledger. Its methods may be called at once from several goroutines. One goroutine of its own writes; it ends with Close.
type Ledger struct {
	o    Options
	dir  string
	path string

	// gate orders appending, and what ends it: with gate held for writing, no draft is on its way into the queue.
	gate    sync.RWMutex
	queue   chan *draft
	closing chan struct{} // closed by Close
	closed  bool
	fault   atomic.Pointer[fault]
	done    chan struct{} // closed when the writer has ended

	committing atomic.Pointer[time.Time] // since when a commit is under way; nil: none is

	// handle guards db against being swapped or closed under a reader. Transactions are short.
	handle sync.RWMutex
	db     *bolt.DB // nil: closed, or lost to a fault that not even reading survived

	mu      sync.RWMutex // of what memory has of the file
	head    Head
	floor   uint64
	revoked map[string]struct{}

	maintenance chan struct{} // held by Prune and Verify: the front of the log does not move under them
	copying     chan struct{} // held by Snapshot
}

// Open opens the ledger in the data folder dir, which exists and is locked by the caller (see Lock), and makes it when the folder
// is new. It verifies the newest part of the hash chain, and nothing that would take longer with a longer log. A file that is damaged
// is never repaired: the error says what is wrong with it.
func Open(dir string, o Options) (*Ledger, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	if err := CheckFormat(dir, o.ProgramVersion); err != nil {
		return nil, err
	}
	l := &Ledger{
		o: o, dir: dir, path: filepath.Join(dir, storeFile), queue: make(chan *draft, o.MaxQueue), closing: make(chan struct{}),
		done: make(chan struct{}), maintenance: make(chan struct{}, 1), copying: make(chan struct{}, 1),
	}
	if err := l.create(); err != nil {
		return nil, err
	}
	page, err := inspect(l.path)
	if err == nil {
		l.db, err = openStore(l.path, false)
	}
	if open := (undurable{}); errors.As(err, &open) { // a failing disk, on which the ledger can be read and waits for better times
		l.fault.Store(l.newFault(err))
		o.Logger.Error("the ledger is faulted from the start: nothing is issued until it can be written", "error", l.Fault())
		l.db, err = openStore(l.path, true)
	}
	if err != nil {
		return nil, damage(l.path, err)
	}
	if page.alone {
		o.Logger.Warn("one of the two meta pages of the ledger is damaged: a write was cut short, or the disk is failing. "+
			"If it was the later one, the last commit is lost: compare the number with what was seen last", "file", l.path)
	}
	var s state
	err = l.view(func(tx *bolt.Tx) error {
		s, err = loadState(tx, o.TrustDomain)
		return err
	})
	if err != nil {
		return nil, errors.Join(damage(l.path, err), l.db.Close())
	}
	l.head, l.floor, l.revoked = s.head, s.floor, s.revoked
	go l.write()
	return l, nil
}

// create makes the file, and then format.json, in a folder that has neither.
func (l *Ledger) create() error {
	_, err := os.Stat(l.path)
	_, formatErr := os.Stat(filepath.Join(l.dir, formatFile))
	switch {
	case err == nil && formatErr == nil:
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("opening the ledger: %w", err)
	case formatErr != nil && !errors.Is(formatErr, fs.ErrNotExist):
		return fmt.Errorf("opening the ledger: %w", formatErr)
	case err != nil && formatErr == nil:
		return fmt.Errorf("the data folder %s was in use, and its ledger is gone: %w; make a new folder from a backup with 'kedge restore', or begin with an empty one",
			l.dir, err)
	case err != nil:
		if err := createStore(l.path, l.o.TrustDomain); err != nil {
			return fmt.Errorf("making the ledger %s: %w", l.path, err)
		}
	default: // a first start was killed here: the ledger's name may not be on the disk yet, and must be before the folder counts as one that was in use
		if err := syncDir(l.dir); err != nil {
			return fmt.Errorf("making durable what a killed start left in %s: %w", l.dir, err)
		}
	}
	return writeFormat(l.dir, l.o.ProgramVersion)
}

// damage tells what to do about a file that cannot be opened.
func damage(path string, err error) error {
	if isDamaged(err) {
		return fmt.Errorf("the ledger %s is damaged: %w; it is not repaired by itself: stop here, keep the file, and make a new data folder from a backup with 'kedge restore'",
			path, err)
	}
	return fmt.Errorf("opening the ledger %s: %w", path, err)
}

func (o *Options) complete() error {
	if o.TrustDomain == "" {
		return errors.New("opening the ledger: no trust domain is given")
	}
	if o.Retention < 0 || o.MaxBatch < 0 || o.MaxQueue < 0 {
		return fmt.Errorf("opening the ledger: retention %v, batch %d and queue %d must not be negative", o.Retention, o.MaxBatch, o.MaxQueue)
	}
	if o.ProgramVersion == "" {
		o.ProgramVersion = "unknown"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Retention == 0 {
		o.Retention = 30 * 24 * time.Hour
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnCommit == nil {
		o.OnCommit = func(Commit) {}
	}
	if o.MaxBatch == 0 {
		o.MaxBatch = 512
	}
	if o.MaxQueue == 0 {
		o.MaxQueue = 16384
	}
	return nil
}

// view runs fn in a read transaction. The file may be another one at the next call, after a fault.
func (l *Ledger) view(fn func(*bolt.Tx) error) error {
	l.handle.RLock()
	defer l.handle.RUnlock()
	if l.db == nil {
		if err := l.Fault(); err != nil {
			return fmt.Errorf("reading the ledger: %w", err)
		}
		return fmt.Errorf("reading the ledger: %w", ErrClosed)
	}
	return contain(func() error { return l.db.View(fn) })
}

// Head returns where the log stands: everything up to there is durable.
func (l *Ledger) Head() Head {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.head
}

// Append records events: all of them, next to each other in one commit, or none. It returns the number of the first once they are
// durable, and does not change them: what the ledger fills in is in the stored event only.
//
// A refusal wraps ErrNotActive, ErrBelowFloor, ErrNotFound, ErrTokenUnknown, ErrTokenExpired, ErrTokenSpent, ErrRevoked, ErrSuperseded, ErrAlready or
// ErrConflict, and takes no number. ErrBusy and ErrClosed mean that nothing was recorded; so does the error of ctx without ErrUnavailable: ctx ended before a commit
// took the events. After ErrUnavailable they may turn out to be recorded, as when a connection breaks: a failed fsync leaves that open, and
// so does a ctx that ends before the commit does.
func (l *Ledger) Append(ctx context.Context, events ...Body) (first uint64, err error) {
	if len(events) == 0 {
		return 0, errors.New("appending to the ledger: there is no event")
	}
	if len(events) > maxDraft {
		return 0, fmt.Errorf("appending to the ledger: %d events at once are more than %d", len(events), maxDraft)
	}
	d := &draft{bodies: events, encoded: make([][]byte, len(events)), done: make(chan struct{})}
	size := 0
	for i, event := range events {
		if _, ok := event.(*Restore); ok {
			return 0, errors.New("appending to the ledger: a restore event is not appended: see Ledger.Restore")
		}
		if d.encoded[i], err = encodeBody(event); err != nil {
			return 0, fmt.Errorf("appending to the ledger: %w", err)
		}
		if size += len(d.encoded[i]); size > maxDraftBytes {
			return 0, fmt.Errorf("appending to the ledger: %d events at once have more than %d octets", len(events), maxDraftBytes)
		}
	}
	if err := l.submit(ctx, d); err != nil {
		return 0, fmt.Errorf("appending to the ledger: %w", err)
	}
	return d.first, nil
}

// Probe makes a durable write through the queue that appends use, and appends nothing.
func (l *Ledger) Probe(ctx context.Context) error {
	if err := l.submit(ctx, &draft{probe: true, done: make(chan struct{})}); err != nil {
		return fmt.Errorf("probing the ledger: %w", err)
	}
	return nil
}

// Close finishes the commit under way, refuses what waits with ErrClosed, and closes the file. It may be called again.
func (l *Ledger) Close() error {
	l.gate.Lock()
	if !l.closed {
		l.closed = true
		close(l.closing)
		close(l.queue)
	}
	l.gate.Unlock()
	<-l.done
	l.handle.Lock()
	defer l.handle.Unlock()
	if l.db == nil {
		return nil
	}
	err := l.db.Close()
	l.db = nil
	if err != nil {
		return fmt.Errorf("closing the ledger %s: %w", l.path, err)
	}
	return nil
}
