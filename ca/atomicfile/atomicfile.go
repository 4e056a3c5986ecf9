// Package atomicfile writes files so that readers see the old contents or the new, and never a part: Write a single file, WriteSet several that
// belong together.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Write puts data at path, mode 0600, and returns once it is on disk.
func Write(path string, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", path, err)
		}
	}()
	file, err := os.CreateTemp(filepath.Dir(path), temporary(filepath.Base(path))+"*") // mode 0600
	if err != nil {
		return err
	}
	if err = fill(file, data); err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncFolder(filepath.Dir(path))
}

// temporary is how the name of a file begins while it is written; digits follow.
func temporary(name string) string { return "." + name + "." }

// isTemporary says whether entry is the name of a file that became name only if nothing went wrong.
func isTemporary(entry, name string) bool {
	digits, found := strings.CutPrefix(entry, temporary(name))
	return found && digits != "" && strings.Trim(digits, "0123456789") == ""
}

// fill writes the contents of a new file, and returns once they are on disk.
func fill(file *os.File, data []byte) error {
	_, err := file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// syncFolder makes the names in a folder durable.
func syncFolder(dir string) error {
	folder, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// MakeFolder makes a folder, mode 0700, and those above it, unless they are there. It returns once they are on disk.
func MakeFolder(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case err == nil && !info.IsDir():
		return fmt.Errorf("making the folder %s: there is a file of that name: remove it, or name another folder", dir)
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("making the folder %s: %w", dir, err)
	}
	above := filepath.Dir(filepath.Clean(dir))
	if err := MakeFolder(above); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) { // somebody else may make it too
		return fmt.Errorf("making the folder %s: %w", dir, err)
	}
	if err := syncFolder(above); err != nil {
		return fmt.Errorf("flushing the folder %s to disk: %w", above, err)
	}
	return nil
}
