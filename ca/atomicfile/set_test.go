package atomicfile_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"kedge/ca/atomicfile"
)

const (
	chain = "cert-chain.pem"
	key   = "key.pem"
	root  = "root-cert.pem"
)

var names = []string{chain, key, root}

// generation makes a set of which each file says which one it belongs to, over and over, so that a part of it would be noticed.
func generation(n int) map[string][]byte {
	files := map[string][]byte{}
	for _, name := range names {
		files[name] = []byte(strings.Repeat(fmt.Sprintf("generation %d\n", n), 1000))
	}
	return files
}

// whole says which generation the contents of one file are, and fails when they are none.
func whole(data []byte) (int, error) {
	var n int
	if _, err := fmt.Sscanf(string(data), "generation %d\n", &n); err != nil {
		return 0, fmt.Errorf("it is no generation: %.40q", data)
	}
	if string(data) != string(generation(n)[key]) {
		return 0, fmt.Errorf("it is a part of generation %d", n)
	}
	return n, nil
}

// paired says which generation all files are.
func paired(files map[string][]byte) (int, error) {
	all := map[int]bool{}
	for name, data := range files {
		n, err := whole(data)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		all[n] = true
	}
	found := slices.Sorted(maps.Keys(all))
	if len(found) != 1 {
		return 0, fmt.Errorf("the files are of the generations %v", found)
	}
	return found[0], nil
}

// readNames opens one name after the other, as programs do that know nothing of sets.
func readNames(dir string) (map[string][]byte, error) {
	files := map[string][]byte{}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		files[name] = data
	}
	return files, nil
}

func mustWrite(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	if err := atomicfile.WriteSet(dir, files); err != nil {
		t.Fatal(err)
	}
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, entry := range entries {
		found = append(found, entry.Name())
	}
	return found
}

// checkFolder makes sure that the folder holds one generation, the links to it, the names beside, and nothing else; nothing is for others.
func checkFolder(t *testing.T, dir string, n int, beside ...string) {
	t.Helper()
	files, err := readNames(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := paired(files); err != nil || got != n {
		t.Errorf("the set is generation %d, not %d (%v)", got, n, err)
	}
	version, err := os.Readlink(filepath.Join(dir, "..data"))
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(slices.Values(append(append([]string{"..data", version}, names...), beside...)))
	if got := list(t, dir); !slices.Equal(got, want) {
		t.Errorf("the folder holds %q, not %q", got, want)
	}
	for _, name := range names {
		if target, err := os.Readlink(filepath.Join(dir, name)); err != nil || target != "..data/"+name {
			t.Errorf("%s is no link into ..data: %q, %v", name, target, err)
		}
		checkMode(t, filepath.Join(dir, name), 0o600)
	}
	checkMode(t, filepath.Join(dir, "..data"), 0o700)
}

func checkMode(t *testing.T, path string, want fs.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != want {
		t.Errorf("%s has the mode %#o", path, info.Mode().Perm())
	}
}

func TestASetReplacesTheOneBefore(t *testing.T) {
	t.Parallel()
	above := filepath.Join(t.TempDir(), "made", "too")
	dir := filepath.Join(above, "set")
	for n := range 3 {
		mustWrite(t, dir, generation(n))
		checkFolder(t, dir, n)
	}
	checkMode(t, above, 0o700)
	checkMode(t, dir, 0o700)
	other := filepath.Join(dir, "..notes")
	if err := os.WriteFile(other, []byte("somebody else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, dir, generation(3))
	checkFolder(t, dir, 3, "..notes")
}

// TestASetMayGrow: a name that is new appears together with the new contents of the others.
func TestASetMayGrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := generation(1)
	delete(first, root)
	mustWrite(t, dir, first)
	mustWrite(t, dir, generation(2))
	checkFolder(t, dir, 2)
}

// writePlain lays the files down as programs do that know nothing of sets; the names that are nil are left out.
func writePlain(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// foreign are folders that something else than WriteSet left, or half of it. They hold generation 1, or nothing.
var foreign = map[string]func(t *testing.T, dir string){
	"plain files": func(t *testing.T, dir string) { writePlain(t, dir, generation(1)) },
	"a key alone": func(t *testing.T, dir string) { writePlain(t, dir, map[string][]byte{key: generation(1)[key]}) },
	"plain files over an older set": func(t *testing.T, dir string) {
		mustWrite(t, dir, generation(0))
		for _, name := range names {
			if err := atomicfile.Write(filepath.Join(dir, name), generation(1)[name]); err != nil {
				t.Fatal(err)
			}
		}
	},
	"one plain file over its set": func(t *testing.T, dir string) {
		mustWrite(t, dir, generation(1))
		if err := atomicfile.Write(filepath.Join(dir, chain), generation(1)[chain]); err != nil {
			t.Fatal(err)
		}
	},
	"links to elsewhere": func(t *testing.T, dir string) {
		elsewhere := t.TempDir()
		writePlain(t, elsewhere, generation(1))
		for _, name := range names {
			if err := os.Symlink(filepath.Join(elsewhere, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	},
	"links to nowhere": func(t *testing.T, dir string) {
		for _, name := range names {
			if err := os.Symlink("nowhere", filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	},
	"leftovers of crashes": func(t *testing.T, dir string) {
		mustWrite(t, dir, generation(1))
		writePlain(t, dir, map[string][]byte{".key.pem.123": nil, ".cert-chain.pem.4": nil})
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "..version-99", "deep"), 0o700), os.Symlink("..version-99", filepath.Join(dir, "..next"))); err != nil {
			t.Fatal(err)
		}
		writePlain(t, filepath.Join(dir, "..version-99"), generation(7))
	},
}

func TestWhatIsThereIsTakenOver(t *testing.T) {
	t.Parallel()
	for what, lay := range foreign {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			lay(t, dir)
			writePlain(t, dir, map[string][]byte{".key.pem.swp": nil, "notes": nil}) // of an editor, of a person
			mustWrite(t, dir, generation(2))
			checkFolder(t, dir, 2, ".key.pem.swp", "notes")
		})
	}
}

// TestNoReaderSeesAMixedSet lets readers of every kind read while the set changes, until each has seen many generations.
func TestNoReaderSeesAMixedSet(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mustWrite(t, dir, generation(0))
	readers := map[string]func() (int, error){
		"ReadSet": func() (int, error) {
			files, err := atomicfile.ReadSet(dir, names...)
			if err != nil {
				return 0, err
			}
			return paired(files)
		},
		// Its version may be removed under such a reader, who then reads anew.
		"through ..data": func() (int, error) {
			for {
				version, err := os.Readlink(filepath.Join(dir, "..data"))
				if err != nil {
					return 0, err
				}
				files, err := readNames(filepath.Join(dir, version))
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					return 0, err
				}
				return paired(files)
			}
		},
		// It sees what belongs together unless the set changes right then, and no part of a file in any case.
		"one name after the other": func() (int, error) {
			for {
				before, err := os.Readlink(filepath.Join(dir, "..data"))
				if err != nil {
					return 0, err
				}
				files, err := readNames(dir)
				if err == nil {
					for name, data := range files {
						if _, err := whole(data); err != nil {
							return 0, fmt.Errorf("%s: %w", name, err)
						}
					}
				} else if !errors.Is(err, fs.ErrNotExist) {
					return 0, err
				}
				if after, err := os.Readlink(filepath.Join(dir, "..data")); err != nil || after != before {
					continue
				}
				if err != nil {
					return 0, err
				}
				return paired(files)
			}
		},
	}
	const generations = 30 // that each reader shall see
	var done atomic.Int32
	var running sync.WaitGroup
	for kind, read := range readers {
		running.Go(func() {
			defer done.Add(1)
			latest, seen := -1, 0
			for seen < generations {
				n, err := read()
				if err != nil {
					t.Errorf("a reader of the kind %q: %v", kind, err)
					return
				}
				if n < latest {
					t.Errorf("a reader of the kind %q sees generation %d after %d", kind, n, latest)
					return
				}
				if n > latest {
					latest = n
					seen++
				}
			}
		})
	}
	for n := 1; int(done.Load()) < len(readers); n++ {
		mustWrite(t, dir, generation(n))
	}
	running.Wait()
}

// TestWritersTakeTurns: however many write at once, the set is one of theirs.
// TestASetIsForThoseWhoMayReadIt: its files, and the way to them. Nobody else gets further than before.
func TestASetIsForThoseWhoMayReadIt(t *testing.T) {
	t.Parallel()
	group := os.Getegid()
	for _, c := range []struct {
		access                atomicfile.Access
		before, file, version fs.FileMode // before: of the folder; 0: it is made
		dir                   fs.FileMode
	}{
		{atomicfile.Private, 0, 0o600, 0o700, 0o700},
		{atomicfile.Private, 0o777, 0o600, 0o700, 0o777},
		{atomicfile.Access{Mode: 0o640, Group: group}, 0, 0o640, 0o750, 0o750},
		{atomicfile.Access{Mode: 0o440, Group: -1}, 0o700, 0o440, 0o750, 0o750},
		{atomicfile.Access{Mode: 0o644, Group: -1}, 0o711, 0o644, 0o755, 0o755},
		{atomicfile.Access{Mode: 0o640, Group: group}, 0o777, 0o640, 0o750, 0o777},
	} {
		dir := filepath.Join(t.TempDir(), "set")
		if c.before != 0 {
			if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, c.before)); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 2 {
			if err := atomicfile.WriteSetFor(c.access, dir, generation(n)); err != nil {
				t.Fatal(err)
			}
			for path, want := range map[string]fs.FileMode{dir: c.dir, filepath.Join(dir, "..data") + "/.": c.version, filepath.Join(dir, key): c.file} {
				if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
					t.Errorf("%+v: %s has the mode %v, not %v (%v)", c, path, info.Mode().Perm(), want, err)
				}
			}
		}
	}
}

func TestWritersTakeTurns(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "set")
	var writers sync.WaitGroup
	for n := range 4 {
		writers.Go(func() {
			for range 5 {
				if err := atomicfile.WriteSet(dir, generation(n)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	files, err := readNames(dir)
	if err != nil {
		t.Fatal(err)
	}
	n, err := paired(files)
	if err != nil {
		t.Fatal(err)
	}
	checkFolder(t, dir, n)
}

func TestWhatCannotBeWrittenIsNamedAndChangesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mustWrite(t, dir, generation(1))
	more := generation(2)
	more["taken"] = nil
	if err := os.Mkdir(filepath.Join(dir, "taken"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.WriteSet(dir, more); err == nil || !strings.Contains(err.Error(), "writing to the folder "+dir) || !strings.Contains(err.Error(), "/taken: is a directory") {
		t.Errorf("a folder that has a file's name: %v", err)
	}
	checkFolder(t, dir, 1, "taken")
	file := filepath.Join(dir, key)
	if err := atomicfile.WriteSet(file, generation(2)); err == nil || !strings.Contains(err.Error(), "there is a file of that name") {
		t.Errorf("a file that has the folder's name: %v", err)
	}
	if _, err := atomicfile.ReadSet(dir, chain, "nothing"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("reading what is not there: %v", err)
	}
}
