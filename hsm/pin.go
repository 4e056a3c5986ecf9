package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// maxPIN is the longest PIN in octets.
const maxPIN = 1024

// readPIN reads a PIN from an open source: what stands there without the line feed at its end. No error has anything of it in it.
func readPIN(r io.Reader) ([]byte, error) {
	pin := make([]byte, maxPIN+3)
	n, err := io.ReadFull(r, pin)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(pin)
		return nil, err
	}
	line := bytes.TrimSuffix(bytes.TrimSuffix(pin[:n], []byte("\n")), []byte("\r"))
	switch {
	case len(line) == 0:
		err = errors.New("it is empty")
	case len(line) > maxPIN:
		err = fmt.Errorf("it has more than %d octets", maxPIN)
	case bytes.ContainsAny(line, "\x00\n"):
		err = errors.New("it has more than one line, or a zero byte")
	default:
		return line, nil
	}
	clear(pin)
	return nil, err
}

// openPINFile opens a PIN's file, and says which state of it that is.
func openPINFile(path string) (*os.File, sourceIdentity, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, sourceIdentity{}, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a plain file", path)
	}
	if err != nil {
		file.Close()
		return nil, sourceIdentity{}, err
	}
	return file, identify(path, info), nil
}

func identify(path string, info os.FileInfo) sourceIdentity {
	id := sourceIdentity{Source: "file:" + path, Modified: info.ModTime().UTC()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		id.Device, id.Inode = uint64(stat.Dev), stat.Ino
	}
	return id
}

// identity says which state the source is in now.
func (s PINSource) identity() (sourceIdentity, error) {
	if s.Variable != "" {
		return sourceIdentity{Source: s.String()}, nil // a process's environment does not change
	}
	info, err := os.Stat(s.File)
	if err != nil {
		return sourceIdentity{}, err
	}
	return identify(s.File, info), nil
}
