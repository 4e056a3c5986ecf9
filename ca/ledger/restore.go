package ledger

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// Restore begins a new log, with a new incarnation of the store: the ledger comes from a backup or from a copy of a data folder, and others may have
// gone on from the same state. See the event of that name for what changes with it; r says when the backup was made, what the
// high-water mark knew, and who restores. It is for a ledger that nobody else uses yet. It returns the event as it was recorded.
func (l *Ledger) Restore(ctx context.Context, r Restore) (Event, error) {
	var number uint64
	step := &draft{done: make(chan struct{}), step: func(b *batch) (err error) {
		number, err = b.restore(r)
		return err
	}}
	if err := l.submit(ctx, step); err != nil {
		return Event{}, fmt.Errorf("beginning a new log: %w", err)
	}
	return l.Event(ctx, number)
}

// restore is a step of the writer.
func (b *batch) restore(r Restore) (n uint64, err error) {
	_, value := b.table(bucketBundles).Cursor().Last()
	if value == nil {
		return 0, errors.New("the ledger has no trust bundle, so nothing was ever issued from it: begin with an empty data folder instead")
	}
	latest, err := decodeBundle(value)
	if err != nil {
		return 0, err
	}
	r.Log, r.Incarnation, r.Number, r.Hash = b.head.Log, b.head.Incarnation, b.head.Number, b.head.Hash
	rand.Read(b.head.Log[:]) // never fails since Go 1.24
	rand.Read(b.head.Incarnation[:])
	r.Next = b.head.Incarnation
	encoded, err := encodeBody(&r)
	if err != nil {
		return 0, err
	}
	meta := b.tx.Bucket(bucketMeta)
	if err := b.put(meta, keyLog, bytes.Clone(b.head.Log[:])); err != nil {
		return 0, err
	}
	if err := b.put(meta, keyIncarnation, bytes.Clone(b.head.Incarnation[:])); err != nil {
		return 0, err
	}
	if n, err = b.store(TypeRestore, encoded); err != nil {
		return 0, err
	}
	if err := b.cutCoverage(); err != nil {
		return 0, err
	}
	if err := b.voidTokens(); err != nil {
		return 0, err
	}
	b.leap = true
	bundle := latest.Bundle
	bundle.Sequence = max(bundle.Sequence+1, uint64(b.now))
	bundle.Floor, bundle.Reason = bundle.Sequence, "restore"
	return n, b.bundle(&bundle)
}

// cutCoverage: what was issued under the authorities since the backup is not known.
func (b *batch) cutCoverage() error {
	table, changed := b.table(bucketAuthorities), map[Hash]authorityRow{}
	err := table.ForEach(func(key, value []byte) error {
		row, err := decodeRow[authorityRow](bucketAuthorities, value)
		if err == nil && row.cut(b.now) {
			changed[Hash(key)] = row
		}
		return err
	})
	if err != nil {
		return err
	}
	for id, row := range changed {
		if err := b.putRow(bucketAuthorities, id[:], row); err != nil {
			return err
		}
	}
	return nil
}

// cut lets the coverage begin after the second of a restore, in which somebody else may have signed before it, and says whether that changes anything.
// What is removed is known to have nothing under it; of what is foreign nothing was known before either, but the lost CA was one more that signed.
func (r *authorityRow) cut(at Time) bool {
	switch c := &r.Founded.Coverage; {
	case r.State == StateRemoved:
		return false
	case c.Kind == "foreign":
		c.Since = at + 1
	default:
		*c = Coverage{Kind: "since", Since: at + 1}
	}
	return true
}

// voidTokens drops every join token: one that looks unspent may have been spent after the backup.
func (b *batch) voidTokens() error {
	table := b.table(bucketTokens)
	var ids [][]byte
	err := table.ForEach(func(id, _ []byte) error {
		ids = append(ids, bytes.Clone(id))
		return nil
	})
	for _, id := range ids {
		if err == nil {
			err = b.remove(table, id)
		}
	}
	return err
}

// restoreOf finds the latest restore whose event satisfies is; nil when the log has none. It reads from the end.
func restoreOf(tx *bolt.Tx, is func(*Restore) bool) (*Restore, error) {
	cursor := tx.Bucket(bucketEvents).Cursor()
	for key, raw := cursor.Last(); key != nil; key, raw = cursor.Prev() {
		e, _, err := unseal(raw)
		if err != nil {
			return nil, damaged{fmt.Errorf("event %d: %w", toNumber(key), err)}
		}
		if e.typ != TypeRestore {
			continue
		}
		event, err := decodeStored(toNumber(key), raw)
		if err != nil {
			return nil, err
		}
		if r := event.Body.(*Restore); is(r) {
			return r, nil
		}
	}
	return nil, nil
}
