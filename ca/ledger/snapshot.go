package ledger

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// snapshotReserve is how much room must be left on the disk beside a snapshot, so that a backup never stops the ledger.
const snapshotReserve = 64 << 20 // octets

// Snapshot is a copy of the ledger's file as it was at one moment. It is a file without a name, on the ledger's own disk, and is gone with Close.
type Snapshot struct {
	Head   Head
	Size   int64  // octets
	SHA256 Hash   // of the whole copy
	Format []byte // format.json of the data folder
	file   *os.File
}

// Read reads the copy, from the beginning to the end.
func (s *Snapshot) Read(b []byte) (int, error) { return s.file.Read(b) }

// Close gives the room on the disk back.
func (s *Snapshot) Close() error { return s.file.Close() }

// Snapshot copies the file while recording goes on. The copy is made at the disk's speed, in one read transaction, whoever wants it and however slowly:
// as long as that is open, the writer can reuse no page, so that the file grows by what is written meanwhile; and once the
// file is larger than 1 GiB, a commit with which it exceeds another GiB waits for the end of it. A fault of the ledger ends it,
// since the file is opened anew then. One snapshot is made at a time. It is refused when the disk has no room for it.
func (l *Ledger) Snapshot(ctx context.Context) (s *Snapshot, err error) {
	select {
	case l.copying <- struct{}{}:
		defer func() { <-l.copying }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another snapshot of the ledger: %w", ctx.Err())
	}
	if s, err = l.snapshot(ctx); err != nil {
		return nil, fmt.Errorf("copying the ledger %s: %w", l.path, err)
	}
	return s, nil
}

func (l *Ledger) snapshot(ctx context.Context) (*Snapshot, error) {
	file, err := nameless(filepath.Join(l.dir, "snapshot"+temporarySuffix))
	if err != nil {
		return nil, err
	}
	s := &Snapshot{file: file}
	if s.Format, err = os.ReadFile(filepath.Join(l.dir, formatFile)); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	w := &snapshotWriter{l: l, ctx: ctx, file: file, sum: sha256.New()}
	err = l.view(func(tx *bolt.Tx) (err error) {
		if err := l.roomForSnapshot(tx.Size()); err != nil {
			return err
		}
		if s.Head, err = readHead(tx); err != nil {
			return err
		}
		s.Size, err = tx.WriteTo(w)
		return cmp.Or(w.err, err) // bbolt does not always wrap
	})
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s.SHA256 = Hash(w.sum.Sum(nil))
	return s, nil
}

// nameless opens a file that no crash can leave behind.
func nameless(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (l *Ledger) roomForSnapshot(size int64) error {
	var disk unix.Statfs_t
	if err := unix.Statfs(l.dir, &disk); err != nil {
		return fmt.Errorf("looking for room on the disk: %w", err)
	}
	if free := int64(disk.Bavail) * disk.Bsize; free < size+snapshotReserve {
		return fmt.Errorf("the copy needs %d MiB on the disk of %s for as long as it is read, and %d MiB beside it for the ledger: %d MiB are left. "+
			"Make room; or stop the CA and keep a copy of its data folder", size>>20+1, l.dir, int64(snapshotReserve)>>20, free>>20)
	}
	return nil
}

// snapshotWriter writes and hashes, until there is a reason to stop.
type snapshotWriter struct {
	l    *Ledger
	ctx  context.Context
	file *os.File
	sum  hash.Hash
	err  error // why it ended
}

func (w *snapshotWriter) Write(b []byte) (n int, err error) {
	if w.err = cmp.Or(w.ctx.Err(), w.l.Fault()); w.err == nil {
		w.sum.Write(b) // never fails
		n, w.err = w.file.Write(b)
	}
	return n, w.err
}
