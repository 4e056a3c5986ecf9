package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// The format of the data folder. It rises when what is written changes. oldestReaderFormat rises only when a program of an
// older format can no longer read it: up to there an upgrade can be rolled back.
const (
	formatFile         = "format.json"
	format             = 1
	oldestReaderFormat = 1
	oldestReader       = "0.1.0"
)

type formatRecord struct {
	Format             int    `json:"format"`               // of the program that made the folder
	OldestReaderFormat int    `json:"oldest_reader_format"` // a program of an older format must not touch the folder
	OldestReader       string `json:"oldest_reader"`        // the oldest version of the program that has that format
	WrittenBy          string `json:"written_by"`           // version of the program that made the folder
}

// CheckFormat says whether this program can read the data folder dir, whose format.json names the oldest version that can.
// A folder without one is new. programVersion is only for the text of the error.
func CheckFormat(dir, programVersion string) error {
	record, err := readFormat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if record.OldestReaderFormat > format {
		return fmt.Errorf("the data folder %s was written by kedge %s in format %d: kedge %s reads formats up to %d; use kedge %s or later",
			dir, record.WrittenBy, record.Format, programVersion, format, record.OldestReader)
	}
	return nil
}

func readFormat(dir string) (record formatRecord, err error) {
	path := filepath.Join(dir, formatFile)
	f, err := os.Open(path)
	if err != nil {
		return record, fmt.Errorf("reading the format of the data folder: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return record, fmt.Errorf("reading the format of the data folder: %w", err)
	}
	err = json.Unmarshal(text, &record)
	if err == nil && (record.Format < 1 || record.OldestReaderFormat < 1) {
		err = errors.New("format and oldest_reader_format are numbers from 1")
	}
	if err != nil {
		return record, fmt.Errorf("%s is damaged (%w): restore it from a backup of the data folder", path, err)
	}
	return record, nil
}

// writeFormat states the format of a new data folder: all of the file or none of it.
func writeFormat(dir, programVersion string) error {
	text, err := json.MarshalIndent(formatRecord{format, oldestReaderFormat, oldestReader, programVersion}, "", "  ")
	if err == nil {
		err = writeFile(filepath.Join(dir, formatFile), func(w io.Writer) error {
			_, err := w.Write(append(text, '\n'))
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("stating the format of the data folder %s: %w", dir, err)
	}
	return nil
}

// temporarySuffix is on the name of a file that is not complete yet.
const temporarySuffix = ".new"

// writeFile makes a file of mode 0600 that is there as a whole, durably, or not at all.
func writeFile(path string, fill func(io.Writer) error) (err error) {
	temporary := path + temporarySuffix
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
