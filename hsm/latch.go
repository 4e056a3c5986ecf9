package hsm

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// latch remembers over restarts how the last login to a token ended, so that a PIN that the token counted as a wrong one, or may have, is not tried again until somebody writes its source
// anew. It is keyed by what the token says of itself and by the state of the PIN's source, never by the PIN. An environment variable says nothing of its state, so there the latch is a
// file to delete.
type latch struct {
	dir  string // "": for the life of this process only
	path string // "" until the token has said which one it is
	last attempt
	// unsaved: last could not be written, so that the file says less.
	unsaved bool
}

// attempt is a login.
type attempt struct {
	Source  sourceIdentity
	Outcome outcome
}

type outcome string

const (
	pinTaken   outcome = "taken"
	pinRefused outcome = "refused"
	pinLocked  outcome = "locked"  // the token takes none any more
	pinUnknown outcome = "unknown" // the child has not answered, or this program was stopped before: the token may have counted it
	// pinDoubtful is pinUnknown twice. Tokens lock themselves after three wrong ones or more.
	pinDoubtful outcome = "unknown twice"
)

// of says which token it is, by what that says of itself: another URI may name the same one.
func (l *latch) of(token Info) {
	if l.dir != "" {
		name := sha256.Sum256([]byte(strings.Join([]string{token.Manufacturer, token.Model, token.Serial, token.Label}, "\x00")))
		l.path = filepath.Join(l.dir, fmt.Sprintf("pin-%x.json", name[:8]))
	}
}

// read reads what is remembered. Somebody else may have logged in meanwhile, or opened the latch.
func (l *latch) read() error {
	if l.path == "" || l.unsaved {
		return nil
	}
	var last attempt
	text, err := os.ReadFile(l.path)
	if err == nil {
		err = json.Unmarshal(text, &last)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading %s, which says whether the token has refused the PIN before: %w; delete it once the PIN is right", l.path, err)
	}
	l.last = last
	return nil
}

// closed says why the PIN must not be tried while its source is as it is; nil: it may be.
func (l *latch) closed(source sourceIdentity) error {
	if err := l.read(); err != nil {
		return err
	}
	if !l.last.Source.equal(source) {
		return nil
	}
	switch l.last.Outcome {
	case pinRefused:
		return fmt.Errorf("%w in %s before, and a token locks itself after a few wrong ones, so it is not tried again: %s", ErrWrongPIN, source.Source, l.mend(source))
	case pinLocked:
		return fmt.Errorf("the token had locked its PIN when the one in %s was tried, so it is not tried again: unlock the token and then %s", source.Source, l.mend(source))
	case pinDoubtful:
		return fmt.Errorf("the child that the module lives in did not come back from its first two logins with the PIN in %s. The token may have counted wrong ones, so it is not tried again: %s",
			source.Source, l.mend(source))
	}
	return nil
}

// begin remembers that a login has begun with a PIN that the token has not taken yet.
func (l *latch) begin(source sourceIdentity) error {
	if l.last.Source.equal(source) && l.last.Outcome == pinUnknown {
		return l.keep(attempt{source, pinDoubtful})
	}
	return l.keep(attempt{source, pinUnknown})
}

// taken says whether the token took the PIN while its source was as it is.
func (l *latch) taken(source sourceIdentity) bool {
	return l.last.Source.equal(source) && l.last.Outcome == pinTaken
}

// keep remembers a login.
func (l *latch) keep(a attempt) error {
	if l.last.Source.equal(a.Source) && l.last.Outcome == a.Outcome && !l.unsaved {
		return nil
	}
	l.last = a
	if l.path == "" {
		return nil
	}
	text, err := json.Marshal(a)
	if err == nil {
		if err = os.MkdirAll(l.dir, 0o700); err == nil {
			err = inherit(l.dir)
		}
	}
	if err == nil {
		err = replace(l.path, text)
	}
	l.unsaved = err != nil
	return err
}

// replace puts a file in the place of another, so that a crash leaves one of the two.
func replace(path string, text []byte) error {
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err = errors.Join(err, inherit(path+".new"), file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// inherit gives a file or a folder to whom the folder that it is in belongs: what an admin writes as root into the data folder of a CA, that CA reads.
func inherit(path string) error {
	info, err := os.Stat(filepath.Dir(path))
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t)
	return os.Chown(path, int(owner.Uid), int(owner.Gid))
}

// forget is for a login that the token did not come to judge.
func (l *latch) forget() error {
	l.last = attempt{}
	if l.path == "" {
		return nil
	}
	err := os.Remove(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	l.unsaved = err != nil
	return err
}

// mend says what opens a closed one.
func (l *latch) mend(source sourceIdentity) string {
	switch {
	case source.Inode != 0:
		return "write the right PIN into it (the same one when it is right: a new file is what counts)"
	case l.path == "":
		return "set the right PIN and start the program again"
	}
	return "set the right PIN and delete " + l.path
}
