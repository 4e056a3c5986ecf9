package atomicfile_test

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/ca/atomicfile"
)

// listed are the files in a folder.
func listed(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		all = append(all, entry.Name())
	}
	return all
}

// TestWhatAKilledWriteLeftIsRemoved, and nothing else.
func TestWhatAKilledWriteLeftIsRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	path := filepath.Join(dir, "clock.json")
	if err := atomicfile.Clean(path); err != nil {
		t.Errorf("in a folder that is not there: %v", err)
	}
	for range 2 {
		if err := atomicfile.MakeFolder(dir); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v %v", info.Mode(), err)
	}
	if err := atomicfile.Write(path, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".clock.json.1234", ".clock.json.backup", ".clock.json.", ".other.json.1234", "clock.json.1234"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := len(listed(t, dir))
	if err := atomicfile.Clean(path); err != nil {
		t.Fatal(err)
	}
	if left := listed(t, dir); len(left) != before-1 {
		t.Errorf("of %d files there are left %q", before, left)
	}
	if _, err := os.Stat(filepath.Join(dir, ".clock.json.1234")); !os.IsNotExist(err) {
		t.Errorf("what was left is still there (%v)", err)
	}
}
