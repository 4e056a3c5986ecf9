package vault

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// maxSecret is the size of the largest file with a token, a secret id or a key, in octets.
const maxSecret = 64 << 10

// Secret says where a secret is: in a file or in an environment variable, one of the two. It is read anew for every login, so that it may be
// changed without a restart, and holds one line.
type Secret struct {
	File string // which others may not read or write
	Env  string // the variable's name
}

// check says whether the secret's place is named, without looking there.
func (s Secret) check() error {
	if (s.File == "") == (s.Env == "") {
		return errors.New("name either its file or its environment variable")
	}
	return nil
}

// String says where the secret is, not what it is.
func (s Secret) String() string {
	if s.Env != "" {
		return "the environment variable " + s.Env
	}
	return s.File
}

// read returns the secret.
func (s Secret) read() (string, error) {
	if s.Env != "" {
		text, found := os.LookupEnv(s.Env)
		if !found {
			return "", fmt.Errorf("%s is not set: set it to the secret, or configure a file", s)
		}
		return oneLine(s, text)
	}
	text, err := readFile(s.File, 0o037)
	if err != nil {
		return "", err
	}
	return oneLine(s, string(text))
}

// version tells a secret from the ones that were in its place before, and a file from one that was written anew. It is the zero value when there is none.
func (s Secret) version() (version [sha256.Size]byte) {
	text, err := s.read()
	if err != nil {
		return version
	}
	var written time.Time
	if info, err := os.Stat(s.File); err == nil {
		written = info.ModTime()
	}
	return sha256.Sum256([]byte(text + " " + written.String()))
}

// oneLine takes the white space around a secret away. What is left must be able to stand in an HTTP header.
func oneLine(s fmt.Stringer, text string) (string, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return "", fmt.Errorf("%s is empty: it holds one line with the secret", s)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s holds more than one line, or characters that no token or id has: it holds one line with the secret", s)
	}
	return text, nil
}

// readFile returns a file whose mode has none of the bits of forbidden.
func readFile(path string, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading %s: it is not a regular file", path)
	}
	if info.Mode().Perm()&forbidden != 0 {
		return nil, fmt.Errorf("%s is a secret and others may get at it (mode %#o): find out who had it, then run 'chmod 600 %s'", path, info.Mode().Perm(), path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(text) > maxSecret {
		return nil, fmt.Errorf("reading %s: it has more than the %d octets that are read: it cannot be what it should be", path, maxSecret)
	}
	return text, nil
}
