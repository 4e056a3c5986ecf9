package agent

import (
	"context"
	"fmt"
	"time"

	"kedge/ca/atomicfile"
	"kedge/issuer/sds"
)

// keepFiles writes the SVID's files whenever it or the trust bundle has changed. Whoever reads them counts as one consumer, which holds a trust bundle once it has
// stood there for as long as programs take to read it. Files of an SVID that has expired stay as they are.
func (i *identity) keepFiles(ctx context.Context) {
	readers, holders := i.consumers.enter(), i.holders.enter()
	defer readers.leave()
	defer holders.leave()
	var wait backoff
	var written sds.Materials
	var bundleRead, svidRead <-chan time.Time // when what was written has been read
	var bundle, svid uint64                   // which ones these are
	for {
		now, changed := i.materials()
		var again <-chan time.Time
		if now.SVID != nil && (now.SVID != written.SVID || now.Bundles[0] != written.Bundles[0]) {
			err := i.writeFiles(now)
			if err != nil {
				err = fmt.Errorf("programs that read files do not get the SVID of now: %w", err)
				i.log.Error("the files are not written", "error", err)
				again = time.After(wait.failed(firstRetry, longestRetry))
			} else {
				wait.reset()
				if order := i.orderOf(now.Bundles[0]); order != bundle {
					bundleRead, bundle = time.After(i.w.Files.RereadAfter), order
				}
				if order := i.orderOfSVID(now.SVID); order != svid {
					svidRead, svid = time.After(i.w.Files.RereadAfter), order
				}
				if written.SVID == nil {
					warnOfBlocked(i.log, i.w.Files.Access, i.w.Files.Dir, "the files")
				}
				written = *now
			}
			i.note("files", err)
		}
		select {
		case <-changed:
		case <-again:
		case <-bundleRead:
			readers.holds(bundle)
			bundleRead = nil
		case <-svidRead:
			holders.holds(svid)
			svidRead = nil
		case <-ctx.Done():
			return
		}
	}
}

func (i *identity) writeFiles(m *sds.Materials) error {
	i.mu.Lock()
	svid := *i.svid.SVID
	fits := i.svid.handed == m.SVID
	i.mu.Unlock()
	if !fits { // there is a newer one already: materials have changed
		return fmt.Errorf("the SVID has just been replaced")
	}
	svid.BundlePEM = m.Bundles[0].PEM
	return atomicfile.WriteSetFor(i.w.Files.Access, i.w.Files.Dir, svid.Files())
}

// orderOfSVID says when an SVID came; 0: there is a newer one.
func (i *identity) orderOfSVID(s *sds.SVID) uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.svid == nil || i.svid.handed != s {
		return 0
	}
	return i.svid.order
}

// orderOf says when a bundle was taken; 0: it is not known any more.
func (i *identity) orderOf(b *sds.Bundle) uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.known[b]
}
