package ledger

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// copied is the ledger of a snapshot, in a folder of its own.
func (h *house) copied() *house {
	h.t.Helper()
	s, err := h.Snapshot(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	text, err := io.ReadAll(s)
	if err = errors.Join(err, s.Close()); err != nil || int64(len(text)) != s.Size {
		h.t.Fatalf("a snapshot of %d octets: %d were read, %v", s.Size, len(text), err)
	}
	dir := h.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, storeFile), text, 0o600); err != nil {
		h.t.Fatal(err)
	}
	c := newHouseIn(h.t, dir)
	c.clock.seconds.Store(h.clock.seconds.Load())
	if head := c.Head(); head != s.Head {
		h.t.Errorf("the snapshot's head is %+v, and says %+v", head, s.Head)
	}
	return c
}

func (h *house) restore() Event {
	h.t.Helper()
	e, err := h.Restore(context.Background(), Restore{Taken: h.clock.at() - 5, By: "test"})
	if err != nil {
		h.t.Fatal(err)
	}
	return e
}

func TestARestoreBeginsANewLogAndNumbersGoOn(t *testing.T) {
	t.Parallel()
	lost := fill(t)
	foreign, gone := founding("foreign", RoleRoot, StateActive), founding("gone", RoleIssuing, StatePrepared)
	foreign.Record.Coverage = Coverage{Kind: "foreign", Until: lost.clock.at() + 1000}
	lost.must(foreign, gone, move(gone.ID, StatePrepared, StateRemoved))
	h := lost.copied()
	before := h.Head()
	holdings, err := h.Holdings()
	if err != nil {
		t.Fatal(err)
	}
	h.clock.advance(time.Hour)
	e := h.restore()
	h.clean()

	after, r := h.Head(), e.Body.(*Restore)
	if after.Log == before.Log || after.Incarnation == before.Incarnation || after.First != before.First {
		t.Errorf("the head is %+v and was %+v", after, before)
	}
	if e.Number != before.Number+1 || after.Number != e.Number+1 || e.Log != after.Log {
		t.Errorf("the restore is event %d of log %s; the head was %d and is %d", e.Number, e.Log, before.Number, after.Number)
	}
	want := Restore{Log: before.Log, Incarnation: before.Incarnation, Number: before.Number, Hash: before.Hash, Next: after.Incarnation,
		Taken: h.clock.at() - 5, By: "test"}
	if *r != want {
		t.Errorf("it says %+v, and not %+v", *r, want)
	}
	bundle, err := h.CurrentBundle()
	if floor := h.Floor(); err != nil || bundle.Sequence != uint64(h.clock.at()) || floor != bundle.Sequence ||
		bundle.Incarnation != after.Incarnation || !bytes.Equal(bundle.Roots[0], []byte("root")) {
		t.Errorf("bundle %+v, floor %d, %v", bundle, floor, err)
	}
	records, err := h.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range records {
		want := Coverage{Kind: "since", Since: e.Time + 1}
		switch a.ID {
		case foreign.ID:
			want = Coverage{Kind: "foreign", Since: e.Time + 1, Until: foreign.Record.Coverage.Until}
		case gone.ID:
			want = Coverage{Kind: "complete"}
		}
		if a.Coverage != want {
			t.Errorf("the coverage of %s, which is %s, is %+v and not %+v", a.KeyRef, a.State, a.Coverage, want)
		}
	}
	if err := h.Redeemable("t"); !errors.Is(err, ErrTokenUnknown) {
		t.Errorf("a join token of before: %v", err)
	}
	if revoked, _ := h.Revoked(Serial{5}); !revoked {
		t.Error("a revocation is forgotten")
	}
	if still, err := h.Holdings(); err != nil || !slices.Equal(still, holdings) {
		t.Errorf("holdings %v, %v; they were %v", still, err, holdings)
	}

	// The new log goes on as any other, and only with the new bundle.
	now := func(i *Issue) { i.Bundle = bundle.Sequence }
	h.refused(ErrBelowFloor, h.issue())
	h.refused(ErrConflict, leaping(bundle.Sequence+5))
	if n := h.must(h.issue(now), &Token{ID: "t", SPIFFEID: "spiffe://cluster.local/vm", Expires: h.clock.at() + 600, By: "x"}, leaping(bundle.Sequence+1)); n != after.Number+1 {
		t.Errorf("the next event is %d", n)
	}
	h.clean()
	h.reopen()
	h.clean()

	// What was recorded before is read as ever.
	var numbers, restores []uint64
	for e, err := range h.Events(context.Background(), Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, e.Number)
		if e.Type == TypeRestore {
			restores = append(restores, e.Number)
		}
		if old := e.Number <= before.Number; old && e.Log != before.Log || !old && e.Log != after.Log {
			t.Fatalf("event %d is of log %s", e.Number, e.Log)
		}
	}
	if uint64(len(numbers)) != h.Head().Number || !slices.Equal(restores, []uint64{e.Number}) {
		t.Errorf("%d events, restores %v", len(numbers), restores)
	}
	if count, err := h.Count(context.Background(), Filter{Types: []Type{TypeRestore}}); count != 1 || err != nil {
		t.Errorf("Count finds %d restores, %v", count, err)
	}
}

func leaping(sequence uint64) *Bundle { return bundle(sequence, sequence) }

func TestTwoRestoresOfOneBackupHaveNothingInCommon(t *testing.T) {
	t.Parallel()
	lost := newHouse(t)
	one, two := lost.copied(), lost.copied()
	one.restore()
	two.clock.advance(time.Second)
	two.restore()
	a, b := one.Head(), two.Head()
	first, err := one.CurrentBundle()
	second, err2 := two.CurrentBundle()
	if err != nil || err2 != nil || a.Log == b.Log || a.Incarnation == b.Incarnation || a.Hash == b.Hash || first.Sequence == second.Sequence {
		t.Errorf("%+v and %+v, bundles %d and %d, %v, %v", a, b, first.Sequence, second.Sequence, err, err2)
	}
}

func TestARestoredLedgerCanBeRestoredAgain(t *testing.T) {
	t.Parallel()
	h := fill(t)
	start, _ := h.CurrentBundle()
	h.must(leaping(start.Sequence + 1))
	for range 3 {
		h.clock.seconds.Store(100) // the sequence rises whatever the clock says
		h.restore()
		h = h.copied()
		h.must(h.issue(func(i *Issue) { i.Bundle = mustBundle(h).Sequence }))
		h.clean()
	}
	if got := mustBundle(h).Sequence; got <= start.Sequence+3 {
		t.Errorf("the bundle's sequence is %d", got)
	}
}

func mustBundle(h *house) BundleRecord {
	h.t.Helper()
	record, err := h.CurrentBundle()
	if err != nil {
		h.t.Fatal(err)
	}
	return record
}

func TestARestoreIsNotAppendedAndAnEmptyLedgerIsNotRestored(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	before := h.Head()
	if _, err := h.Append(context.Background(), &Restore{Number: 3, By: "x"}, leaping(9)); err == nil || h.Head() != before {
		t.Errorf("%v; the head is %+v", err, h.Head())
	}
	l, err := Open(t.TempDir(), Options{TrustDomain: domain})
	if err != nil {
		t.Fatal(err)
	}
	before = l.Head()
	if _, err := l.Restore(context.Background(), Restore{By: "x"}); err == nil || !strings.Contains(err.Error(), "nothing was ever issued") {
		t.Errorf("%v", err)
	}
	if l.Head() != before {
		t.Errorf("the head is %+v", l.Head())
	}
	if err := errors.Join(l.Probe(context.Background()), l.Close()); err != nil {
		t.Error(err)
	}
}

// relink changes the events of the last commit, and makes the hash chain hold again, as somebody would who covers his traces.
func relink(tx *bolt.Tx, change func(raws [][]byte) [][]byte) error {
	events, commits, meta := tx.Bucket(bucketEvents), tx.Bucket(bucketCommits), tx.Bucket(bucketMeta)
	head, err := readHead(tx)
	if err != nil {
		return err
	}
	cursor := commits.Cursor()
	key, value := cursor.Last()
	key = bytes.Clone(key)
	count, _, err := decodeCommit(value)
	if err != nil {
		return err
	}
	_, value = cursor.Prev()
	_, before, err := decodeCommit(value)
	if err != nil {
		return err
	}
	var raws [][]byte
	for n := range count {
		raws = append(raws, bytes.Clone(events.Get(number(toNumber(key)+n))))
	}
	raws = change(raws)
	for n, raw := range raws {
		if err := events.Put(number(toNumber(key)+uint64(n)), raw); err != nil {
			return err
		}
	}
	head.Hash = commitHash(before, raws)
	return errors.Join(commits.Put(key, encodeCommit(len(raws), head.Hash)), meta.Put(keyHead, encodeHead(head)))
}

func TestVerifyFindsALogThatChangesWithoutAGoodRestore(t *testing.T) {
	t.Parallel()
	original := fill(t)
	original.must(founding("young", RoleIssuing, StatePrepared))
	token := &Token{ID: "late", SPIFFEID: "spiffe://cluster.local/x", Expires: original.clock.at() + 60000, By: "x"}
	original.must(token)
	h := original.copied()
	h.restore()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	restore := func(change func(e *envelope, r *Restore)) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			return relink(tx, func(raws [][]byte) [][]byte {
				e, body, err := unseal(raws[0])
				if err != nil {
					t.Fatal(err)
				}
				var r Restore
				if err := decoding.Unmarshal(body, &r); err != nil {
					t.Fatal(err)
				}
				change(&e, &r)
				if body, err = encoding.Marshal(&r); err != nil {
					t.Fatal(err)
				}
				raws[0] = e.seal(body)
				return raws
			})
		}
	}
	authority := func(change func(row *authorityRow)) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).Bucket(bucketAuthorities)
			key, value := b.Cursor().First()
			row, err := decodeRow[authorityRow](bucketAuthorities, value)
			if err != nil {
				return err
			}
			change(&row)
			changed, err := encoding.Marshal(row)
			return errors.Join(err, b.Put(bytes.Clone(key), changed))
		}
	}
	tests := []struct {
		name   string
		tamper func(tx *bolt.Tx) error
		want   string
	}{
		{"nothing", func(*bolt.Tx) error { return nil }, ""},
		{"nothing, but linked again", restore(func(*envelope, *Restore) {}), ""},
		{"it names another number", restore(func(_ *envelope, r *Restore) { r.Number -= 2 }), "goes on from event"},
		{"it names another hash", restore(func(_ *envelope, r *Restore) { r.Hash[3] ^= 1 }), "goes on from event"},
		{"it names another log", restore(func(_ *envelope, r *Restore) { r.Log[3] ^= 1 }), "are of log"},
		{"it names another incarnation", restore(func(_ *envelope, r *Restore) { r.Incarnation[3] ^= 1 }), "does not begin with the hash of its incarnation"},
		{"it begins another log", restore(func(e *envelope, _ *Restore) { e.log[3] ^= 1 }), "of log"},
		{"it begins another incarnation", restore(func(_ *envelope, r *Restore) { r.Next[3] ^= 1 }), "are of the incarnation"},
		{"it is not there", func(tx *bolt.Tx) error {
			return relink(tx, func(raws [][]byte) [][]byte {
				e, _, err := unseal(raws[0])
				if err != nil {
					t.Fatal(err)
				}
				body, err := encodeBody(&Revoke{Serial: Serial{9}, By: "x"})
				if err != nil {
					t.Fatal(err)
				}
				e.typ = TypeRevoke
				raws[0] = e.seal(body)
				return raws
			})
		}, "says that it is event"},
		{"the bundle leaps by itself", func(tx *bolt.Tx) error {
			return relink(tx, func(raws [][]byte) [][]byte {
				raws[0], raws[1] = renumber(t, raws[1], -1), renumber(t, raws[0], 1)
				return raws
			})
		}, "does not follow on 2"},
		{"an authority is covered again", authority(func(row *authorityRow) { row.Founded.Coverage = Coverage{Kind: "complete"} }), "or its record differs"},
		{"a void token is back", func(tx *bolt.Tx) error {
			row, err := encoding.Marshal(tokenRow{Token: *token})
			b := tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).Bucket(bucketTokens)
			return errors.Join(err, b.Put([]byte("late"), row))
		}, `join token "late"`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(h.dir)); err != nil {
				t.Fatal(err)
			}
			c := newHouseIn(t, dir)
			c.edit(test.tamper)
			report, err := c.Verify(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			found := strings.Join(report.Problems, "\n")
			if (test.want == "") != (found == "") || !strings.Contains(found, test.want) {
				t.Errorf("Verify found:\n%s\nwant: %s", found, test.want)
			}
		})
	}
}

func renumber(t *testing.T, raw []byte, by int) []byte {
	t.Helper()
	e, body, err := unseal(raw)
	if err != nil {
		t.Fatal(err)
	}
	e.number = uint64(int(e.number) + by)
	return e.seal(body)
}

// TestAuthoritiesThatEnteredBeforeTheFrontStayCut: their first events are pruned, so that no recount has their record.
func TestAuthoritiesThatEnteredBeforeTheFrontStayCut(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.clock.advance(40 * day)
	if report := h.prune(h.clock.Now()); report.First != 4 {
		t.Fatalf("%+v", report)
	}
	h.must(h.issue())
	h.restore()
	h.clean()
	h.edit(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).Bucket(bucketAuthorities)
		key, value := b.Cursor().First()
		row, err := decodeRow[authorityRow](bucketAuthorities, value)
		if err != nil {
			return err
		}
		row.Founded.Coverage = Coverage{Kind: "complete"}
		changed, err := encoding.Marshal(row)
		return errors.Join(err, b.Put(bytes.Clone(key), changed))
	})
	report, err := h.Verify(context.Background())
	if err != nil || len(report.Problems) != 1 || !strings.Contains(report.Problems[0], "is covered complete since") {
		t.Errorf("%+v, %v", report, err)
	}
}

func TestAnArchiveFileHoldsOneLog(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive })
	old := h.Head()
	h.must(h.issue(), h.issue())
	last := h.Head()
	restore := h.restore()
	h.must(h.issue(func(i *Issue) { i.Bundle = mustBundle(h).Sequence }))
	young := h.Head()
	h.clock.advance(20 * day)
	h.must(h.issue(func(i *Issue) { i.Bundle = mustBundle(h).Sequence }))
	h.clock.advance(11 * day)
	report := h.prune(h.clock.Now())
	if report.First != young.Number+1 || len(report.Archives) != 2 {
		t.Fatalf("%+v", report)
	}
	h.clean()
	var before Hash
	for i, want := range []struct {
		log         LogID
		incarnation Hash
		first, last uint64
		hash        Hash
	}{{old.Log, old.Incarnation, 1, last.Number, last.Hash}, {young.Log, young.Incarnation, restore.Number, young.Number, young.Hash}} {
		path := filepath.Join(archive, archiveName(want.log, want.first, want.last))
		if report.Archives[i] != path {
			t.Errorf("file %d is %s and not %s", i, report.Archives[i], path)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		var header archiveHeader
		_, err = f.Seek(int64(len(archiveMagic)), io.SeekStart)
		if err = errors.Join(err, readFrame(f, &header), f.Close()); err != nil || header.Log != want.log || header.Incarnation != want.incarnation {
			t.Errorf("the header says %+v, %v", header, err)
		}
		for commit, err := range ReadArchive(path) {
			if err != nil {
				t.Fatal(err)
			}
			if i+int(commit.First) > 1 && commit.Before != before {
				t.Errorf("the commit at event %d follows on %s, and before it is %s", commit.First, commit.Before, before)
			}
			before = commit.Hash
		}
		if before != want.hash {
			t.Errorf("file %d ends with the hash %s", i, before)
		}
	}
	if before != young.Hash {
		t.Errorf("the archive ends with %s", before)
	}
	h.reopen()
	h.clean()
}

// TestAnOldLogThatIsArchivedBeforeItsEndNamesItsIncarnation, which only the restore behind it knows.
func TestAnOldLogThatIsArchivedBeforeItsEndNamesItsIncarnation(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive })
	old := h.Head()
	h.must(h.issue(func(i *Issue) { i.NotAfter += 86400 }))
	h.restore()
	h.clock.advance(30*day + time.Minute)
	report := h.prune(h.clock.Now())
	if report.First != 4 || len(report.Archives) != 1 {
		t.Fatalf("%+v", report)
	}
	text, err := os.ReadFile(report.Archives[0])
	if err != nil || !bytes.Contains(text[:200], old.Incarnation[:]) {
		t.Errorf("the header does not name the incarnation: %v", err)
	}
	h.clean()
}
