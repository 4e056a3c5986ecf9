package ledger

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Prune works in pieces, so that appends wait for none of them long.
const (
	pruneEvents   = 2000 // in one transaction, or one commit if that has more
	pruneRows     = 2000 // of tables, in one transaction
	archiveEvents = 50000
	archiveBytes  = 64 << 20
)

// PruneReport says what Prune dropped.
type PruneReport struct {
	Events   uint64   `json:"events"`
	Commits  uint64   `json:"commits"`
	First    uint64   `json:"first"`              // number of the first event that is left
	Rows     uint64   `json:"rows"`               // of tables: holdings, marks, join tokens, revocations
	Archives []string `json:"archives,omitempty"` // files that have what was dropped
}

// commitSpan is one commit at the front of the log.
type commitSpan struct {
	first uint64
	count uint64
	bytes int
	hash  Hash  // after it
	log   LogID // of its events
}

// Prune drops whole commits from the front of the log, while every event in them is past its relevance by the retention time:
// an Issue matters until the end of the hour of its notAfter, a Token until it expires, a Revoke until the notAfter that it
// names, everything else at its own time. What the tables still need stays in them. An event of a type that this version does
// not know is never dropped, nor what follows it. With an archive folder, everything is in a durable file there first.
// It also drops what is past in the tables: holdings of past hours, expired tokens, revocations of expired certificates.
//
// now is the guarded clock (I8). When it is earlier than at the last time that something was dropped, nothing is.
// An error leaves a sound ledger; the next call goes on from there.
func (l *Ledger) Prune(ctx context.Context, now time.Time) (report PruneReport, err error) {
	if err := l.holdFront(ctx); err != nil {
		return report, fmt.Errorf("pruning the ledger: %w", err)
	}
	defer l.releaseFront()
	until := At(now)
	var horizon Time
	err = l.view(func(tx *bolt.Tx) error {
		horizon = Time(toNumber(tx.Bucket(bucketMeta).Get(keyHorizon)))
		return nil
	})
	if err == nil && until >= horizon {
		if err = l.pruneEvents(ctx, until, &report); err == nil {
			err = l.pruneTables(ctx, until, &report)
		}
	}
	report.First = l.Head().First
	if err != nil {
		return report, fmt.Errorf("pruning the ledger: %w", err)
	}
	return report, nil
}

// relevant returns until when an event matters, apart from the retention time. ok is false for ever.
func relevant(e Event) (until Time, ok bool) {
	switch b := e.Body.(type) {
	case *Issue:
		return max(e.Time, holdingOf(b, 0).end()), true
	case *Token:
		return max(e.Time, b.Expires), true
	case *Revoke:
		return max(e.Time, b.NotAfter), true
	case *Unknown:
		return 0, false
	}
	return e.Time, true
}

func (l *Ledger) pruneEvents(ctx context.Context, until Time, report *PruneReport) error {
	for {
		before, spans, err := l.droppable(ctx, until)
		if err != nil || len(spans) == 0 {
			return err
		}
		if l.o.ArchiveDir != "" {
			path, last, err := l.archive(ctx, before, spans)
			if err != nil {
				return fmt.Errorf("archiving the events from %d on to %s (nothing of it was dropped): %w", spans[0].first, l.o.ArchiveDir, err)
			}
			report.Archives = append(report.Archives, path)
			for len(spans) > 0 && spans[len(spans)-1].first > last {
				spans = spans[:len(spans)-1]
			}
		}
		for len(spans) > 0 {
			n, events := 1, spans[0].count
			for n < len(spans) && events+spans[n].count <= pruneEvents {
				events += spans[n].count
				n++
			}
			step := &draft{done: make(chan struct{}), step: func(b *batch) error { return b.drop(spans[:n], until) }}
			if err := l.submit(ctx, step); err != nil {
				return err
			}
			report.Events += events
			report.Commits += uint64(n)
			spans = spans[n:]
		}
	}
}

// droppable finds the commits of one log at the front that may go, up to an archive file's worth, and the chain hash before them.
func (l *Ledger) droppable(ctx context.Context, until Time) (before Hash, spans []commitSpan, err error) {
	var events uint64
	var size int
	next := uint64(0)
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return before, nil, err
		}
		err := l.view(func(tx *bolt.Tx) error {
			head, err := readHead(tx)
			if err != nil {
				return err
			}
			if next == 0 {
				next, before = head.First, Hash(tx.Bucket(bucketMeta).Get(keyAnchor)[8:])
			}
			commits := tx.Bucket(bucketCommits).Cursor()
			read := uint64(0)
			for key, value := commits.Seek(number(next)); more && read < chunkRecords; key, value = commits.Next() {
				if key == nil {
					more = false
					return nil
				}
				span := commitSpan{first: toNumber(key)}
				if span.count, span.hash, err = decodeCommit(value); err != nil {
					return err
				}
				if span.first != next || span.count == 0 {
					return damaged{fmt.Errorf("a commit is missing at event %d; run 'kedge ledger verify'", next)}
				}
				past, err := l.past(tx, &span, until)
				if err != nil {
					return err
				}
				more = past && events < archiveEvents && size < archiveBytes && (len(spans) == 0 || span.log == spans[0].log)
				if more {
					spans = append(spans, span)
					events, size, next, read = events+span.count, size+span.bytes, next+span.count, read+span.count
				}
			}
			return nil
		})
		if err != nil {
			return before, nil, err
		}
	}
	return before, spans, nil
}

// past says whether every event of a commit is past its retention.
func (l *Ledger) past(tx *bolt.Tx, span *commitSpan, until Time) (bool, error) {
	events := tx.Bucket(bucketEvents)
	for n := span.first; n < span.first+span.count; n++ {
		raw := events.Get(number(n))
		e, err := decodeStored(n, raw)
		if err != nil {
			return false, err
		}
		end, ok := relevant(e)
		if !ok || end > until-Time(l.o.Retention/time.Second) {
			return false, nil
		}
		span.bytes += len(raw)
		span.log = e.Log
	}
	return true, nil
}

// drop is a step of the writer: it removes commits from the front.
func (b *batch) drop(spans []commitSpan, until Time) error {
	if spans[0].first != b.head.First {
		return fmt.Errorf("the log begins with event %d, and not with %d: %w", b.head.First, spans[0].first, ErrConflict)
	}
	events, commits := b.tx.Bucket(bucketEvents), b.tx.Bucket(bucketCommits)
	for _, span := range spans {
		for n := span.first; n < span.first+span.count; n++ {
			if err := b.remove(events, number(n)); err != nil {
				return err
			}
		}
		if err := b.remove(commits, number(span.first)); err != nil {
			return err
		}
		b.head.First = span.first + span.count
	}
	if err := b.put(b.tx.Bucket(bucketMeta), keyAnchor, encodeAnchor(b.head.First, spans[len(spans)-1].hash)); err != nil {
		return err
	}
	return b.raiseHorizon(until)
}

func (b *batch) remove(bucket *bolt.Bucket, key []byte) error {
	b.writes++
	if err := bucket.Delete(key); err != nil {
		return storeError{err}
	}
	return nil
}

func (b *batch) raiseHorizon(until Time) error {
	return b.put(b.tx.Bucket(bucketMeta), keyHorizon, number(uint64(until)))
}

// pruneTables drops the rows that are past.
func (l *Ledger) pruneTables(ctx context.Context, until Time, report *PruneReport) error {
	first := l.Head().First
	for _, table := range []struct {
		name []byte
		past func(key, value []byte) (past, more bool, err error)
	}{
		{bucketHoldings, func(key, value []byte) (bool, bool, error) {
			k, _, err := decodeHolding(key, value)
			return k.end() <= until, true, err
		}},
		{bucketTokens, func(_, value []byte) (bool, bool, error) {
			row, err := decodeRow[tokenRow](bucketTokens, value)
			return row.Token.Expires <= until, true, err
		}},
		{bucketRevoked, func(_, value []byte) (bool, bool, error) {
			return Time(toNumber(value)) <= until, true, nil
		}},
		{bucketSettled, func(key, _ []byte) (bool, bool, error) {
			past := toNumber(key) < first
			return past, past, nil
		}},
	} {
		for {
			if err := ctx.Err(); err != nil {
				return err
			}
			keys, err := l.pastRows(table.name, table.past)
			if err != nil {
				return err
			}
			if len(keys) == 0 {
				break
			}
			step := &draft{done: make(chan struct{}), step: func(b *batch) error { return b.dropRows(table.name, keys, until) }}
			if err := l.submit(ctx, step); err != nil {
				return err
			}
			report.Rows += uint64(len(keys))
		}
	}
	return nil
}

// pastRows finds up to one transaction's worth of rows to drop.
func (l *Ledger) pastRows(table []byte, past func(key, value []byte) (past, more bool, err error)) (keys [][]byte, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		cursor := l.table(tx, table).Cursor()
		for key, value := cursor.First(); key != nil && len(keys) < pruneRows; key, value = cursor.Next() {
			drop, more, err := past(key, value)
			if err != nil || !more {
				return err
			}
			if drop {
				keys = append(keys, bytes.Clone(key))
			}
		}
		return nil
	})
	return keys, err
}

// dropRows is a step of the writer.
func (b *batch) dropRows(name []byte, keys [][]byte, until Time) error {
	table := b.table(name)
	for _, key := range keys {
		if err := b.remove(table, key); err != nil {
			return err
		}
	}
	if bytes.Equal(name, bucketRevoked) {
		b.forgotten = keys
	}
	return b.raiseHorizon(until)
}

// archive makes sure that the commits are in a durable file, and returns it with the number of the last event that it holds. A file
// that a Prune before a crash had completed is verified and used as it is.
func (l *Ledger) archive(ctx context.Context, before Hash, spans []commitSpan) (path string, last uint64, err error) {
	log, end := spans[0].log, spans[len(spans)-1]
	path, ok, err := archived(l.o.ArchiveDir, log, spans[0].first)
	if err != nil {
		return "", 0, err
	}
	if !ok {
		last = end.first + end.count - 1
		path = filepath.Join(l.o.ArchiveDir, archiveName(log, spans[0].first, last))
		header := archiveHeader{Log: log, TrustDomain: l.o.TrustDomain, First: spans[0].first, Last: last, Before: before}
		if header.Incarnation, err = l.incarnation(log); err != nil {
			return "", 0, err
		}
		err = writeFile(path, func(w io.Writer) error { return l.writeArchive(ctx, w, header, spans) })
		return path, last, err
	}
	matched := 0
	for commit, err := range ReadArchive(path) {
		if err == nil && matched < len(spans) && commit.First == spans[matched].first {
			if commit.Hash != spans[matched].hash {
				err = fmt.Errorf("%s has another commit at event %d than the ledger", path, commit.First)
			}
			last = commit.First + uint64(len(commit.Raw)) - 1
			matched++
		}
		if err != nil {
			return "", 0, fmt.Errorf("what an earlier run left there does not serve: %w; move that file away", err)
		}
	}
	if matched == 0 {
		return "", 0, fmt.Errorf("%s has no commit that begins at event %d; move that file away", path, spans[0].first)
	}
	// The run that made the file may have ended before its name was durable.
	return path, last, syncDir(l.o.ArchiveDir)
}

// incarnation is that of the store when a log of this file was written.
func (l *Ledger) incarnation(log LogID) (incarnation Hash, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		head, err := readHead(tx)
		if err != nil || head.Log == log {
			incarnation = head.Incarnation
			return err
		}
		ended, err := restoreOf(tx, func(r *Restore) bool { return r.Log == log })
		if err == nil && ended == nil {
			err = damaged{fmt.Errorf("the log %s ends without a restore; run 'kedge ledger verify'", log)}
		}
		if err == nil {
			incarnation = ended.Incarnation
		}
		return err
	})
	return incarnation, err
}

func (l *Ledger) writeArchive(ctx context.Context, w io.Writer, header archiveHeader, spans []commitSpan) error {
	buffered := bufio.NewWriterSize(w, 1<<20)
	if _, err := buffered.WriteString(archiveMagic); err != nil {
		return err
	}
	if err := writeFrame(buffered, header); err != nil {
		return err
	}
	for len(spans) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		var commits []archiveCommit
		err := l.view(func(tx *bolt.Tx) error {
			events := tx.Bucket(bucketEvents)
			for read := uint64(0); len(spans) > 0 && read < chunkRecords; spans = spans[1:] {
				commit := archiveCommit{First: spans[0].first, Hash: spans[0].hash}
				for n := spans[0].first; n < spans[0].first+spans[0].count; n++ {
					commit.Events = append(commit.Events, bytes.Clone(events.Get(number(n))))
				}
				if commitHash(header.Before, commit.Events) != commit.Hash {
					return damaged{fmt.Errorf("the commit at event %d does not match the hash chain; run 'kedge ledger verify'", commit.First)}
				}
				header.Before = commit.Hash
				commits = append(commits, commit)
				read += spans[0].count
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, commit := range commits {
			if err := writeFrame(buffered, commit); err != nil {
				return err
			}
		}
	}
	return buffered.Flush()
}
