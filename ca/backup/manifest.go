package backup

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"

	"kedge/ca/ledger"
)

// The files of a data folder that are in a backup, and the folders whose files are.
const (
	ledgerFile = "ledger.db"
	formatFile = "format.json"
	clockFile  = "clock.json"
	rootFolder = "root"
	keysFolder = "keys"
)

const (
	manifestFile = "manifest.json"
	// formatVersion rises when a program of before could no longer read the file.
	formatVersion = 1
	maxManifest   = 4 << 20 // octets
	maxFiles      = 10000
	maxSmall      = 1 << 20 // octets of a file other than the ledger
)

// Manifest says what is in a backup.
type Manifest struct {
	Format      int         `json:"format"`
	Version     string      `json:"version"` // of the program that made it
	Taken       ledger.Time `json:"taken"`
	TrustDomain string      `json:"trust_domain"`
	Ledger      ledger.Head `json:"ledger"` // where its log stands
	Files       []File      `json:"files"`  // in the order in which they follow
}

// File is one file of a backup.
type File struct {
	Name   string      `json:"name"` // in the data folder, with a slash
	Size   int64       `json:"size"` // octets
	SHA256 ledger.Hash `json:"sha256"`
	Clear  bool        `json:"clear_key,omitempty"` // it holds a key that is not encrypted
}

// ClearKeys counts the keys that everybody can use who can read the file.
func (m Manifest) ClearKeys() (count int) {
	for _, file := range m.Files {
		if file.Clear {
			count++
		}
	}
	return count
}

// fileName is what a file in a backup may be called: no name leads out of the folder that it is unpacked to.
var fileName = regexp.MustCompile(`^(ledger\.db|format\.json|clock\.json|(root|keys)/[A-Za-z0-9][A-Za-z0-9._-]*)$`)

func (m Manifest) check() error {
	if m.Format < 1 || m.Format > formatVersion {
		return fmt.Errorf("it has format %d, made by kedge %s, and this version reads up to %d: use a later one", m.Format, m.Version, formatVersion)
	}
	seen := map[string]bool{}
	for _, file := range m.Files {
		switch {
		case !fileName.MatchString(file.Name) || seen[file.Name]:
			return fmt.Errorf("its manifest names the file %.100q, which no backup has, or has once", file.Name)
		case file.Size < 0 || file.Name != ledgerFile && file.Size > maxSmall:
			return fmt.Errorf("its manifest says that %s has %d octets", file.Name, file.Size)
		}
		seen[file.Name] = true
	}
	if !seen[ledgerFile] || !seen[formatFile] || len(m.Files) > maxFiles {
		return fmt.Errorf("its manifest names %d files: a backup has %s and %s, and at most %d files", len(m.Files), ledgerFile, formatFile, maxFiles)
	}
	return nil
}

// write writes a backup; open gives the content of a file.
func write(w io.Writer, m Manifest, open func(File) io.Reader) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	entry := func(name string, size int64, content io.Reader) error {
		err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: m.Taken.Time()})
		if err == nil {
			_, err = io.Copy(archive, content)
		}
		if err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
		return nil
	}
	if err := entry(manifestFile, int64(len(text)), bytes.NewReader(text)); err != nil {
		return err
	}
	for _, file := range m.Files {
		if err := entry(file.Name, file.Size, open(file)); err != nil {
			return err
		}
	}
	return archive.Close()
}

// Read goes through a backup and verifies that it is whole: the manifest, and every file against it. create says where a file goes; a nil
// create is for who only wants to know. An error says that the backup is not to be used, whatever create got before.
func Read(r io.Reader, create func(File) (io.WriteCloser, error)) (m Manifest, err error) {
	archive := tar.NewReader(r)
	header, err := archive.Next()
	if err != nil || header.Name != manifestFile {
		return m, errors.Join(errors.New("it is not a backup of Kedge: it does not begin with a manifest"), err)
	}
	text, err := io.ReadAll(io.LimitReader(archive, maxManifest))
	if err != nil {
		return m, fmt.Errorf("reading its manifest: %w", err)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("reading its manifest: %w", err)
	}
	if err := m.check(); err != nil {
		return m, err
	}
	for _, file := range m.Files {
		if err := readFile(archive, file, create); err != nil {
			return m, fmt.Errorf("reading %s: %w", file.Name, err)
		}
	}
	if _, err := archive.Next(); !errors.Is(err, io.EOF) {
		return m, errors.Join(errors.New("something follows that its manifest does not name"), err)
	}
	return m, nil
}

func readFile(archive *tar.Reader, file File, create func(File) (io.WriteCloser, error)) error {
	header, err := archive.Next()
	if errors.Is(err, io.EOF) {
		return errors.New("it is not there: the backup is cut short")
	}
	if err != nil {
		return err
	}
	if header.Name != file.Name || header.Typeflag != tar.TypeReg || header.Size != file.Size {
		return fmt.Errorf("in its place is %.100q with %d octets, and the manifest says %d", header.Name, header.Size, file.Size)
	}
	sum := sha256.New()
	if create == nil {
		_, err = io.Copy(sum, archive)
	} else {
		var to io.WriteCloser
		if to, err = create(file); err != nil {
			return err
		}
		_, err = io.Copy(io.MultiWriter(to, sum), archive)
		err = errors.Join(err, to.Close())
	}
	if err != nil {
		return err
	}
	if got := ledger.Hash(sum.Sum(nil)); got != file.SHA256 {
		return fmt.Errorf("its SHA-256 is %s, and the manifest says %s: the backup is damaged", got, file.SHA256)
	}
	return nil
}
