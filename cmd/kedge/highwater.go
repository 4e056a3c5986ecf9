package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"kedge/ca/ledger"
)

// highWaterTick is how often the high-water mark follows the ledger. What a crash leaves it behind by is no harm: only a mark that is ahead is one.
const highWaterTick = time.Second

// highWater keeps the high-water mark of a ledger that is served.
type highWater struct {
	path   string
	ledger *ledger.Ledger
	log    *slog.Logger

	mu      sync.Mutex
	written ledger.Mark
	wrong   error // why it is not up to date; nil: it is
}

// openHighWater makes sure that the ledger goes on from the mark, and writes the mark where there is none.
func openHighWater(path, dataDir string, book *ledger.Ledger, log *slog.Logger) (*highWater, error) {
	h := &highWater{path: path, ledger: book, log: log}
	mark, err := ledger.ReadMark(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && book.Head().Number > 0:
		log.Warn("there is no high-water mark: it is made anew, and nothing tells whether the ledger is an older copy of itself", "file", path, "number", book.Head().Number)
	case errors.Is(err, fs.ErrNotExist): // the first start
	case err != nil:
		return nil, err
	default:
		if err := book.CheckMark(mark); errors.Is(err, ledger.ErrPutBack) {
			return nil, fmt.Errorf("%w. Nothing is served from %s. %s", err, dataDir, mendPutBack(dataDir, path))
		} else if err != nil {
			return nil, fmt.Errorf("comparing the ledger with the high-water mark %s: %w", path, err)
		}
	}
	h.save()
	return h, nil
}

// mendPutBack says what to do about a ledger that does not go on from its mark.
func mendPutBack(dataDir, path string) string {
	return fmt.Sprintf("Certificates of the missing events would be unknown to it, and join tokens that were spent in them could be used again. "+
		"Put the right data folder back; or, if it is lost, run 'kedge restore --from %s --data NEWFOLDER' and serve that: a new log begins there, a new issuing CA takes over, "+
		"join tokens are void, and the ledger says that it does not know all that was issued until then. "+
		"If the mark (%s) is that of another CA, give each a file of its own with ledger.highWaterFile", dataDir, path)
}

// save lets the mark follow the ledger. A failure is a problem that is tried again, and holds nothing up.
func (h *highWater) save() {
	h.mu.Lock()
	defer h.mu.Unlock()
	mark := h.ledger.Head().Mark()
	if mark == h.written {
		return
	}
	err := ledger.WriteMark(h.path, mark)
	switch {
	case err == nil && h.wrong != nil:
		h.log.Info("works again", "about", "high-water mark")
	case err != nil && (h.wrong == nil || h.wrong.Error() != err.Error()):
		h.log.Error("something is wrong and is tried again", "about", "high-water mark", "error", err)
	}
	if h.wrong = err; err == nil {
		h.written = mark
	}
}

// run keeps the mark until ctx ends.
func (h *highWater) run(ctx context.Context) error {
	ticker := time.NewTicker(highWaterTick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			h.save()
		}
	}
}

// problem says why the mark is not up to date.
func (h *highWater) problem() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.wrong == nil {
		return nil
	}
	return fmt.Errorf("%w: until it can be written, an older copy of the ledger that is put back may go unnoticed", h.wrong)
}
