package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const day = 24 * time.Hour

func (h *house) prune(now time.Time) PruneReport {
	h.t.Helper()
	report, err := h.Prune(context.Background(), now)
	if err != nil {
		h.t.Fatal(err)
	}
	return report
}

func TestOnlyWhatIsPastItsRetentionIsPruned(t *testing.T) {
	t.Parallel()
	h := newHouse(t) // 1 to 3: time + 30 days
	start := h.clock.Now()
	h.must(h.issue())                                                                                    // 4: an hour + 30 days
	h.must(&Token{ID: "t", SPIFFEID: "spiffe://cluster.local/x", Expires: At(start) + 2*86400, By: "x"}) // 5
	h.must(&Revoke{Serial: Serial{5}, NotAfter: At(start) + 3*86400, By: "x"})                           // 6
	h.must(h.issue(), h.issue(func(i *Issue) { i.NotAfter = At(start) + 4*86400 }), bundle(2, 1))        // 7 to 9: one commit
	h.must(h.issue(func(i *Issue) { i.NotAfter = At(start) + 90*86400 }))                                // 10
	h.must(h.issue(), &Confirm{Number: 7, Serial: mustIssue(h, 7).Serial, How: "sds-ack"})               // 11, 12: behind a long-lived one
	steps := []struct {
		after time.Duration
		first uint64
	}{
		{0, 1}, {29 * day, 1}, {30 * day, 4}, {30*day + 30*time.Minute, 4}, {30*day + 2*time.Hour, 5}, {31 * day, 5}, {32 * day, 6}, {33 * day, 7},
		{33*day + 12*time.Hour, 7}, {34*day + 2*time.Hour, 10}, {119 * day, 10}, {121 * day, 13}, {1000 * day, 13},
	}
	for _, step := range steps {
		report := h.prune(start.Add(step.after))
		if report.First != step.first || h.Head().First != step.first {
			t.Errorf("after %v the log begins with %d, want %d", step.after, report.First, step.first)
		}
		h.clean()
	}
	if count, err := h.Count(context.Background(), Filter{}); count != 0 || err != nil {
		t.Errorf("%d events are left, %v", count, err)
	}
	h.reopen()
	h.clean()
	h.clock.advance(1000 * day)
	if n := h.must(h.issue()); n != 13 {
		t.Errorf("the next event is %d", n)
	}
	// The tables keep what is needed.
	if record, err := h.CurrentBundle(); err != nil || record.Sequence != 2 {
		t.Errorf("%+v, %v", record, err)
	}
	if records, err := h.Authorities(); err != nil || len(records) != 2 {
		t.Errorf("%+v, %v", records, err)
	}
	if rows, err := h.Holdings(); err != nil || len(rows) != 1 {
		t.Errorf("%+v, %v", rows, err)
	}
	h.must(move(h.ca.ID, StateActive, StateRetired))
	h.clean()
	h.reopen()
	h.clean()
}

func mustIssue(h *house, n uint64) *Issue {
	h.t.Helper()
	e, err := h.Event(context.Background(), n)
	if err != nil {
		h.t.Fatal(err)
	}
	return e.Body.(*Issue)
}

func TestTheTablesForgetWhatIsPast(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	start := h.clock.Now()
	first := h.issue()
	n := h.must(first, &Token{ID: "t", SPIFFEID: "spiffe://cluster.local/x", Expires: At(start) + 600, By: "x"},
		&Revoke{Serial: Serial{5}, NotAfter: At(start) + 600, By: "x"})
	h.must(h.issue(func(i *Issue) { i.Replaces, i.NotAfter = n, first.NotAfter+7200 }))
	second := mustIssue(h, n+3)
	h.must(&Confirm{Number: n + 3, Serial: second.Serial, How: "sds-ack"})
	rows := func() (counts []uint64) {
		holdings, err := h.Holdings()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range holdings {
			counts = append(counts, row.Count)
		}
		return counts
	}
	if got := rows(); len(got) != 2 || got[0] != 0 || got[1] != 1 {
		t.Errorf("holdings %v: a row stays while its hour is not past", got)
	}
	h.prune(start.Add(5 * time.Minute))
	if len(rows()) != 2 || h.Redeemable("t") != nil {
		t.Error("something was dropped too early")
	}
	h.prune(start.Add(11 * time.Minute))
	if revoked, _ := h.Revoked(Serial{5}); revoked {
		t.Error("the revocation of an expired certificate is still in memory")
	}
	if err := h.Redeemable("t"); !errors.Is(err, ErrTokenUnknown) {
		t.Errorf("an expired token: %v", err)
	}
	h.clean()
	h.prune(start.Add(2 * time.Hour))
	if got := rows(); len(got) != 1 || got[0] != 1 {
		t.Errorf("holdings %v after the first hour is past", got)
	}
	h.clean()
	h.reopen()
	h.clean()
}

// I8: the guarded clock never goes back; when what claims to be it does, nothing is dropped on its word.
func TestNothingIsPrunedWhenTheGuardedClockGoesBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	start := h.clock.Now()
	h.must(h.issue())
	h.prune(start.Add(2 * time.Hour)) // drops a row
	late := h.issue(func(i *Issue) { i.NotAfter = At(start) + 60 })
	h.must(late)
	if report := h.prune(start.Add(time.Hour + 59*time.Minute)); report.Rows != 0 || report.Events != 0 {
		t.Errorf("%+v", report)
	}
	if report := h.prune(start.Add(3 * time.Hour)); report.Rows != 1 {
		t.Errorf("%+v", report)
	}
	h.clean()
}

func TestAnEventOfALaterVersionIsNeverPruned(t *testing.T) {
	t.Parallel()
	if _, ok := relevant(Event{Body: &Unknown{Of: 99}}); ok {
		t.Error("an event that is not understood counts as past")
	}
}

func TestWhatIsPrunedIsInTheArchiveFirst(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive })
	var bodies []Body
	for range maxDraft {
		bodies = append(bodies, h.issue())
	}
	for h.Head().Number < pruneEvents+2*maxDraft {
		h.must(bodies...)
	}
	old := h.Head()
	raws := map[uint64]Event{}
	for e, err := range h.Events(context.Background(), Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		raws[e.Number] = e
	}
	h.clock.advance(40 * day)
	h.must(h.issue())
	report := h.prune(h.clock.Now())
	if report.Events != old.Number || len(report.Archives) != 1 || report.First != old.Number+1 {
		t.Fatalf("%+v", report)
	}
	h.clean()
	var hash Hash
	read := uint64(0)
	for commit, err := range ReadArchive(report.Archives[0]) {
		if err != nil {
			t.Fatal(err)
		}
		if commit.First != read+1 || (commit.Before != hash && read > 0) {
			t.Errorf("the commit at event %d follows on %d", commit.First, read)
		}
		for _, raw := range commit.Raw {
			e, err := DecodeEvent(raw)
			if read++; err != nil || e.Number != read || e.Time != raws[read].Time || e.Type != raws[read].Type {
				t.Errorf("event %d in the archive: %+v, %v", read, e, err)
			}
		}
		hash = commit.Hash
	}
	if read != old.Number || hash != old.Hash {
		t.Errorf("the archive has %d events to the hash %s, want %d to %s", read, hash, old.Number, old.Hash)
	}
	if info, err := os.Stat(report.Archives[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// Who asks for events from a number on and gets later ones would not know that some are missing.
func TestAReadFromAPrunedNumberSaysSo(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive }) // 1 to 3
	h.must(h.issue())                                             // 4
	h.clock.advance(40 * day)
	start := h.clock.at()
	h.must(h.issue()) // 5
	h.must(h.issue()) // 6
	h.prune(h.clock.Now())
	ctx := context.Background()
	for _, test := range []struct {
		name   string
		filter Filter
		want   string // "": the events from 5 on
	}{
		{"from the first that is kept", Filter{From: 5}, ""},
		{"from wherever it begins", Filter{}, ""},
		{"from nowhere, to a number", Filter{To: 6}, ""},
		{"what is later than all that is gone", Filter{From: 2, Since: start + 1}, ""},
		{"from a number", Filter{From: 2}, "the events 2 to 4 are no longer in the ledger, which begins with number 5: it was pruned; "},
		{"since a time, too", Filter{From: 2, Since: start}, "the events 2 to 4 are no longer"},
		{"from the last that is gone", Filter{From: 4}, "event 4 is no longer in the ledger"},
		{"one", Filter{From: 3, To: 3}, "event 3 is no longer in the ledger"},
		{"some that are all gone", Filter{From: 1, To: 2}, "the events 1 to 2 are no longer"},
		{"newest first", Filter{From: 2, Newest: true}, "the events 2 to 4 are no longer"},
	} {
		var got []uint64
		var err error
		for e, failed := range h.Events(ctx, test.filter) {
			if err = failed; err == nil {
				got = append(got, e.Number)
			}
		}
		_, countErr := h.Count(ctx, test.filter)
		if test.want == "" && (err != nil || countErr != nil || test.filter.Since == 0 && (len(got) != 2 || got[0] != 5)) {
			t.Errorf("%s: events %v, %v, %v", test.name, got, err, countErr)
		}
		if test.want != "" {
			for _, err := range []error{err, countErr} {
				if len(got) != 0 || !errors.Is(err, ErrPruned) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), archive) {
					t.Errorf("%s: events %v, %v", test.name, got, err)
				}
			}
		}
	}
}

// What is pruned while it is being read is missed, and not passed over.
func TestAReadThatIsOvertakenByPruningSaysSo(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var bodies []Body
	for range maxDraft {
		bodies = append(bodies, h.issue())
	}
	for h.Head().Number < 2*chunkRecords {
		h.must(bodies...)
	}
	h.clock.advance(40 * day)
	var last Event
	var err error
	for e, failed := range h.Events(context.Background(), Filter{}) {
		if err = failed; err != nil {
			break
		}
		if last = e; e.Number == 1 {
			h.prune(h.clock.Now())
		}
	}
	if !errors.Is(err, ErrPruned) || last.Number >= h.Head().Number || !strings.Contains(err.Error(), "there is no archive of them") {
		t.Errorf("the last was event %d, %v", last.Number, err)
	}
}

// A crash between the archive and the drop, or in the midst of either: the next run goes on, and nothing is archived twice.
func TestArchivingGoesOnAfterACrash(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive })
	var numbers []uint64
	for range 5 {
		numbers = append(numbers, h.must(h.issue(), h.issue()))
	}
	h.clock.advance(40 * day)
	ctx := context.Background()
	before, spans, err := h.droppable(ctx, h.clock.at())
	if err != nil || len(spans) != 6 {
		t.Fatalf("%v, %v", spans, err)
	}
	// A run that ended after the archive was written and one commit was dropped; another that ended while it wrote.
	path, last, err := h.archive(ctx, before, spans[:4])
	if err != nil || last != numbers[3]-1 {
		t.Fatalf("%s to %d, %v", path, last, err)
	}
	if err := h.submit(ctx, &draft{done: make(chan struct{}), step: func(b *batch) error { return b.drop(spans[:1], h.clock.at()) }}); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(archive, archiveName(h.Head().Log, numbers[3], 99)+temporarySuffix)
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.reopen()
	report := h.prune(h.clock.Now())
	if len(report.Archives) != 2 || report.Archives[0] != path || report.First != h.Head().Number+1 {
		t.Errorf("%+v", report)
	}
	next := uint64(1)
	for _, path := range report.Archives {
		for commit, err := range ReadArchive(path) {
			if err != nil || commit.First != next {
				t.Errorf("%s: the commit at %d, want %d, %v", path, commit.First, next, err)
			}
			next += uint64(len(commit.Raw))
		}
	}
	if next != h.Head().Number+1 {
		t.Errorf("the archives end before event %d", next)
	}
	if entries, err := os.ReadDir(archive); err != nil || len(entries) != 2 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
	h.clean()
}

func TestNothingIsDroppedThatTheArchiveDoesNotHave(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	h := newHouse(t, func(o *Options) { o.ArchiveDir = archive })
	h.must(h.issue())
	h.clock.advance(40 * day)
	before, spans, err := h.droppable(context.Background(), h.clock.at())
	if err != nil {
		t.Fatal(err)
	}
	path, _, err := h.archive(context.Background(), before, spans)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, damaged := range map[string][]byte{
		"cut short": text[:len(text)-1], "flipped": append(text[:len(text)-5:len(text)-5], "xxxxx"...),
		"longer": append(text[:len(text):len(text)], 0), "empty": {},
	} {
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		report, err := h.Prune(context.Background(), h.clock.Now())
		if err == nil || !strings.Contains(err.Error(), path) || report.First != 1 || h.Head().First != 1 {
			t.Errorf("%s: %+v, %v", name, report, err)
		}
	}
	if err := os.RemoveAll(archive); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Prune(context.Background(), h.clock.Now()); err == nil || !strings.Contains(err.Error(), archive) {
		t.Errorf("without its folder: %v", err)
	}
	h.clean()
}

func TestAppendsGoOnWhilePruning(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var bodies []Body
	for range maxDraft {
		bodies = append(bodies, h.issue())
	}
	for h.Head().Number < pruneEvents+maxDraft {
		h.must(bodies...)
	}
	h.clock.advance(40 * day)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				h.must(h.issue())
			}
		}
	}()
	report := h.prune(h.clock.Now())
	close(stop)
	<-stopped
	if report.Events < pruneEvents || report.First != report.Events+1 {
		t.Errorf("%+v", report)
	}
	h.clean()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.Prune(ctx, h.clock.Now()); !errors.Is(err, context.Canceled) {
		t.Errorf("a Prune whose context ended: %v", err)
	}
}

func FuzzReadArchive(f *testing.F) {
	h := newHouse(f, func(o *Options) { o.ArchiveDir = f.TempDir() })
	h.clock.advance(40 * day)
	text, err := os.ReadFile(h.prune(h.clock.Now()).Archives[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(archiveMagic + "\x00\x00\x00\x01\xa0"))
	f.Add([]byte(archiveMagic + "\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, text []byte) {
		next := uint64(0)
		err := readArchive(strings.NewReader(string(text)), func(c ArchivedCommit) bool {
			if next != 0 && c.First != next {
				t.Error("numbers have a gap")
			}
			if commitHash(c.Before, c.Raw) != c.Hash {
				t.Error("the hash is wrong")
			}
			next = c.First + uint64(len(c.Raw))
			return true
		})
		if err == nil && len(text) < len(archiveMagic) {
			t.Error("nothing was taken for an archive")
		}
	})
}
