package file

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// mounted is a few files that somebody else writes: a Secret or a ConfigMap that Kubernetes mounts, or what an admin put there.
type mounted struct {
	dir        string
	names      []string
	secrets    []string // those of them that only their owner and group may read
	passphrase passphrase
}

// contents are files of one moment, by name. One that is not there is not in it.
type contents map[string][]byte

// current is what Kubernetes exchanges to change all files of a volume at once: a link to the folder in which they are (AtomicWriter).
const current = "..data"

// passphraseEntry is the passphrase among the contents, under a name that no file has: when it changes, a key that could not be opened may be.
const passphraseEntry = "/passphrase"

// read returns the files as they are together: when they are exchanged meanwhile, it begins anew. Whoever gets the contents wipes them.
func (m mounted) read() (contents, error) {
	for range 10 {
		before := m.link()
		files, err := m.readOnce()
		if m.link() == before {
			return files, err
		}
		files.wipe()
	}
	return nil, fmt.Errorf("the files in %s are exchanged again and again while they are read: find out what does that", m.dir)
}

// link names the folder in which the files are, if that is how they are mounted.
func (m mounted) link() string {
	target, err := os.Readlink(filepath.Join(m.dir, current))
	if err != nil {
		return "" // plain files
	}
	return target
}

func (m mounted) readOnce() (contents, error) {
	files := contents{}
	for _, name := range m.names {
		path, forbidden := filepath.Join(m.dir, name), fs.FileMode(0)
		if slices.Contains(m.secrets, name) {
			forbidden = 0o037
		}
		text, err := read(path, forbidden, mountedMode(path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			files.wipe()
			return nil, err
		}
		files[name] = text
	}
	if m.passphrase.path != "" {
		phrase, err := m.passphrase.read()
		if err != nil {
			files.wipe()
			return nil, err
		}
		files[passphraseEntry] = phrase
	}
	return files, nil
}

// sum tells contents apart.
func (c contents) sum() [sha256.Size]byte {
	h := sha256.New()
	names := make([]string, 0, len(c))
	for name := range c {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(h, "%s %d\n", name, len(c[name]))
		h.Write(c[name])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (c contents) wipe() {
	for _, text := range c {
		clear(text)
	}
}
