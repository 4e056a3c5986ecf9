package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// newFile makes a file that only its owner may read (0600). It gets its name once fill has filled it and it is on disk; when something fails there is
// none. Nothing is overwritten: a name that is taken is refused before fill is called, and once more when it was taken meanwhile.
func newFile(path string, fill func(*os.File) error) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s is there already, and nothing is overwritten: name another file", path)
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("making the file %s: %w", path, err)
	}
	if err = fill(file); err == nil {
		if err = file.Sync(); err != nil {
			err = fmt.Errorf("writing %s: %w", path, err)
		}
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = renameOnly(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// renameOnly renames a file unless the new name is taken. Not every file system has that, or else hard links.
func renameOnly(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if err = os.Link(from, to); err == nil {
			return os.Remove(from)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there by now, and nothing is overwritten: %w", to, err)
	}
	return err
}
