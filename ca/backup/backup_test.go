package backup

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
	"kedge/test/machine"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

// clock is the machine's, some time ago.
func clock(ago time.Duration, boot string) ca.Clock {
	system := ca.SystemClock()
	return ca.Clock{Wall: func() time.Time { return time.Now().Add(-ago) }, Elapsed: system.Elapsed, Boot: boot}
}

// running is a CA in a folder, as 'kedge serve' makes it.
type running struct {
	dir  string
	ca   *ca.CA
	book *ledger.Ledger
}

func run(t *testing.T, dir, passphrase string, c ca.Clock) *running {
	t.Helper()
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: "0.1.0", Now: c.Wall})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { book.Close() }) // a second time when the test closed it
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, rootFolder), TrustDomain: td.Name(), PassphraseFile: passphrase, Now: c.Wall})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, keysFolder), PassphraseFile: passphrase})
	if err != nil {
		t.Fatal(err)
	}
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, clockFile), c, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Open(t.Context(), ca.Options{TrustDomain: td, Ledger: book, Root: root, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys,
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256, Clock: c, Guarded: guarded,
		Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(root.Recorded(), os.MkdirAll(filepath.Join(dir, "join-token-keys"), 0o700)); err != nil {
		t.Fatal(err)
	}
	return &running{dir, authority, book}
}

func (r *running) stop(t *testing.T) {
	t.Helper()
	if err := r.book.Close(); err != nil {
		t.Fatal(err)
	}
}

// take makes a backup of a CA.
func (r *running) take(t *testing.T) []byte {
	t.Helper()
	b, err := Take(t.Context(), r.ca, "0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := errors.Join(b.Write(&text), b.Close()); err != nil {
		t.Fatal(err)
	}
	return text.Bytes()
}

func save(t *testing.T, text []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "backup.tar")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func options(from, dir string) Options {
	return Options{From: from, Dir: dir, By: "test", Version: "0.1.0", Clock: ca.SystemClock(), Logger: slog.New(slog.DiscardHandler)}
}

func TestABackupHoldsWhatACANeedsAndNothingThatLetsCallersIn(t *testing.T) {
	t.Parallel()
	phrase := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(phrase, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, passphrase := range []string{"", phrase} {
		r := run(t, t.TempDir(), passphrase, ca.SystemClock())
		if err := os.WriteFile(filepath.Join(r.dir, keysFolder, strings.Repeat("0", 64)+".pem"), []byte("of nobody"), 0o600); err != nil {
			t.Fatal(err)
		}
		text := r.take(t)
		contents := map[string][]byte{}
		m, err := Read(bytes.NewReader(text), func(file File) (io.WriteCloser, error) { return keep{contents, file.Name, new(bytes.Buffer)}, nil })
		if err != nil {
			t.Fatal(err)
		}
		active, _ := r.ca.Active()
		records, err := r.book.Authorities()
		if err != nil || records[1].ID != active {
			t.Fatal(err)
		}
		want := []string{"clock.json", "format.json", "keys/" + records[1].KeyRef + ".pem", "ledger.db", "root/root-cert.pem", "root/root-key.pem"}
		var names []string
		for name, content := range contents {
			names = append(names, name)
			disk, err := os.ReadFile(filepath.Join(r.dir, name))
			if name != clockFile && name != ledgerFile && (err != nil || !bytes.Equal(disk, content)) {
				t.Errorf("%s is not as on disk: %v", name, err)
			}
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("it holds %v, want %v", names, want)
		}
		if clear := m.ClearKeys(); clear != map[bool]int{true: 2, false: 0}[passphrase == ""] {
			t.Errorf("%d keys are said to be in clear", clear)
		}
		if m.Ledger != r.book.Head() || m.TrustDomain != td.Name() || m.Version != "0.1.0" || m.Taken == 0 {
			t.Errorf("manifest %+v", m)
		}
		if passphrase != "" && bytes.Contains(text, []byte("BEGIN PRIVATE KEY")) {
			t.Error("a key is in it in clear")
		}
	}
}

// keep keeps what is written in a map.
type keep struct {
	contents map[string][]byte
	name     string
	*bytes.Buffer
}

func (k keep) Close() error {
	k.contents[k.name] = k.Bytes()
	return nil
}

// entry is one of a tar archive.
type entry struct {
	header  tar.Header
	content []byte
}

func entries(t *testing.T, text []byte) (all []entry) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, entry{*header, content})
	}
}

func archive(t *testing.T, all []entry) []byte {
	t.Helper()
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	for _, e := range all {
		e.header.Size = int64(len(e.content))
		if e.header.Typeflag != tar.TypeReg {
			e.header.Size, e.content = 0, nil
		}
		if err := w.WriteHeader(&e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return text.Bytes()
}

func TestADamagedBackupIsRefusedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	good := run(t, t.TempDir(), "", ca.SystemClock()).take(t)
	manifest := func(change func(m *Manifest)) func([]entry) []entry {
		return func(all []entry) []entry {
			var m Manifest
			if err := json.Unmarshal(all[0].content, &m); err != nil {
				t.Fatal(err)
			}
			change(&m)
			text, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			all[0].content = text
			return all
		}
	}
	escape := func(name string) func([]entry) []entry {
		return func(all []entry) []entry {
			all[3].header.Name = name
			return manifest(func(m *Manifest) { m.Files[2].Name = name })(all)
		}
	}
	type test struct {
		name, want string
		text       []byte
	}
	tests := []test{
		{"nothing", "not a backup of Kedge", nil},
		{"another file", "not a backup of Kedge", []byte(strings.Repeat("text ", 1000))},
		{"cut within the manifest", "reading its manifest", good[:600]},
		{"cut within the ledger", "ledger.db", good[:20000]},
		{"cut within a key", "unexpected EOF", good[:len(good)-1500]},
	}
	for _, c := range []struct {
		name, want string
		change     func([]entry) []entry
	}{
		{"no manifest", "not a backup of Kedge", func(all []entry) []entry { return all[1:] }},
		{"a manifest that is none", "reading its manifest", func(all []entry) []entry { all[0].content = []byte("{"); return all }},
		{"a file is missing", "cut short", func(all []entry) []entry { return all[:len(all)-1] }},
		{"a file is missing in the middle", "in its place is", func(all []entry) []entry { return slices.Delete(all, 2, 3) }},
		{"two files are exchanged", "in its place is", func(all []entry) []entry { all[2], all[3] = all[3], all[2]; return all }},
		{"one more file", "something follows", func(all []entry) []entry { return append(all, all[3]) }},
		{"one more file in the manifest", "cut short", manifest(func(m *Manifest) { m.Files = append(m.Files, File{Name: "keys/a.pem"}) })},
		{"a file twice", "has once", manifest(func(m *Manifest) { m.Files = append(m.Files, m.Files[0]) })},
		{"no ledger", "a backup has ledger.db", manifest(func(m *Manifest) { m.Files = m.Files[1:] })},
		{"a later format", "use a later one", manifest(func(m *Manifest) { m.Format = 2 })},
		{"a key of a gigabyte", "has 1073741824 octets", manifest(func(m *Manifest) { m.Files[4].Size = 1 << 30 })},
		{"a link", "in its place is", func(all []entry) []entry {
			all[4].header.Typeflag, all[4].header.Linkname = tar.TypeSymlink, "/etc/passwd"
			return all
		}},
		{"another ledger in the manifest", "its manifest says that the ledger ends", manifest(func(m *Manifest) { m.Ledger.Hash[0] ^= 1 })},
		{"the number of another ledger in the manifest", "its manifest says that the ledger ends", manifest(func(m *Manifest) { m.Ledger.Number++ })},
		{"a name that leads out", "which no backup has", escape("../out")},
		{"a name that leads out of a folder", "which no backup has", escape("keys/../../out")},
		{"a name from the top", "which no backup has", escape("/out")},
		{"a name of the data folder's", "which no backup has", escape("join-token-keys/current")},
		{"a hidden name", "which no backup has", escape("keys/.out")},
	} {
		tests = append(tests, test{c.name, c.want, archive(t, c.change(entries(t, good)))})
	}
	for i, e := range entries(t, good)[1:] {
		all := entries(t, good)
		all[i+1].content[len(e.content)/2] ^= 1
		tests = append(tests, test{"a flipped bit in " + e.header.Name, e.header.Name, archive(t, all)})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			parent := t.TempDir()
			_, err := Restore(t.Context(), options(save(t, test.text), filepath.Join(parent, "new")))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
				t.Errorf("it left %v, %v", left, err)
			}
		})
	}
	if _, err := Restore(t.Context(), options(save(t, archive(t, entries(t, good))), filepath.Join(t.TempDir(), "new"))); err != nil {
		t.Errorf("the same without damage: %v", err)
	}
}

func TestARestoredFolderIsServedAsAnyOther(t *testing.T) {
	t.Parallel()
	r := run(t, t.TempDir(), "", ca.SystemClock())
	dir := filepath.Join(t.TempDir(), "a", "new")
	report, err := Restore(t.Context(), options(save(t, r.take(t)), dir))
	if err != nil {
		t.Fatal(err)
	}
	head := r.book.Head()
	if report.Dir != dir || report.TrustDomain != td.Name() || report.Number != head.Number+1 || report.Restore.Log != head.Log || !report.Root || report.Events != head.Number {
		t.Errorf("%+v", report)
	}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if want := map[bool]fs.FileMode{true: 0o700, false: 0o600}[entry.IsDir()]; err == nil && info.Mode().Perm() != want {
			t.Errorf("%s has the mode %#o", path, info.Mode().Perm())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	mark, err := ledger.ReadMark(filepath.Join(dir, ledger.MarkFile))
	if err != nil {
		t.Fatal(err)
	}
	release, err := ledger.Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	again := run(t, dir, "", ca.SystemClock())
	if err := again.book.CheckMark(mark); err != nil || mark.Log != report.Log || mark.Number != report.Number+1 {
		t.Errorf("mark %+v, %v", mark, err)
	}
	if verified, err := again.book.Verify(t.Context()); err != nil || len(verified.Problems) > 0 {
		t.Errorf("%+v, %v", verified, err)
	}
}

func TestOnlyANewOrEmptyFolderIsRestoredTo(t *testing.T) {
	t.Parallel()
	from := save(t, run(t, t.TempDir(), "", ca.SystemClock()).take(t))
	parent := t.TempDir()
	path := func(name string) string { return filepath.Join(parent, name) }
	for _, err := range []error{
		os.Mkdir(path("empty"), 0o755), os.Mkdir(path("full"), 0o700), os.WriteFile(path("full/x"), nil, 0o600), os.WriteFile(path("file"), nil, 0o600),
		os.Mkdir(path("real"), 0o700), os.Symlink("real", path("link")), os.Mkdir(path("mount"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"full": "is not empty", "file": "not a directory", "empty": "", "link": "", "new": "", "a/b": ""} {
		_, err := Restore(t.Context(), options(from, path(name)))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("into %s: %v, want %q", name, err, want)
		}
	}
	if info, err := os.Stat(path("empty")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := os.Stat(path("real/ledger.db")); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(path(".*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
	if err := unix.Mount("tmpfs", path("mount"), "tmpfs", 0, "size=16k"); err != nil {
		machine.Impossible(t, "mounting a small tmpfs", err)
		return
	}
	defer func() {
		if err := unix.Unmount(path("mount"), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	if _, err := Restore(t.Context(), options(from, path("mount"))); err == nil || !strings.Contains(err.Error(), path("mount/data")) {
		t.Errorf("into a mounted file system: %v", err)
	}
	if _, err := Restore(t.Context(), options(from, path("mount/data"))); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("without room: %v", err)
	}
	if left, err := os.ReadDir(path("mount")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

func TestAFolderIsRestoredOnceNobodyServesIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	release, err := ledger.Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, dir, "", ca.SystemClock())
	to := filepath.Join(t.TempDir(), "new")
	if _, err := Restore(t.Context(), options(dir, to)); !errors.Is(err, ledger.ErrLocked) {
		t.Errorf("while it is served: %v", err)
	}
	r.stop(t)
	if err := release(); err != nil {
		t.Fatal(err)
	}
	head := r.book.Head()
	mark := head.Mark()
	mark.Number += 7
	left := filepath.Join(dir, keysFolder, ".half.pem.1")
	if err := errors.Join(ledger.WriteMark(filepath.Join(dir, ledger.MarkFile), mark), os.WriteFile(left, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	before := contents(t, dir)
	report, err := Restore(t.Context(), options(dir, to))
	if err != nil {
		t.Fatal(err)
	}
	if after := contents(t, dir); after != before {
		t.Errorf("the folder was changed from\n%s\nto\n%s", before, after)
	}
	if report.Lost() != 7 || *report.Restore.Mark != mark || report.Restore.Taken != head.Time {
		t.Errorf("%+v", report.Restore)
	}
	for name, want := range map[string]bool{"root/root-key.pem": true, "keys/.half.pem.1": false, "join-token-keys": false, ledger.MarkFile: true} {
		if _, err := os.Stat(filepath.Join(to, name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A mark that cannot be read stops nothing, and neither does a root that is elsewhere.
	if err := errors.Join(os.WriteFile(filepath.Join(dir, ledger.MarkFile), []byte("{"), 0o600), os.RemoveAll(filepath.Join(dir, rootFolder))); err != nil {
		t.Fatal(err)
	}
	if report, err = Restore(t.Context(), options(dir, filepath.Join(t.TempDir(), "new"))); err != nil || report.Restore.Mark != nil || report.Root || report.Lost() != 0 {
		t.Errorf("%+v, %v", report, err)
	}
}

func contents(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || entry.Name() == "lock" {
			return err
		}
		text, err := os.ReadFile(path)
		fmt.Fprintf(&all, "%s %d %x\n", path, len(text), text[:min(len(text), 64)])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

func TestALedgerThatDoesNotVerifyIsNotRestored(t *testing.T) {
	t.Parallel()
	r := run(t, t.TempDir(), "", ca.SystemClock())
	r.stop(t)
	db, err := bolt.Open(filepath.Join(r.dir, ledgerFile), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("trustdomain")).Bucket([]byte(td.Name())).Bucket([]byte("revoked")).Put([]byte{1}, bytes.Repeat([]byte{1}, 8))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	parent := t.TempDir()
	if _, err := Restore(t.Context(), options(r.dir, filepath.Join(parent, "new"))); err == nil || !strings.Contains(err.Error(), "does not verify") ||
		!strings.Contains(err.Error(), "the revocation of the serial 01") {
		t.Errorf("%v", err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

// TestARestoreBearsNoTimeOut (I8): the guarded clock goes on from where the backup left it, or from the last event, not from the machine's word.
func TestARestoreBearsNoTimeOut(t *testing.T) {
	t.Parallel()
	month := 30 * 24 * time.Hour
	r := run(t, t.TempDir(), "", clock(month, "a boot of then"))
	saved := save(t, r.take(t))
	r.stop(t)
	if err := os.Remove(filepath.Join(r.dir, clockFile)); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{saved, r.dir} {
		dir := filepath.Join(t.TempDir(), "new")
		o := options(from, dir)
		o.Clock = clock(0, "a boot of now")
		if _, err := Restore(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		guarded, err := ca.OpenGuardedClock(filepath.Join(dir, clockFile), o.Clock, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if now := guarded.Now(); time.Since(now) < month-time.Hour || guarded.Behind() == nil {
			t.Errorf("from %s: the guarded clock says %s", from, now)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte{})
	m := Manifest{Format: 1, Files: []File{{Name: ledgerFile}, {Name: formatFile}}}
	for i := range m.Files {
		m.Files[i].SHA256 = ledger.Hash{0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
			0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55} // of nothing
	}
	var text bytes.Buffer
	if err := write(&text, m, func(File) io.Reader { return bytes.NewReader(nil) }); err != nil {
		f.Fatal(err)
	}
	if _, err := Read(bytes.NewReader(text.Bytes()), nil); err != nil {
		f.Fatal(err)
	}
	f.Add(text.Bytes())
	f.Fuzz(func(t *testing.T, text []byte) {
		var names []string
		m, err := Read(bytes.NewReader(text), func(file File) (io.WriteCloser, error) {
			names = append(names, file.Name)
			return keep{map[string][]byte{}, file.Name, new(bytes.Buffer)}, nil
		})
		for _, name := range names {
			if !filepath.IsLocal(name) {
				t.Errorf("a file would go to %q", name)
			}
		}
		if err == nil && len(names) != len(m.Files) {
			t.Errorf("%d of %d files were read", len(names), len(m.Files))
		}
	})
}
