package process

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Mount puts files into a folder as the kubelet mounts a Secret, of mode 0640 as with an fsGroup: all of them at once, in a new folder and a link to it that takes the place of the
// one before. Those of before are gone.
func Mount[Text string | []byte](t testing.TB, dir string, files map[string]Text) {
	t.Helper()
	version, err := os.MkdirTemp(dir, "..")
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "..data")
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(version, name), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(filepath.Base(version), link+"_tmp"), os.Rename(link+"_tmp", link)); err != nil {
		t.Fatal(err)
	}
}
