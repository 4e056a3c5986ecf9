package file

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// maxFile is the largest file that is read, in octets: as large as a whole Secret of Kubernetes may be. An encrypted RSA-4096 key has about 3,400.
const maxFile = 1 << 20

// temporary matches the names that atomicfile gives to files while it writes them. One that is found at start was left by a crash.
const temporary = ".*.pem.*"

// prepareFolder makes the folder if need be, makes sure that nobody else may put files into it, and removes what a crash left. What is there then is
// on disk, also if whoever put it there was killed too soon: nothing is built on what a power cut would take.
func prepareFolder(dir string) error {
	if err := atomicfile.MakeFolder(dir); err != nil {
		return fmt.Errorf("a folder for keys: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at the folder %s for keys: %w", dir, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is meant to be a folder for keys and is a file: name another folder, or move the file away", dir)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("the folder %s holds keys and others may write to it (mode %#o): run 'chmod 700 %s'", dir, info.Mode().Perm(), dir)
	}
	left, err := filepath.Glob(filepath.Join(escapeGlob(dir), temporary))
	if err != nil {
		return fmt.Errorf("looking for what a crash may have left in %s: %w", dir, err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("removing %s, which a crash left: %w", path, err)
		}
	}
	return atomicfile.SyncFolder(dir)
}

// escapeGlob makes a path that filepath.Glob takes literally.
func escapeGlob(path string) string {
	escaped := make([]byte, 0, len(path))
	for i := range len(path) {
		switch path[i] {
		case '*', '?', '[', '\\':
			escaped = append(escaped, '\\')
		}
		escaped = append(escaped, path[i])
	}
	return string(escaped)
}

// read returns a file whose mode has none of the bits of forbidden; otherwise mend tells the admin what to do.
func read(path string, forbidden fs.FileMode, mend string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, bad(path, ca.Incomplete, "reading %s: %w", path, err)
		}
		return nil, bad(path, ca.Unreadable, "reading %s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, bad(path, ca.Unreadable, "reading %s: %w", path, err)
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, bad(path, ca.Unreadable, "reading %s: it is not a regular file", path)
	case info.Mode().Perm()&forbidden != 0:
		return nil, bad(path, ca.Exposed, "%s is a secret and others may get at it (mode %#o): find out who had it, then %s",
			path, info.Mode().Perm(), mend)
	case info.Size() > maxFile:
		return nil, bad(path, ca.Unreadable, "reading %s: it has %d octets, more than the %d that are read: it cannot be what it should be", path, info.Size(), maxFile)
	}
	data := make([]byte, info.Size())
	if _, err := io.ReadFull(f, data); err != nil {
		clear(data)
		return nil, bad(path, ca.Unreadable, "reading %s: %w", path, err)
	}
	return data, nil
}

// inFolder tells a file that is not there from a folder that is not there, as one that is not mounted is: what that holds nobody knows, and the error does not wrap fs.ErrNotExist.
func inFolder(dir string, err error) error {
	if _, gone := os.Stat(dir); errors.Is(err, fs.ErrNotExist) && gone != nil {
		return fmt.Errorf("the folder %s is away, with all keys that are in it: mount it, or put it back (%v)", dir, gone)
	}
	return err
}

// chmod is what to do about a mode.
func chmod(path string) string { return fmt.Sprintf("run 'chmod 600 %s'", path) }

// mountedMode is what to do about the mode of a secret that Kubernetes may have mounted.
func mountedMode(path string) string {
	return fmt.Sprintf("give its volume defaultMode 0400, or 0440 and the pod an fsGroup; outside Kubernetes run 'chmod 600 %s'", path)
}

// exists says whether there is a file of that name.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking for %s: %w", path, err)
	}
	return true, nil
}
