package ledger

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"kedge/test/machine"
)

func TestASnapshotIsOneMomentOfALedgerThatIsWrittenMeanwhile(t *testing.T) {
	t.Parallel()
	h := fill(t)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				h.must(h.issue(), h.issue())
			}
		}
	}()
	var last uint64
	for range 5 {
		before := h.Head().Number
		c := h.copied()
		if n := c.Head().Number; n < before || n < last {
			t.Errorf("a snapshot that was begun at event %d ends with %d", before, n)
		}
		last = c.Head().Number
		c.clean()
	}
	close(stop)
	<-stopped
	h.clean()
	entries, err := os.ReadDir(h.dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
}

func TestASnapshotSaysWhatItIs(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	s, err := h.Snapshot(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	h.must(h.issue())
	text, err := io.ReadAll(s)
	if err = errors.Join(err, s.Close()); err != nil || int64(len(text)) != s.Size || sha256.Sum256(text) != s.SHA256 || s.Head.Number != 3 {
		t.Errorf("%d octets of %d, head %+v, %v", len(text), s.Size, s.Head, err)
	}
}

func TestASnapshotEndsWithItsCallerOrAFault(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.Snapshot(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("without a caller: %v", err)
	}
	h.fault.Store(h.newFault(errors.New("bad disk")))
	if _, err := h.Snapshot(context.Background()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("during a fault: %v", err)
	}
	h.fault.Store(nil)
	h.copied().clean()
}

func TestASnapshotLeavesTheLedgerItsRoom(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=48m")
	if !ok {
		return
	}
	h := newHouseIn(t, dir)
	if _, err := h.Snapshot(context.Background()); err == nil || !strings.Contains(err.Error(), "64 MiB beside it for the ledger") {
		t.Errorf("%v", err)
	}
	h.must(h.issue())
	h.clean()
}
