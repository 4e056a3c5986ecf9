package ledger

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
)

// MarkFile is where a high-water mark stands in a data folder.
const MarkFile = "high-water.json"

// Mark is a high-water mark: up to where a log was durable at some time. It is kept outside the ledger's file, so that an older copy of that file,
// put in its place, is noticed.
type Mark struct {
	Log    LogID  `cbor:"1,keyasint" json:"log"`
	Number uint64 `cbor:"2,keyasint" json:"number"` // of the last event; 0: there was none yet
	Hash   Hash   `cbor:"3,keyasint" json:"hash"`   // chain hash after it
	Time   Time   `cbor:"4,keyasint" json:"time"`   // of that event
}

// Mark is the mark of a head.
func (h Head) Mark() Mark { return Mark{Log: h.Log, Number: h.Number, Hash: h.Hash, Time: h.Time} }

// ReadMark reads the file of a mark. Without one the error wraps fs.ErrNotExist.
func ReadMark(path string) (m Mark, err error) {
	f, err := os.Open(path)
	if err != nil {
		return m, fmt.Errorf("reading the high-water mark: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return m, fmt.Errorf("reading the high-water mark: %w", err)
	}
	if err = json.Unmarshal(text, &m); err == nil && m.Log == (LogID{}) {
		err = errors.New("it names no log")
	}
	if err != nil {
		return m, fmt.Errorf("the high-water mark %s cannot be read (%w): remove the file once you have made sure that the ledger is the right one, "+
			"and not an older copy of it", path, err)
	}
	return m, nil
}

// WriteMark puts a mark into a file: the whole of it, durably, or not at all.
func WriteMark(path string, m Mark) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = writeFile(path, func(w io.Writer) error {
			_, err := w.Write(append(text, '\n'))
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("writing the high-water mark %s: %w", path, err)
	}
	return nil
}

// CheckMark makes sure that the ledger goes on from a mark: that it has every event up to there, as it was then. A mark of another log is
// of before a restore, if the restore says so. The error wraps ErrPutBack and says what was expected and what is there.
func (l *Ledger) CheckMark(m Mark) error {
	return l.view(func(tx *bolt.Tx) error { return m.check(tx) })
}

func (m Mark) check(tx *bolt.Tx) error {
	head, err := readHead(tx)
	if err != nil {
		return err
	}
	if m.Log != head.Log {
		left, err := restoreOf(tx, func(r *Restore) bool { return r.Log == m.Log || r.Mark != nil && r.Mark.Log == m.Log })
		if err != nil || left != nil {
			return err
		}
		return fmt.Errorf("%w: the high-water mark is of event %d of log %s, at %s; the ledger is of log %s, which ends with event %d at %s",
			ErrPutBack, m.Number, m.Log, m.Time, head.Log, head.Number, head.Time)
	}
	if m.Number > head.Number {
		return fmt.Errorf("%w: the high-water mark says that event %d was recorded in log %s, at %s; the ledger ends with event %d, at %s, so that %d are lost",
			ErrPutBack, m.Number, m.Log, m.Time, head.Number, head.Time, m.Number-head.Number)
	}
	if m.Number+1 < head.First {
		return nil // pruned since
	}
	hash, err := hashAfter(tx, head, m.Number)
	if err == nil && hash != m.Hash {
		err = fmt.Errorf("%w: the high-water mark says that the chain hash was %s after event %d of log %s, at %s; the ledger ends with event %d, at %s, "+
			"and its chain does not go through that hash", ErrPutBack, m.Hash, m.Number, m.Log, m.Time, head.Number, head.Time)
	}
	return err
}

// hashAfter returns the chain hash after event n, which is not before the one that precedes the first. It is zero when n does not end a commit.
func hashAfter(tx *bolt.Tx, head Head, n uint64) (hash Hash, err error) {
	switch {
	case n == head.Number:
		return head.Hash, nil
	case n+1 == head.First:
		return Hash(tx.Bucket(bucketMeta).Get(keyAnchor)[8:]), nil
	}
	commits := tx.Bucket(bucketCommits).Cursor()
	if key, _ := commits.Seek(number(n + 1)); !bytes.Equal(key, number(n+1)) {
		return hash, nil
	}
	_, value := commits.Prev()
	_, hash, err = decodeCommit(value)
	return hash, err
}

// Seen is what Look sees of a ledger.
type Seen struct {
	TrustDomain string
	Head        Head
}

// Look looks at the ledger in a data folder that no process serves, and changes nothing: it verifies the format and the newest part of the
// hash chain, as Open does, and that the ledger goes on from a mark, if one is given.
func Look(dir, programVersion string, m *Mark) (s Seen, err error) {
	if err := CheckFormat(dir, programVersion); err != nil {
		return s, err
	}
	path := filepath.Join(dir, storeFile)
	db, err := openStore(path, true)
	if err != nil {
		return s, damage(path, err)
	}
	err = contain(func() error {
		return db.View(func(tx *bolt.Tx) error {
			if meta := tx.Bucket(bucketMeta); meta != nil {
				s.TrustDomain = string(meta.Get(keyTrustDomain))
			}
			state, err := loadState(tx, s.TrustDomain)
			s.Head = state.head
			if err == nil && m != nil {
				return m.check(tx)
			}
			return err
		})
	})
	if err = errors.Join(err, db.Close()); err != nil && !errors.Is(err, ErrPutBack) {
		err = damage(path, err)
	}
	return s, err
}
