package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The names that a set needs in its folder beside those of its files. They are laid out as Kubernetes' atomic writer lays out a volume, which
// many programs know how to watch:
//
//	..data            → ..version-123
//	..version-123/    key.pem, cert-chain.pem
//	key.pem           → ..data/key.pem
//	cert-chain.pem    → ..data/cert-chain.pem
const (
	current = "..data"
	version = "..version-" // digits follow
	next    = "..next"     // a link that has not got its name yet
)

// WriteSet makes files (name to contents, mode 0600) the set in the folder dir, which is made if need be, and returns once they are on disk.
// All of them change at one instant, and no crash leaves some of the old with some of the new. The contents before are removed.
//
// Whoever follows ..data once and reads there sees one version; so does ReadSet. Whoever opens one name after the other sees two versions
// only if the change comes between the two, and one version when it reads again.
//
// Files of these names that are no set, such as those of another program, are taken over: they become one as they are, and then change at
// one instant too. What a crash left behind is removed. Writers of one folder take turns.
func WriteSet(dir string, files map[string][]byte) error { return WriteSetFor(Private, dir, files) }

// Access is who may read the files of a set.
type Access struct {
	Mode  fs.FileMode // of the files; who may read them may enter their folders
	Group int         // whose they are; -1: the process's own
}

// Private lets nobody read but the process's own user.
var Private = Access{Mode: 0o600, Group: -1}

// folder is the mode of folders.
func (a Access) folder() fs.FileMode { return 0o700 | a.Mode&0o055 | a.Mode&0o044>>2 }

// grant gives a file or folder, which is this user's, its mode and group.
func (a Access) grant(file *os.File, mode fs.FileMode) error {
	if a == Private {
		return nil
	}
	if a.Group >= 0 {
		if err := file.Chown(-1, a.Group); err != nil {
			return err
		}
	}
	return file.Chmod(mode) // after chown, which may drop bits
}

// admit lets those who may read the files enter the folder that they are in, which may be somebody else's.
func (a Access) admit(dir *os.File) error {
	var before unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &before); err != nil || a == Private {
		return err
	}
	mode := fs.FileMode(before.Mode) & fs.ModePerm
	if mode&a.folder() == a.folder() && (a.Group < 0 || int(before.Gid) == a.Group || mode&0o005 == 0o005) {
		return nil
	}
	return a.grant(dir, mode|a.folder())
}

// Blocked finds the folder on the way to dir, or dir itself, that those whom access admits may not enter, as far as modes say. "": there is none.
func (a Access) Blocked(dir string) string {
	everybody, group := a.Mode&0o006 != 0, a.Group
	if !everybody && a.Mode&0o060 == 0 {
		return "" // the process's own user
	}
	if group < 0 {
		group = os.Getegid()
	}
	at, err := filepath.Abs(dir)
	for err == nil {
		var info unix.Stat_t
		if unix.Stat(at, &info) != nil {
			break
		}
		if info.Mode&0o001 == 0 && (everybody || info.Mode&0o010 == 0 || int(info.Gid) != group) {
			return at
		}
		if at == filepath.Dir(at) {
			break
		}
		at = filepath.Dir(at)
	}
	return ""
}

// WriteSetFor is WriteSet with files that others may read.
func WriteSetFor(access Access, dir string, files map[string][]byte) (err error) {
	makeFolder := MakeFolder
	if access != Private {
		makeFolder = MakeFolderToPass
	}
	if err := makeFolder(dir); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing to the folder %s: %w", dir, err)
		}
	}()
	folder, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer folder.Close() // ends the lock
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("waiting for its other writers: flock: %w", err)
	}
	if err := access.admit(folder); err != nil {
		return fmt.Errorf("letting others in: %w", err)
	}
	s := &set{dir: dir, folder: folder, files: files, access: access}
	if err := s.clean(); err != nil {
		return err
	}
	if err := s.takeOver(); err != nil {
		return err
	}
	if err := s.show(files); err != nil {
		return err
	}
	if err := s.clean(); err != nil {
		return fmt.Errorf("the new files are in their place, but what was there before is not removed: %w", err)
	}
	return nil
}

// ReadSet reads files of one version of a set. Files that are no set are read one after the other.
func ReadSet(dir string, names ...string) (map[string][]byte, error) {
	now := func() string {
		target, err := os.Readlink(filepath.Join(dir, current))
		if err != nil {
			return "" // no set, or none that can be read: then neither can its files
		}
		return target
	}
	for {
		before, files := now(), map[string][]byte{}
		var err error
		for _, name := range names {
			if files[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
				break
			}
		}
		switch {
		case now() != before: // a change came in between
		case err != nil:
			return nil, err
		default:
			return files, nil
		}
	}
}

// set is a set while it is written.
type set struct {
	dir    string
	folder *os.File          // dir
	files  map[string][]byte // what it shall be
	access Access
}

func (s *set) path(name string) string { return filepath.Join(s.dir, name) }

// clean removes every version but the current one, and what a crash left. Only what is on disk says which version that is.
func (s *set) clean() error {
	if err := s.folder.Sync(); err != nil {
		return err
	}
	now, err := os.Readlink(s.path(current))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if name := entry.Name(); name != now && s.leftover(name) {
			if err := os.RemoveAll(s.path(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// leftover says whether name may be something that a crash, or a version before, left behind.
func (s *set) leftover(name string) bool {
	if name == next || strings.HasPrefix(name, version) {
		return true
	}
	for file := range s.files {
		if isTemporary(name, file) { // by Write, with which earlier versions of this program wrote one after the other
			return true
		}
	}
	return false
}

// takeOver makes every name a link into the current version, without a change to what is seen under it. What stands there and is no such link
// becomes a version first, together with what is seen under the other names.
func (s *set) takeOver() error {
	var unlinked []string
	seen, foreign := map[string][]byte{}, false
	for name := range s.files {
		target, err := os.Readlink(s.path(name))
		linked := err == nil && target == link(name)
		if !linked {
			unlinked = append(unlinked, name)
		}
		data, err := os.ReadFile(s.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("taking over what is there: %w", err)
		}
		seen[name] = data
		foreign = foreign || !linked
	}
	if foreign {
		if err := s.show(seen); err != nil {
			return fmt.Errorf("taking over what is there: %w", err)
		}
	}
	for _, name := range unlinked {
		if err := s.point(name, link(name)); err != nil {
			return err
		}
	}
	return nil
}

// link is where the name of a file leads.
func link(name string) string { return filepath.Join(current, name) }

// show makes a version of files, and makes it the current one.
func (s *set) show(files map[string][]byte) error {
	dir, err := os.MkdirTemp(s.dir, version+"*") // mode 0700
	if err != nil {
		return err
	}
	if err := s.fillFolder(dir, files); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	if err := s.folder.Sync(); err != nil { // the version and the links are there before anybody is led to them
		return errors.Join(err, os.RemoveAll(dir))
	}
	if err := s.point(current, filepath.Base(dir)); err != nil {
		return err
	}
	return s.folder.Sync()
}

// fillFolder writes the files of a version. Their readers may be the folder's owner, and may have put a link in the version's place: none leads out of the folder.
func (s *set) fillFolder(dir string, files map[string][]byte) error {
	all, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer all.Close()
	one, err := all.OpenRoot(filepath.Base(dir))
	if err != nil {
		return err
	}
	defer one.Close()
	for name, data := range files {
		file, err := one.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := s.access.grant(file, s.access.Mode); err != nil {
			return errors.Join(err, file.Close())
		}
		if err := fill(file, data); err != nil {
			return err
		}
	}
	itself, err := one.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(s.access.grant(itself, s.access.folder()), itself.Sync(), itself.Close())
}

// point makes name a link to target, whatever it was before.
func (s *set) point(name, target string) error {
	if err := os.Symlink(target, s.path(next)); err != nil {
		return err
	}
	return os.Rename(s.path(next), s.path(name))
}
