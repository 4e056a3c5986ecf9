// Package atomicfile writes files so that readers see the old contents or the new, and never a part: Write a single file, WriteSet several that
// belong together. What it has made is durable.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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
	return SyncFolder(filepath.Dir(path))
}

// temporary is how the name of a file begins while it is written; digits follow.
func temporary(name string) string { return "." + name + "." }

// isTemporary says whether entry is the name of a file that became name only if nothing went wrong.
func isTemporary(entry, name string) bool {
	digits, found := strings.CutPrefix(entry, temporary(name))
	return found && digits != "" && strings.Trim(digits, "0123456789") == ""
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
		if !isTemporary(entry.Name(), filepath.Base(path)) {
			continue
		}
		if err := os.Remove(filepath.Join(filepath.Dir(path), entry.Name())); err != nil {
			return fmt.Errorf("removing what a crash left: %w", err)
		}
	}
	return nil
}

// fill writes the contents of a new file, and returns once they are on disk.
func fill(file *os.File, data []byte) error {
	_, err := file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// MakeFolder makes a folder, mode 0700, and those above it, unless they are there. Its name is on disk when it returns, also when it was there: whoever made it may
// have been killed too soon, and a power cut takes with a name all that is below it.
func MakeFolder(dir string) error { return makeFolder(dir, 0o700, 0o700) }

// MakeFolderToPass is MakeFolder for a folder that others may get to, or its neighbours: the folders above it that are made let everybody pass, mode 0711.
func MakeFolderToPass(dir string) error { return makeFolder(dir, 0o700, 0o711) }

// makeFolder makes a folder of a mode, and those above it of another one.
func makeFolder(dir string, mode, modeAbove fs.FileMode) error {
	above := filepath.Dir(filepath.Clean(dir))
	info, err := os.Stat(dir)
	switch {
	case err == nil && !info.IsDir():
		return fmt.Errorf("making the folder %s: there is a file of that name: remove it, or name another folder", dir)
	case errors.Is(err, fs.ErrNotExist):
		if err := makeFolder(above, modeAbove, modeAbove); err != nil {
			return err
		}
		err := os.Mkdir(dir, 0o700)
		if errors.Is(err, fs.ErrExist) { // somebody else may make it too
			break
		}
		if err == nil && mode != 0o700 {
			err = chmodFolder(dir, mode)
		}
		if err != nil {
			return fmt.Errorf("making the folder %s: %w", dir, err)
		}
	case err != nil:
		return fmt.Errorf("making the folder %s: %w", dir, err)
	}
	err = SyncFolder(above)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EINVAL) { // it is somebody else's, as its names are; or of a file system that cannot do so
		return nil
	}
	return err
}

// chmodFolder gives a folder a mode, whatever the umask is, and not what a link in its place leads to.
func chmodFolder(dir string, mode fs.FileMode) error {
	folder, err := os.OpenFile(dir, syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return errors.Join(folder.Chmod(mode), folder.Close())
}

// SyncFolder returns once the names in a folder are on disk.
func SyncFolder(dir string) error {
	folder, err := os.Open(dir)
	if err == nil {
		err = errors.Join(folder.Sync(), folder.Close())
	}
	if err != nil {
		return fmt.Errorf("flushing the folder %s to disk: %w", dir, err)
	}
	return nil
}
