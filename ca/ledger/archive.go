package ledger

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// An archive file holds whole commits of one log, exactly as they were stored: a magic, then frames, each a length in four octets
// (big-endian) and as many octets of CBOR. The first frame is an archiveHeader, every other an archiveCommit.
const (
	archiveMagic    = "KEDGELG1"
	archiveSuffix   = ".kedge-ledger"
	archiveMaxFrame = 64 << 20
)

// archiveDecoding allows for all events of one commit.
var archiveDecoding = must(cbor.DecOptions{
	DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
	MaxNestedLevels: maxNesting, MaxArrayElements: 2 * maxCommit, MaxMapPairs: maxElements,
}.DecMode())

type archiveHeader struct {
	Log         LogID  `cbor:"1,keyasint"`
	Incarnation Hash   `cbor:"2,keyasint"`
	TrustDomain string `cbor:"3,keyasint"`
	First       uint64 `cbor:"4,keyasint"` // number of the first event
	Last        uint64 `cbor:"5,keyasint"` // number of the last event
	Before      Hash   `cbor:"6,keyasint"` // chain hash before the first commit
}

type archiveCommit struct {
	First  uint64   `cbor:"1,keyasint"`
	Hash   Hash     `cbor:"2,keyasint"`
	Events [][]byte `cbor:"3,keyasint"`
}

// ArchivedCommit is one commit of an archive file.
type ArchivedCommit struct {
	Log    LogID
	First  uint64   // number of its first event
	Before Hash     // chain hash before it: that of the last commit of the file before
	Hash   Hash     // chain hash after it
	Raw    [][]byte // its events as they were stored; see DecodeEvent
}

// ReadArchive goes through an archive file that Prune wrote, and verifies it: its frames, the numbers, the hash chain. An error
// is the last that it yields; the commits before it were sound. Whether one file follows on another is seen by Before.
func ReadArchive(path string) iter.Seq2[ArchivedCommit, error] {
	return func(yield func(ArchivedCommit, error) bool) {
		f, err := os.Open(path)
		if err != nil {
			yield(ArchivedCommit{}, fmt.Errorf("reading the archive: %w", err))
			return
		}
		defer f.Close()
		stopped := false
		err = readArchive(bufio.NewReaderSize(f, 1<<20), func(c ArchivedCommit) bool {
			stopped = !yield(c, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(ArchivedCommit{}, fmt.Errorf("reading the archive %s: %w", path, err))
		}
	}
}

func readArchive(r io.Reader, yield func(ArchivedCommit) bool) error {
	magic := make([]byte, len(archiveMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != archiveMagic {
		return errors.New("it is not an archive of a ledger")
	}
	var header archiveHeader
	if err := readFrame(r, &header); err != nil {
		return fmt.Errorf("its header: %w", err)
	}
	next, hash := header.First, header.Before
	for next <= header.Last {
		var commit archiveCommit
		if err := readFrame(r, &commit); err != nil {
			return fmt.Errorf("the commit at event %d: %w", next, err)
		}
		if commit.First != next || len(commit.Events) == 0 || uint64(len(commit.Events)) > header.Last-next+1 {
			return fmt.Errorf("the commit at event %d: it holds %d events from %d on", next, len(commit.Events), commit.First)
		}
		if commitHash(hash, commit.Events) != commit.Hash {
			return fmt.Errorf("the commit at event %d does not match the hash chain", next)
		}
		for i, raw := range commit.Events {
			e, _, err := unseal(raw)
			if err == nil && (e.number != next+uint64(i) || e.log != header.Log) {
				err = fmt.Errorf("it is event %d of log %s", e.number, e.log)
			}
			if err != nil {
				return fmt.Errorf("event %d of log %s: %w", next+uint64(i), header.Log, err)
			}
		}
		if !yield(ArchivedCommit{Log: header.Log, First: next, Before: hash, Hash: commit.Hash, Raw: commit.Events}) {
			return nil
		}
		next, hash = next+uint64(len(commit.Events)), commit.Hash
	}
	if n, err := r.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return errors.New("something follows after its last commit")
	}
	return nil
}

func readFrame(r io.Reader, into any) error {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return fmt.Errorf("the file is cut short: %w", err)
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > archiveMaxFrame {
		return fmt.Errorf("a frame claims %d octets, more than %d", size, archiveMaxFrame)
	}
	frame, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return err
	}
	if len(frame) < int(size) {
		return errors.New("the file is cut short")
	}
	return archiveDecoding.Unmarshal(frame, into)
}

func writeFrame(w io.Writer, value any) error {
	frame, err := encoding.Marshal(value)
	if err != nil {
		return err
	}
	if len(frame) > archiveMaxFrame {
		return fmt.Errorf("a commit has %d octets, more than an archive holds", len(frame))
	}
	if _, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(frame)))); err != nil {
		return err
	}
	_, err = w.Write(frame)
	return err
}

// archiveName sorts as the numbers do.
func archiveName(log LogID, first, last uint64) string {
	return fmt.Sprintf("%s-%020d-%020d%s", log, first, last, archiveSuffix)
}

// archived finds the file in a folder that has the event first of a log at its beginning or inside; ok is false when there is none.
// It removes what a run that ended too early left half-written.
func archived(dir string, log LogID, first uint64) (path string, ok bool, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", false, err
	}
	for _, entry := range entries {
		rest, mine := strings.CutPrefix(entry.Name(), log.String()+"-")
		if mine && strings.HasSuffix(rest, archiveSuffix+temporarySuffix) {
			if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil {
				return "", false, err
			}
		}
		rest, complete := strings.CutSuffix(rest, archiveSuffix)
		if !mine || !complete {
			continue
		}
		var from, to uint64
		if _, err := fmt.Sscanf(rest, "%020d-%020d", &from, &to); err == nil && from <= first && first <= to {
			return filepath.Join(dir, entry.Name()), true, nil
		}
	}
	return "", false, nil
}
