package hsm

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// latch remembers over restarts that a token refused a PIN. It is keyed by the token and by the state of the PIN's source, never by the PIN: once somebody writes the file
// anew it opens. An environment variable says nothing of its state, so there the latch is a file to delete.
type latch struct {
	dir  string // "": for the life of this process only
	path string
	held *sourceIdentity
}

func newLatch(dir string, u URI) *latch {
	l := &latch{dir: dir}
	if dir != "" {
		name := sha256.Sum256([]byte(u.ModulePath + "\x00" + u.Token + "\x00" + u.Serial))
		l.path = filepath.Join(dir, fmt.Sprintf("wrong-pin-%x.json", name[:8]))
	}
	return l
}

// closed says whether the source is in the state in which its PIN was refused.
func (l *latch) closed(source sourceIdentity) (bool, error) {
	if l.held == nil && l.path != "" {
		text, err := os.ReadFile(l.path)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("reading whether the token has refused the PIN before: %w", err)
		}
		var held sourceIdentity
		if err := json.Unmarshal(text, &held); err != nil {
			return false, fmt.Errorf("reading %s, which says whether the token has refused the PIN before: %w; delete it once the PIN is right", l.path, err)
		}
		l.held = &held
	}
	return l.held != nil && l.held.equal(source), nil
}

// close remembers the state of the source whose PIN was refused.
func (l *latch) close(source sourceIdentity) error {
	l.held = &source
	if l.path == "" {
		return nil
	}
	text, err := json.Marshal(source)
	if err == nil {
		if err = os.MkdirAll(l.dir, 0o700); err == nil {
			err = os.WriteFile(l.path, text, 0o600)
		}
	}
	if err != nil {
		return fmt.Errorf("remembering that the token refused the PIN: a restart would try it once more: %w", err)
	}
	return nil
}

// open forgets it: a PIN was taken.
func (l *latch) open() error {
	l.held = nil
	if l.path == "" {
		return nil
	}
	if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mend says what to do about a closed one.
func (l *latch) mend(source sourceIdentity) string {
	if source.Inode != 0 || l.path == "" {
		return "write the right PIN into it (the same one, once the token is unlocked)"
	}
	return "set the right PIN and delete " + l.path
}
