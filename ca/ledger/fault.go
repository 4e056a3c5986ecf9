package ledger

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// How long the writer waits between tries to heal: doubling from the first to the last.
const (
	healFirst = 100 * time.Millisecond
	healLast  = 2 * time.Second
)

// healRoom is how much room there must be on a disk that was full before the ledger is written again: more than the largest commit needs. With
// less, small commits would succeed and the next large one fail, back and forth.
const healRoom = 2 * maxCommitBytes

// fault is why nothing is written at present. After a commit that failed it is open what of it reached the disk, so that nothing in
// memory, and nothing in the kernel's cache, is believed until the file was opened anew and verified.
type fault struct {
	err  error // wraps ErrUnavailable and the cause
	full bool  // plainly a lack of space: the file itself is beyond suspicion
}

// Fault returns why nothing can be recorded at present, and nil when all is well. The error wraps ErrUnavailable.
func (l *Ledger) Fault() error {
	if f := l.fault.Load(); f != nil {
		return f.err
	}
	return nil
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		strings.Contains(err.Error(), syscall.ENOSPC.Error()) || strings.Contains(err.Error(), syscall.EDQUOT.Error()) // bbolt does not always wrap
}

func (l *Ledger) newFault(cause error) *fault {
	if isFull(cause) {
		return &fault{full: true, err: fmt.Errorf("%w: the disk is full (writing %s: %w): free some space on its file system, %d MiB or more; writing then resumes by itself",
			ErrUnavailable, l.path, cause, healRoom>>20)}
	}
	return &fault{err: fmt.Errorf("%w: writing %s failed: %w; reading goes on, and writing resumes by itself once the file can be written and is verified",
		ErrUnavailable, l.path, cause)}
}

// fail begins a fault, with the error of a commit. It gives the handle up, and opens the file anew so that reading goes on.
func (l *Ledger) fail(cause error) error {
	f := l.newFault(cause)
	l.gate.Lock() // no draft slips into the queue any more
	l.fault.Store(f)
	l.gate.Unlock()
	l.o.Logger.Error("the ledger is faulted: nothing is issued until it can be written again", "error", f.err)
	if err := l.reopen(); err != nil {
		l.o.Logger.Error("the ledger cannot be opened anew yet", "file", l.path, "error", err)
	}
	return f.err
}

// heal tries until the file is sound and can be written, is found to be damaged, or the ledger is closed. The writer does it, so
// that nothing else writes meanwhile.
func (l *Ledger) heal() {
	noted := ""
	for wait := healFirst; ; wait = min(2*wait, healLast) {
		l.drain()
		timer := time.NewTimer(wait)
		select {
		case <-l.closing:
			timer.Stop()
			return
		case <-timer.C:
		}
		err := contain(l.recover)
		if err == nil {
			l.fault.Store(nil)
			l.o.Logger.Info("the ledger is verified and can be written again", "file", l.path, "number", l.Head().Number)
			return
		}
		if isDamaged(err) {
			// What was just read from the disk does not get better by reading it again: that takes an admin, and a restart.
			l.fault.Store(&fault{err: fmt.Errorf("%w: %w", ErrUnavailable, damage(l.path, err))})
			l.o.Logger.Error("the ledger stays faulted", "error", l.Fault())
			l.drain()
			<-l.closing
			return
		}
		if text := err.Error(); text != noted { // each step once, not each try
			noted = text
			l.o.Logger.Warn("the ledger is still faulted", "error", err)
		}
	}
}

// drain answers what was queued before the fault.
func (l *Ledger) drain() {
	for {
		select {
		case d, open := <-l.queue:
			if !open {
				return
			}
			l.refuse(d, l.Fault())
		default:
			return
		}
	}
}

// reopen gives the handle up and opens the file anew: for writing, or else at least for reading.
func (l *Ledger) reopen() error {
	l.handle.Lock()
	defer l.handle.Unlock()
	var closeErr error
	if l.db != nil {
		closeErr = contain(l.db.Close)
		l.db = nil
	}
	cacheErr := dropCache(l.path)
	var err error
	if l.db, err = openStore(l.path, false); err == nil {
		return errors.Join(closeErr, cacheErr)
	}
	var readErr error
	l.db, readErr = openStore(l.path, true)
	return errors.Join(err, readErr, closeErr, cacheErr)
}

// recover is one try to heal.
func (l *Ledger) recover() error {
	was := l.fault.Load()
	if was.full {
		if err := room(l.dir, healRoom); err != nil {
			return err
		}
	}
	if err := l.reopen(); err != nil {
		return fmt.Errorf("opening %s anew: %w", l.path, err)
	}
	var s state
	err := l.view(func(tx *bolt.Tx) (err error) {
		if s, err = loadState(tx, l.o.TrustDomain); err != nil {
			return err
		}
		if err := l.continues(tx, s.head); err != nil || was.full {
			return err
		}
		return sound(tx)
	})
	if err != nil {
		return err
	}
	if err := l.probe(); err != nil {
		f := l.newFault(err)
		f.full = f.full && was.full
		l.fault.Store(f)
		return errors.Join(err, l.reopen())
	}
	// Only now is it certain that what was read is on the disk.
	l.mu.Lock()
	before := l.head
	l.head, l.floor, l.revoked = s.head, s.floor, s.revoked
	l.mu.Unlock()
	if s.head.Number > before.Number {
		l.o.Logger.Warn("a commit that failed had reached the disk after all: its events are kept",
			"first", before.Number+1, "last", s.head.Number)
	}
	return nil
}

// room makes sure that size octets can be written to dir, by reserving them for a file that has no name: that asks quotas too.
func room(dir string, size int64) error {
	f, err := nameless(filepath.Join(dir, "room"+temporarySuffix))
	if err != nil {
		return fmt.Errorf("looking whether there is room on the disk again: %w", err)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) { // some network file systems: a write will show
		err = nil
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("there are no %d MiB of room in %s yet: %w", size>>20, dir, err)
	}
	return nil
}

// probe is a durable write outside the queue.
func (l *Ledger) probe() error {
	tx, err := l.db.Begin(true)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after a commit it has nothing to do, and says so
	if _, err := l.newBatch(tx).append(&draft{probe: true}); err != nil {
		return err
	}
	return l.commitTx(tx)
}

// continues makes sure that the file has everything that was ever acknowledged: the chain on disk goes through the head in memory.
func (l *Ledger) continues(tx *bolt.Tx, disk Head) error {
	known := l.Head()
	if disk.Log != known.Log || disk.Incarnation != known.Incarnation {
		return damaged{errors.New("it is another ledger than before the fault")}
	}
	if disk.Number < known.Number {
		return damaged{fmt.Errorf("the events %d to %d, which were durable once, are lost", disk.Number+1, known.Number)}
	}
	hash := disk.Hash
	if disk.Number > known.Number {
		value := tx.Bucket(bucketCommits).Get(number(known.Number + 1))
		if value == nil {
			return damaged{fmt.Errorf("no commit begins after event %d, which ended one", known.Number)}
		}
		count, last, err := decodeCommit(value)
		if err != nil {
			return err
		}
		raws := make([][]byte, 0, count)
		for n := known.Number + 1; n <= known.Number+count; n++ {
			raws = append(raws, tx.Bucket(bucketEvents).Get(number(n)))
		}
		if commitHash(known.Hash, raws) == last {
			hash = known.Hash
		}
	}
	if hash != known.Hash {
		return damaged{fmt.Errorf("its hash chain does not go through event %d as it was before the fault", known.Number)}
	}
	return nil
}

// sound looks at every page. bbolt's own check would end the process at a page that is no page; so all are visited first.
func sound(tx *bolt.Tx) error {
	if err := walk(tx); err != nil {
		return err
	}
	var first error
	for err := range tx.Check() {
		if first == nil {
			first = damaged{fmt.Errorf("the file's structure is damaged: %w", err)}
		}
	}
	return first
}
