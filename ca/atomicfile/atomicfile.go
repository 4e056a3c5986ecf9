// Package atomicfile writes a file so that readers see the old contents or the new, and never a part. What it has made is durable.
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
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	if _, err = file.Write(data); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return SyncFolder(filepath.Dir(path))
}

// Clean removes what a Write to path left behind whose process was killed. Nobody may be writing there.
func Clean(path string) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for what a crash may have left: %w", err)
	}
	for _, entry := range entries {
		digits, ours := strings.CutPrefix(entry.Name(), "."+filepath.Base(path)+".")
		if !ours || digits == "" || strings.Trim(digits, "0123456789") != "" {
			continue
		}
		if err := os.Remove(filepath.Join(filepath.Dir(path), entry.Name())); err != nil {
			return fmt.Errorf("removing what a crash left: %w", err)
		}
	}
	return nil
}

// MakeFolder makes a folder, mode 0700, and those above it that are missing. Its name is on disk when it returns, also when the folder was there: whoever made it
// may have been killed too soon, and a power cut takes with a name all that is below it.
func MakeFolder(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MakeFolder(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making the folder %s: %w", dir, err)
	}
	err = SyncFolder(filepath.Dir(dir))
	if errors.Is(err, fs.ErrPermission) { // a parent that may not be read is somebody else's, and so is the folder's name
		return nil
	}
	return err
}

// SyncFolder returns once the names in a folder are on disk.
func SyncFolder(dir string) error {
	f, err := os.Open(dir)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err != nil {
		return fmt.Errorf("flushing the folder %s to disk: %w", dir, err)
	}
	return nil
}
