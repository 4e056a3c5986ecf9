package ledger

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	bolt "go.etcd.io/bbolt"
)

func TestADamagedFileIsRefusedAndNotTouched(t *testing.T) {
	t.Parallel()
	original := fill(t)
	if err := original.Close(); err != nil {
		t.Fatal(err)
	}
	edit := func(f func(tx *bolt.Tx) error) func(path string) error {
		return func(path string) error {
			db, err := bolt.Open(path, 0o600, nil)
			if err != nil {
				return err
			}
			return errors.Join(db.Update(f), db.Close())
		}
	}
	write := func(offset int64, data []byte) func(path string) error {
		return func(path string) error {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt(data, offset)
			return errors.Join(err, f.Close())
		}
	}
	tests := []struct {
		name   string
		damage func(path string) error
		want   string
	}{
		{"empty", func(path string) error { return os.Truncate(path, 0) }, "not a bbolt file"},
		{"another kind of file", func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("text ", 10000)), 0o600) }, "not a bbolt file"},
		{"cut short", func(path string) error { return os.Truncate(path, 64<<10) }, "cut short"},
		{"cut to the meta pages", func(path string) error { return os.Truncate(path, 8<<10) }, "cut short"},
		{"zeros over both meta pages", write(0, make([]byte, 8<<10)), "meta pages are damaged"},
		{"zeros over the pages", func(path string) error {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			return write(8<<10, make([]byte, info.Size()-8<<10))(path)
		}, "structure is damaged"},
		{"zeros over the pages, their free list not written", func(path string) error {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			return errors.Join(write(8<<10, make([]byte, info.Size()-8<<10))(path), forgetFreelist(path))
		}, "structure is damaged"},
		{"a page that leads back to itself", endless, "is used twice"}, // bbolt would go on for ever, and take all memory there is
		{"a page that leads back to itself, their free list not written", func(path string) error {
			return errors.Join(endless(path), forgetFreelist(path))
		}, "is used twice"},
		{"another bbolt file", func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return edit(func(tx *bolt.Tx) error { _, err := tx.CreateBucket([]byte("x")); return err })(path)
		}, "not a ledger"},
		{"a table is missing", edit(func(tx *bolt.Tx) error {
			return tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).DeleteBucket(bucketTokens)
		}), `table "tokens" is missing`},
		{"the head is missing", edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Delete(keyHead) }), "head is damaged"},
		{"the last event is missing", edit(func(tx *bolt.Tx) error {
			key, _ := tx.Bucket(bucketEvents).Cursor().Last()
			return tx.Bucket(bucketEvents).Delete(key)
		}), "its last event is"},
		{"a late event is missing", edit(func(tx *bolt.Tx) error {
			key, _ := tx.Bucket(bucketEvents).Cursor().Last()
			return tx.Bucket(bucketEvents).Delete(number(toNumber(key) - 1))
		}), "does not match the hash chain"},
		{"the last commit is missing", edit(func(tx *bolt.Tx) error {
			key, _ := tx.Bucket(bucketCommits).Cursor().Last()
			return tx.Bucket(bucketCommits).Delete(key)
		}), "says that it holds"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(original.dir)); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, storeFile)
			if err := test.damage(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			l, err := Open(dir, original.o)
			if err == nil {
				t.Fatal("it is opened", l.Close())
			}
			for _, want := range []string{test.want, path, "backup"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Errorf("the file was changed (%v)", err)
			}
			if db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout / 10, ReadOnly: true}); err != nil && strings.Contains(err.Error(), "timeout") {
				t.Error("the file is still locked")
			} else if err == nil {
				db.Close()
			}
		})
	}
}

// endless lets the last way down from the root page of the events lead back to that page.
func endless(path string) error {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	var root uint64
	err = db.View(func(tx *bolt.Tx) error {
		root = uint64(tx.Bucket(bucketEvents).Root())
		return nil
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page := make([]byte, 4096)
	if _, err := f.ReadAt(page, int64(root)*4096); err != nil {
		return err
	}
	if kind := binary.NativeEndian.Uint16(page[8:]); kind != 1 {
		return fmt.Errorf("page %d leads nowhere: its kind is %d", root, kind)
	}
	last := 16 * int(binary.NativeEndian.Uint16(page[10:])) // of the elements, after a header of their size
	binary.NativeEndian.PutUint64(page[last+8:], root)
	_, err = f.WriteAt(page, int64(root)*4096)
	return err
}

// forgetFreelist makes bbolt look for the free pages itself, as after a mass drop.
func forgetFreelist(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, offset := range []int64{16, 4096 + 16} {
		meta := make([]byte, 64)
		if _, err := f.ReadAt(meta, offset); err != nil {
			return err
		}
		binary.NativeEndian.PutUint64(meta[32:], ^uint64(0))
		sum := fnv.New64a()
		sum.Write(meta[:56])
		binary.NativeEndian.PutUint64(meta[56:], sum.Sum64())
		if _, err := f.WriteAt(meta, offset); err != nil {
			return err
		}
	}
	return nil
}

func TestAFileWithoutItsFreeListOpens(t *testing.T) {
	t.Parallel()
	h := fill(t)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := forgetFreelist(filepath.Join(h.dir, storeFile)); err != nil {
		t.Fatal(err)
	}
	h.open()
	h.must(h.issue())
	h.clean()
}

// bbolt keeps two meta pages, and goes on from the other one when a write was cut short. Nobody is left to believe that all is well.
func TestOneDamagedMetaPageIsSurvivedAndSaid(t *testing.T) {
	t.Parallel()
	for _, offset := range []int64{0, 4096} {
		log := newAwaitLog("one of the two meta pages of the ledger is damaged: a write was cut short, or the disk is failing. " +
			"If it was the later one, the last commit is lost: compare the number with what was seen last")
		h := newHouse(t, func(o *Options) { o.Logger = slog.New(log) })
		for range 5 {
			h.must(h.issue())
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(h.dir, storeFile), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, 100), offset); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		h.open()
		<-log.seen
		if n := h.Head().Number; n != 7 && n != 8 {
			t.Errorf("the head is %d", n)
		}
		h.clean()
	}
}

func TestALedgerIsNotOpenedTwice(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	if _, err := Open(h.dir, h.o); err == nil || !strings.Contains(err.Error(), "another process has it open") {
		t.Errorf("the second Open: %v", err)
	}
	other := h.o
	other.TrustDomain = "other.example"
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(h.dir, other); err == nil || !strings.Contains(err.Error(), `belongs to the trust domain "cluster.local"`) {
		t.Errorf("Open for another trust domain: %v", err)
	}
	h.open()
}

func TestALostLedgerIsNotReplacedByAnEmptyOne(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(h.dir, storeFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(h.dir, h.o); err == nil || !strings.Contains(err.Error(), "from a backup with 'kedge restore'") {
		t.Errorf("Open: %v", err)
	}
}

func TestOpenGoesOnAfterACrashWhileTheFolderWasMade(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, storeFile+temporarySuffix), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := newHouseIn(t, dir)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, formatFile)); err != nil { // it comes last
		t.Fatal(err)
	}
	h.open()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
	for _, entry := range entries {
		if info, err := entry.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has the mode %v, %v", entry.Name(), info.Mode(), err)
		}
	}
}

func TestAFolderOfALaterFormatIsRefused(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text, want string // want "": accepted
	}{
		{"of now", `{"format":1,"oldest_reader_format":1,"oldest_reader":"0.1.0","written_by":"0.1.0"}`, ""},
		{"of a later version that this one can read", `{"format":3,"oldest_reader_format":1,"oldest_reader":"0.1.0","written_by":"0.9.0","new":true}`, ""},
		{"of a later version", `{"format":3,"oldest_reader_format":2,"oldest_reader":"0.7.0","written_by":"0.9.0"}`, "use kedge 0.7.0 or later"},
		{"cut short", `{"format":1,`, "is damaged"},
		{"without numbers", `{}`, "is damaged"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(h.dir, formatFile), []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(filepath.Join(h.dir, storeFile))
			if err != nil {
				t.Fatal(err)
			}
			l, err := Open(h.dir, h.o)
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), h.dir) {
				t.Errorf("Open: %v, want an error with %q", err, test.want)
			}
			if after, err := os.ReadFile(filepath.Join(h.dir, storeFile)); err != nil || !bytes.Equal(before, after) {
				t.Errorf("a folder that was refused was changed (%v)", err)
			}
		})
	}
}

// TestAnUpgradeIsRolledBack plays a later version, whose format this one can read: it added a type of event, and a field to another.
func TestAnUpgradeIsRolledBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	old := h.must(h.issue())
	later := func(step func(*batch) error) {
		t.Helper()
		if err := h.submit(t.Context(), &draft{step: step, done: make(chan struct{})}); err != nil {
			t.Fatal(err)
		}
	}
	newType := must(encoding.Marshal(map[int]string{1: "a waiver"}))
	later(func(b *batch) error {
		_, err := b.store(200, newType)
		return err
	})
	issue := h.issue()
	var fields map[int]cbor.RawMessage
	if err := decoding.Unmarshal(must(encodeBody(issue)), &fields); err != nil {
		t.Fatal(err)
	}
	fields[99] = must(encoding.Marshal("what this version does not know"))
	newField := must(encoding.Marshal(fields))
	later(func(b *batch) error { return b.issue(issue, newField) })
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	format, statement := filepath.Join(h.dir, formatFile), `{"format":3,"oldest_reader_format":1,"oldest_reader":"0.1.0","written_by":"0.9.0","reason":"waivers"}`
	if err := os.WriteFile(format, []byte(statement), 0o600); err != nil {
		t.Fatal(err)
	}

	h.open()
	h.must(h.issue())
	h.must(&Revoke{Serial: issue.Serial, Number: old + 2, NotAfter: issue.NotAfter, By: "test"})
	event, err := h.Event(t.Context(), old+1)
	if unknown, ok := event.Body.(*Unknown); err != nil || !ok || !bytes.Equal(unknown.Raw, newType) {
		t.Errorf("the event of a new type is %+v (%v)", event.Body, err)
	}
	event, err = h.Event(t.Context(), old+2)
	if read, ok := event.Body.(*Issue); err != nil || !ok || !slices.Equal(read.Serial, issue.Serial) {
		t.Errorf("the issue with a new field is %+v (%v)", event.Body, err)
	}
	h.clean()
	if report := h.prune(h.clock.Now().Add(1000 * day)); report.First != old+1 {
		t.Errorf("the log begins with %d after pruning, and for how long event %d matters only the later version knows", report.First, old+1)
	}
	h.clean()
	if text, err := os.ReadFile(format); err != nil || string(text) != statement {
		t.Errorf("format.json says %s (%v), so that the later version would take the folder for one of this one", text, err)
	}
}

func TestANewFolderStatesItsFormat(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	text, err := os.ReadFile(filepath.Join(h.dir, formatFile))
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"format": 1.0, "oldest_reader_format": 1.0, "oldest_reader": "0.1.0", "written_by": "0.1.0"}
	if fmt.Sprint(record) != fmt.Sprint(want) {
		t.Errorf("format.json says %v, want %v", record, want)
	}
	if err := CheckFormat(t.TempDir(), "0.1.0"); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
}

// TestADataFolderIsTakenOverFromAProcessThatIsEnding: what holds the lock lets go of it while somebody waits.
func TestADataFolderIsTakenOverFromAProcessThatIsEnding(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ending, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(lockLook, func() { _ = ending() })
	release, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
}

func TestADataFolderServesOneProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	release, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Lock(dir)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) || !strings.Contains(err.Error(), dir) {
		t.Errorf("the second Lock: %v", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if release, err = Lock(dir); err != nil {
		t.Fatal(err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := Lock(filepath.Join(dir, "missing")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("a folder that is not there: %v", err)
	}
}
