package ledger

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
)

// When a commit takes no further draft, and how large a draft may be.
const (
	maxCommit      = 4096 // events
	maxCommitBytes = 4 << 20
	maxDraft       = 256 // events
	maxDraftBytes  = 2 * maxEvent
)

// slowCommit is how long a commit may take before an error of something that waits for it says so.
const slowCommit = time.Second

// draft is what somebody waits for: events to be recorded, a probe, or a step of maintenance, which has a commit of its own.
type draft struct {
	bodies  []Body
	encoded [][]byte
	probe   bool
	step    func(*batch) error

	claim atomic.Bool   // by the writer, to take it into a commit, or by the caller, to withdraw it: the first wins
	done  chan struct{} // closed when first and err are set
	first uint64
	err   error
}

func (d *draft) answer(err error) {
	d.err = err
	close(d.done)
}

// submit queues a draft and waits for its outcome.
func (l *Ledger) submit(ctx context.Context, d *draft) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := l.enqueue(d); err != nil {
		return err
	}
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
	}
	if d.claim.CompareAndSwap(false, true) {
		return fmt.Errorf("%swaiting for its turn: %w", l.stalled(), ctx.Err())
	}
	// It is in a commit, which a disk that hangs may hold up for ever. The caller is not held up with it.
	select {
	case <-d.done:
		return d.err
	default:
		return fmt.Errorf("%w: %sit may turn out to be recorded: %w", ErrUnavailable, l.stalled(), ctx.Err())
	}
}

// stalled tells, at the beginning of an error, of a commit that takes unusually long.
func (l *Ledger) stalled() string {
	if since := l.committing.Load(); since != nil {
		if took := time.Since(*since); took > slowCommit {
			return fmt.Sprintf("a commit to %s has been under way for %s: the disk is slow or hangs; ", l.path, took.Round(time.Second))
		}
	}
	return ""
}

func (l *Ledger) enqueue(d *draft) error {
	l.gate.RLock()
	defer l.gate.RUnlock()
	if l.closed {
		return ErrClosed
	}
	if err := l.Fault(); err != nil {
		return err
	}
	select {
	case l.queue <- d:
		return nil
	default:
		return fmt.Errorf("%w (%d)", ErrBusy, cap(l.queue))
	}
}

// gather is how long the disk rests after a commit. A commit costs some ten times what one more event in it does: so under load many share one, and
// who comes alone does not wait.
const gather = 5 * time.Millisecond

// write is the goroutine that writes.
func (l *Ledger) write() {
	defer close(l.done)
	if l.Fault() != nil {
		l.heal()
	}
	var ended time.Time
	for d := range l.queue {
		if l.isClosing() {
			l.refuse(d, ErrClosed)
			continue
		}
		l.wait(gather - time.Since(ended))
		drafts, step := l.collect(d)
		if len(drafts) > 0 && !l.commit(drafts) {
			if step != nil {
				step.answer(l.Fault())
			}
			l.heal()
			continue
		}
		if step != nil && !l.commit([]*draft{step}) {
			l.heal()
		}
		ended = time.Now()
	}
}

// wait lets time pass, unless the ledger is closed.
func (l *Ledger) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.closing:
	}
}

func (l *Ledger) isClosing() bool {
	select {
	case <-l.closing:
		return true
	default:
		return false
	}
}

func (l *Ledger) refuse(d *draft, err error) {
	if d.claim.CompareAndSwap(false, true) {
		d.answer(err)
	}
}

// collect takes what waits, up to a full commit, or to a step, which comes after it.
func (l *Ledger) collect(d *draft) (drafts []*draft, step *draft) {
	events, size := 0, 0
	for {
		if d.claim.CompareAndSwap(false, true) {
			if d.step != nil {
				return drafts, d
			}
			drafts = append(drafts, d)
			events += len(d.bodies)
			for _, encoded := range d.encoded {
				size += len(encoded)
			}
		}
		if len(drafts) == l.o.MaxBatch || events >= maxCommit || size >= maxCommitBytes {
			return drafts, nil
		}
		select {
		case next, open := <-l.queue:
			if !open {
				return drafts, nil
			}
			d = next
		default:
			return drafts, nil
		}
	}
}

// commit makes one commit of the drafts and answers them. It returns false when the file failed: then the ledger is faulted.
func (l *Ledger) commit(drafts []*draft) bool {
	start := time.Now()
	l.committing.Store(&start)
	defer l.committing.Store(nil)
	errs := make([]error, len(drafts))
	var b *batch
	err := contain(func() (err error) {
		b, err = l.transact(drafts, errs)
		return err
	})
	if err != nil {
		failure := l.fail(err)
		l.o.OnCommit(Commit{Duration: time.Since(start), Err: failure})
		for _, d := range drafts { // also those that were refused: perhaps for what did not come about
			d.answer(failure)
		}
		return false
	}
	if b.writes > 0 {
		l.adopt(b)
		l.o.OnCommit(Commit{Events: len(b.raws), Bytes: b.size, Duration: time.Since(start)})
	}
	for i, d := range drafts {
		d.answer(errs[i])
	}
	for _, s := range b.superseded {
		l.o.Logger.Warn("a spent join token was redeemed again: the certificate that it got before is superseded",
			"token", s.token, "spiffe_id", s.spiffeID, "event", s.number, "superseded", s.replaces)
	}
	return true
}

// transact writes the drafts that are not refused in one transaction. errs gets the refusals; the error is the file's.
func (l *Ledger) transact(drafts []*draft, errs []error) (*batch, error) {
	for {
		b, again, err := l.attempt(drafts, errs)
		if !again {
			return b, err
		}
	}
}

// attempt is one transaction. It is to be made again when a draft was refused after a part of it was written.
func (l *Ledger) attempt(drafts []*draft, errs []error) (b *batch, again bool, err error) {
	tx, err := l.db.Begin(true) // only this goroutine swaps l.db
	if err != nil {
		return nil, false, err
	}
	defer tx.Rollback() // after a commit it has nothing to do, and says so
	b = l.newBatch(tx)
	for i, d := range drafts {
		if errs[i] != nil {
			continue
		}
		before := b.writes
		if d.step != nil {
			err = d.step(b)
		} else {
			d.first, err = b.append(d)
		}
		if err == nil {
			continue
		}
		if !refused(err) {
			return nil, false, err
		}
		if isDamaged(err) {
			err = fmt.Errorf("%w: %w; run 'kedge ledger verify'", ErrUnavailable, err)
		}
		errs[i] = err
		if b.writes > before {
			return nil, true, nil
		}
	}
	if b.writes == 0 {
		return b, false, nil
	}
	if err := b.seal(); err != nil {
		return nil, false, err
	}
	return b, false, l.commitTx(tx)
}

func (l *Ledger) commitTx(tx *bolt.Tx) error {
	l.db.NoFreelistSync = l.db.Stats().FreePageN > syncedFree
	return tx.Commit()
}

// adopt lets memory follow a commit.
func (l *Ledger) adopt(b *batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.head = b.head
	if b.floor != 0 {
		l.floor = b.floor
	}
	for _, serial := range b.revoked {
		l.revoked[string(serial)] = struct{}{}
	}
	for _, serial := range b.forgotten {
		delete(l.revoked, string(serial))
	}
}
