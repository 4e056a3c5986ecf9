package ledger

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestALedgerThatDoesNotGoOnFromItsMarkIsNoticed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	genesis := Mark{Log: h.Head().Log, Hash: genesisHash(h.Head().Incarnation, h.Head().Log)}
	first := h.Head().Mark()
	h.must(h.issue(), h.issue())
	second := h.Head().Mark()
	old := h.copied()
	h.must(h.issue())
	third := h.Head().Mark()
	otherwise := old.copied() // goes on, but otherwise
	otherwise.must(otherwise.issue(func(i *Issue) { i.Peer = "192.0.2.1:1" }))
	restored := old.copied()
	restored.restore()
	marked, err := old.copied().Restore(t.Context(), Restore{By: "x", Mark: &Mark{Log: LogID{9}, Number: 7}})
	if err != nil {
		t.Fatal(err)
	}
	again := restored.copied()
	again.restore()
	stranger := newHouse(t)
	pruned := newHouse(t)
	early := pruned.Head().Mark()
	pruned.must(pruned.issue())
	later := pruned.Head().Mark()
	pruned.must(pruned.issue())
	pruned.clock.advance(40 * day)
	pruned.prune(pruned.clock.Now())
	pruned.must(pruned.issue())
	within := third
	within.Number = second.Number - 1
	tests := []struct {
		name   string
		ledger *house
		mark   Mark
		want   string // "": it goes on
	}{
		{"the same", h, third, ""},
		{"grown since", h, second, ""},
		{"grown since its first day", h, first, ""},
		{"grown since there was nothing", h, genesis, ""},
		{"an older copy", old, third, "the ledger ends with event 5, at 2026-09-01T12:00:00Z, so that 1 are lost"},
		{"one that went on otherwise", otherwise, third, "does not go through that hash"},
		{"another one", stranger, third, "is of event 6 of log " + h.Head().Log.String() + ", at"},
		{"a mark within a commit", h, within, "does not go through that hash"},
		{"restored", restored, third, ""},
		{"restored twice", again, third, ""},
		{"restored, of the log since", restored, restored.Head().Mark(), ""},
		{"restored twice, of the log between", again, restored.Head().Mark(), ""},
		{"put back to before the restore", old, restored.Head().Mark(), "the ledger is of log"},
		{"pruned beyond the mark", pruned, early, ""},
		{"pruned up to the mark", pruned, later, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := test.ledger.CheckMark(test.mark)
			if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, ErrPutBack) || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
	if r := marked.Body.(*Restore); r.Mark == nil || r.Mark.Number != 7 {
		t.Errorf("the restore says %+v", r)
	}
}

// TestARestoreNamesTheMarkThatItFound, so that a ledger restored from a backup goes on from the mark of another restore of the same backup.
func TestARestoreNamesTheMarkThatItFound(t *testing.T) {
	t.Parallel()
	lost := newHouse(t)
	one, two := lost.copied(), lost.copied()
	one.restore()
	mark := one.Head().Mark()
	two.restore()
	if err := two.CheckMark(mark); !errors.Is(err, ErrPutBack) {
		t.Errorf("of a restore that did not know: %v", err)
	}
	if _, err := lost.Restore(t.Context(), Restore{By: "x", Mark: &mark}); err != nil {
		t.Fatal(err)
	}
	if err := lost.CheckMark(mark); err != nil {
		t.Error(err)
	}
	lost.clean()
}

func TestAMarkIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "mark")
	if _, err := ReadMark(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	h := newHouse(t)
	want := h.Head().Mark()
	for range 2 {
		if err := WriteMark(path, want); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadMark(path); err != nil || got != want {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
		h.must(h.issue())
		want = h.Head().Mark()
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	for _, text := range []string{"", "{", "{}", `{"log":"00"}`, `{"log":"00000000000000000000000000000000","number":1}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadMark(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q is read: %v", text, err)
		}
	}
}

func TestLookSeesAndChangesNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	old := h.copied()
	h.must(h.issue())
	mark := h.Head().Mark()
	head := old.Head()
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(old.dir, storeFile)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if seen, err := Look(old.dir, "0.1.0", nil); err != nil || seen.TrustDomain != domain || seen.Head != head {
		t.Errorf("%+v, %v", seen, err)
	}
	if seen, err := Look(old.dir, "0.1.0", &mark); !errors.Is(err, ErrPutBack) || seen.Head != head {
		t.Errorf("%+v, %v", seen, err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the file was changed (%v)", err)
	}
	if err := os.Truncate(path, 8<<10); err != nil {
		t.Fatal(err)
	}
	if _, err := Look(old.dir, "0.1.0", &mark); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a file that is cut short: %v", err)
	}
	if _, err := Look(t.TempDir(), "0.1.0", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an empty folder: %v", err)
	}
	old.dir = t.TempDir() // for the end of the test, which opens nothing
}
