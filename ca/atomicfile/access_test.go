package atomicfile

import (
	"os"
	"path/filepath"
	"testing"
)

// TestNothingElseIsOpenedToOthers: the folder may be the user's who reads the files, and a link in the place of what is given away leads to what is not his.
func TestNothingElseIsOpenedToOthers(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(elsewhere, 0o700); err != nil {
		t.Fatal(err)
	}
	planted := filepath.Join(dir, version+"1")
	if err := os.Symlink(elsewhere, planted); err != nil {
		t.Fatal(err)
	}
	s := &set{dir: dir, access: Access{Mode: 0o644, Group: os.Getgid()}}
	if err := s.fillFolder(planted, map[string][]byte{"key.pem": []byte("secret")}); err == nil {
		t.Error("what a link leads to is taken for a new folder")
	}
	if info, err := os.Stat(elsewhere); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("others may enter what is not theirs: %v (%v)", info.Mode(), err)
	}
	if entries, err := os.ReadDir(elsewhere); err != nil || len(entries) > 0 {
		t.Errorf("there are files where none belong: %v (%v)", entries, err)
	}
}
