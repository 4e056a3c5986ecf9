package file

import (
	"bytes"
	"fmt"

	"kedge/ca"
)

// passphrase says where the passphrase of key files is. It is read anew for every key and wiped after it, so that it is in
// memory only for moments and may be changed without a restart.
type passphrase struct {
	path string // "": keys are not encrypted
	text []byte // what is in the file, where it was read together with what it opens
}

// CheckPassphraseFile says whether OpenRoot and OpenKeyStore can have a passphrase from the file.
func CheckPassphraseFile(path string) error {
	phrase, err := passphrase{path: path}.read()
	clear(phrase)
	return err
}

// read returns the passphrase; the caller wipes it. The file holds one line, whose end is not part of the passphrase
// (as for openssl's -passin file:). The group may read it, because Kubernetes gives a mounted secret to the pod's fsGroup so.
func (p passphrase) read() ([]byte, error) {
	if p.text != nil {
		return bytes.Clone(p.text), nil
	}
	text, err := read(p.path, 0o037, mountedMode(p.path))
	if err != nil {
		return nil, fmt.Errorf("the passphrase file: %w", err)
	}
	line := bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
	switch {
	case len(line) == 0:
		return nil, bad(p.path, ca.Incomplete, "the passphrase file %s is empty: write one line with the passphrase into it, or configure none", p.path)
	case bytes.ContainsAny(line, "\n\x00"):
		clear(text)
		return nil, bad(p.path, ca.Unreadable, "the passphrase file %s has more than one line, or a NUL: write one line of text into it", p.path)
	}
	return line, nil
}
