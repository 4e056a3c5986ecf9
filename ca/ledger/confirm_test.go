package ledger

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// bySDS is an issue that goes out by SDS to the holder of h.issue.
func bySDS(i *Issue) { i.Delivery = DeliverySDS }

func replacing(n uint64) func(*Issue) { return func(i *Issue) { i.Replaces = n } }

// acknowledged says that the holder of issue n has a trust bundle; 0: that it has the certificate.
func (h *house) acknowledged(n, bundle uint64) *Confirm {
	return &Confirm{Number: n, Serial: mustIssue(h, n).Serial, How: "sds-ack", Bundle: bundle}
}

// holds makes sure that so many certificates count under each bundle, and that a recount gives the same.
func (h *house) holds(when string, want map[uint64]uint64) {
	h.t.Helper()
	rows, err := h.Holdings()
	if err != nil {
		h.t.Fatal(err)
	}
	got := map[uint64]uint64{}
	for _, row := range rows {
		if row.Count > 0 {
			got[row.Bundle] += row.Count
		}
	}
	if !maps.Equal(got, want) {
		h.t.Errorf("%s: by bundle there are %v, want %v", when, got, want)
	}
	h.clean()
}

func TestACertificateCountsUnderTheBundleThatItsHolderAcknowledged(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	n, other := h.must(h.issue()), h.must(h.issue())
	h.must(bundle(2, 1), bundle(3, 1))
	h.holds("handed over", map[uint64]uint64{1: 2})
	h.must(h.acknowledged(n, 2))
	h.holds("acknowledged", map[uint64]uint64{1: 1, 2: 1})
	h.refused(ErrAlready, h.acknowledged(n, 2))
	h.refused(ErrAlready, h.acknowledged(n, 1))
	h.refused(ErrAlready, h.acknowledged(n, 0))
	h.refused(ErrNotFound, h.acknowledged(n, 4))
	h.must(h.acknowledged(other, 0))
	h.refused(ErrAlready, h.acknowledged(other, 1)) // it counts under that one
	h.reopen()
	h.must(h.acknowledged(n, 3), h.acknowledged(other, 2), h.acknowledged(other, 3)) // in one draft, too
	h.holds("all of them", map[uint64]uint64{3: 2})
	if state, err := h.IssueState(n); err != nil || (state != IssueState{Confirmed: true, Bundle: 3}) {
		t.Errorf("%+v, %v", state, err)
	}
	h.refused(ErrAlready, h.issue(), h.acknowledged(n, 3))
	h.holds("nothing new", map[uint64]uint64{3: 2})
}

func TestAFirstConfirmationWithAnOlderBundleThanTheOneHandedOverTellsOfAnotherHolder(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1))
	before := h.must(h.issue())
	n := h.must(h.issue(replacing(before), func(i *Issue) { i.Bundle = 2 }))
	h.refused(ErrAlready, h.acknowledged(n, 1))
	h.holds("the one before still counts", map[uint64]uint64{1: 1, 2: 1})
	h.must(h.acknowledged(n, 2))
	h.holds("it has it", map[uint64]uint64{2: 1})
}

// What goes out by SDS says nothing of the bundle, until the holder does.
func TestACertificateBySDSCountsUnderNoBundleUntilItsHolderIsKnownToHaveOne(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 2))
	handed := func(i *Issue) { i.Bundle = 2 }
	h.refused(ErrBelowFloor, h.issue(bySDS))
	first := h.must(h.issue(bySDS, handed, func(i *Issue) { i.Held = 2 })) // a caller cannot say so
	h.holds("handed over", map[uint64]uint64{0: 1})
	h.must(h.acknowledged(first, 0)) // default alone
	h.holds("acknowledged without a bundle", map[uint64]uint64{0: 1})
	h.must(h.acknowledged(first, 1)) // it is what it has, though below the floor
	h.holds("acknowledged with an old one", map[uint64]uint64{1: 1})

	renewed := h.must(h.issue(bySDS, handed, replacing(first)))
	h.holds("renewed on the stream", map[uint64]uint64{1: 2})
	h.must(h.acknowledged(first, 2)) // which the renewed one did not hear of
	h.holds("meanwhile", map[uint64]uint64{1: 1, 2: 1})
	h.must(h.acknowledged(renewed, 2))
	h.holds("the renewed one is there", map[uint64]uint64{2: 1})
	again := h.must(h.issue(bySDS, handed, replacing(renewed)))
	h.must(h.acknowledged(again, 2))
	h.holds("and once more", map[uint64]uint64{2: 1})
	if got := mustIssue(h, again); got.Held != 2 {
		t.Errorf("%+v", got)
	}
}

// Else the bundle of one holder would pass for that of another, and what somebody still uses would count no more.
func TestACertificateBySDSTellsNothingOfWhatCameInAnotherWayOrToAnotherHolder(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Issue){
		"in a response":       func(i *Issue) { i.Delivery = DeliveryResponse },
		"to another holder":   func(i *Issue) { i.Holder.ID = "another" },
		"to another identity": func(i *Issue) { i.SPIFFEID += "2" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			h.must(bundle(2, 1))
			file := h.must(h.issue(bySDS, change))
			h.must(h.acknowledged(file, 1))
			stream := h.must(h.issue(bySDS, replacing(file)))
			h.holds("handed over", map[uint64]uint64{0: 1, 1: 1})
			at := h.must(h.acknowledged(stream, 2))
			if e, err := h.Event(context.Background(), at); err != nil || e.Body.(*Confirm).Retires != 0 {
				t.Errorf("%+v, %v", e.Body, err)
			}
			h.holds("acknowledged", map[uint64]uint64{1: 1, 2: 1})
		})
	}
	t.Run("a response after it", func(t *testing.T) {
		t.Parallel()
		h := newHouse(t)
		stream := h.must(h.issue(bySDS))
		h.must(h.acknowledged(h.must(h.issue(replacing(stream))), 0))
		h.holds("confirmed", map[uint64]uint64{0: 1, 1: 1})
	})
}

func TestOfASupersededCertificateNoBundleIsKnown(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1), &Token{ID: "t", SPIFFEID: "spiffe://cluster.local/vm", Expires: h.clock.at() + 3600, By: "uid=0"})
	spend := func(i *Issue) { i.SPIFFEID, i.Token = "spiffe://cluster.local/vm", "t" }
	before := h.must(h.issue(bySDS, func(i *Issue) { i.SPIFFEID = "spiffe://cluster.local/vm" }))
	h.must(h.acknowledged(before, 1))
	lost := h.must(h.issue(bySDS, spend, replacing(before))) // its caller presented the one before as well
	h.holds("the token is redeemed", map[uint64]uint64{1: 2})
	again := h.must(h.issue(bySDS, spend)) // by whoever has the token
	h.holds("and redeemed again", map[uint64]uint64{0: 1, 1: 2})
	h.refused(ErrSuperseded, h.acknowledged(lost, 2))
	h.must(h.acknowledged(again, 2))
	h.holds("the latest is acknowledged", map[uint64]uint64{1: 2, 2: 1})
	h.refused(ErrTokenSpent, h.issue(bySDS, spend))
}

func TestAnAcknowledgementOfWhatCountsNoMoreChangesNoCount(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1))
	old := h.must(h.issue(bySDS))
	renewed := h.must(h.issue(bySDS, replacing(old)))
	h.must(h.acknowledged(renewed, 0))
	h.holds("the old one is retired", map[uint64]uint64{0: 1})
	h.must(h.acknowledged(old, 1), h.acknowledged(old, 2))
	h.holds("late", map[uint64]uint64{0: 1})
	if state, err := h.IssueState(old); err != nil || (state != IssueState{Confirmed: true, Retired: true, Bundle: 2}) {
		t.Errorf("%+v, %v", state, err)
	}
	last := h.must(h.issue(bySDS, replacing(old))) // its holder said so
	h.holds("a second renewal of it", map[uint64]uint64{0: 1, 2: 1})
	h.reopen()
	h.must(h.acknowledged(last, 2), h.acknowledged(renewed, 2))
	h.holds("all of them", map[uint64]uint64{2: 2})
}

// A revocation lets nobody authenticate to this CA. Others go on to accept the certificate, whose holder goes on to verify.
func TestTheHolderOfARevokedCertificateCounts(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1))
	n := h.must(h.issue(bySDS))
	h.must(&Revoke{Serial: mustIssue(h, n).Serial, Number: n, NotAfter: mustIssue(h, n).NotAfter, By: "uid=0"})
	h.holds("revoked", map[uint64]uint64{0: 1})
	h.must(h.acknowledged(n, 2))
	h.holds("acknowledged", map[uint64]uint64{2: 1})
}

func TestPruningAndAcknowledgementsGoTogether(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1))
	old := h.must(h.issue(bySDS))
	moved := h.must(h.issue(bySDS, replacing(old)))
	h.must(h.acknowledged(moved, 1))
	lasting := h.must(h.issue(bySDS, replacing(moved), func(i *Issue) { i.NotAfter += Time(100 * 86400) }))
	h.holds("before", map[uint64]uint64{1: 2})
	h.clock.advance(3 * time.Hour)
	h.holds("expired", map[uint64]uint64{1: 2})
	h.must(h.acknowledged(old, 1)) // nobody pruned yet, and it was retired
	h.prune(h.clock.Now())
	h.holds("the hour is past", map[uint64]uint64{1: 1})
	h.must(h.acknowledged(old, 2), h.acknowledged(moved, 2))
	h.holds("of what has no row", map[uint64]uint64{1: 1})
	next := h.must(h.issue(bySDS, replacing(moved), func(i *Issue) { i.NotAfter += Time(100 * 86400) })) // the holder is the same, for all its delay
	h.holds("late renewal", map[uint64]uint64{1: 1, 2: 1})

	gone := h.acknowledged(moved, 2)
	h.prune(h.clock.Now().Add(40 * day))
	if first := h.Head().First; first <= moved || first > lasting {
		t.Fatalf("the log begins with %d: this shows nothing", first)
	}
	h.refused(ErrNotFound, gone)
	h.holds("the front is gone", map[uint64]uint64{1: 1, 2: 1})
	h.must(h.acknowledged(lasting, 2), h.acknowledged(next, 0))
	h.holds("what is left", map[uint64]uint64{2: 2})
	h.prune(h.clock.Now().Add(400 * day))
	h.reopen()
	h.holds("nothing is left", map[uint64]uint64{})
}

func TestARestoreKeepsWhatWasAcknowledgedUpToTheBackup(t *testing.T) {
	t.Parallel()
	lost := newHouse(t)
	lost.must(bundle(2, 1))
	n := lost.must(lost.issue(bySDS))
	other := lost.must(lost.issue(bySDS))
	lost.must(lost.acknowledged(n, 1))
	h := lost.copied()
	lost.must(bundle(3, 1), lost.acknowledged(n, 3), lost.acknowledged(other, 3))
	h.restore()
	leapt := h.Floor()
	h.holds("restored", map[uint64]uint64{0: 1, 1: 1})
	h.refused(ErrNotFound, h.acknowledged(n, 3)) // of the lost store
	h.must(h.acknowledged(n, 2), h.acknowledged(other, leapt))
	renewed := h.must(h.issue(bySDS, replacing(other), func(i *Issue) { i.Bundle = leapt }))
	h.must(h.acknowledged(renewed, 0))
	h.holds("new acknowledgements", map[uint64]uint64{2: 1, leapt: 1})
	again := h.copied()
	again.clock.advance(time.Minute)
	again.restore()
	again.must(again.acknowledged(renewed, again.Floor()))
	again.holds("restored again", map[uint64]uint64{2: 1, again.Floor(): 1})
}

// A row had one octet before bundles could be acknowledged.
func TestARowOfOneOctetIsReadAndGrowsWithTheFirstBundle(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.must(bundle(2, 1))
	old := h.must(h.issue())
	n := h.must(h.issue(replacing(old)))
	h.must(h.acknowledged(old, 0), h.acknowledged(n, 0))
	rows := func() (rows [][]byte) {
		err := h.view(func(tx *bolt.Tx) error {
			return h.table(tx, bucketSettled).ForEach(func(_, value []byte) error {
				rows = append(rows, bytes.Clone(value))
				return nil
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	if got, want := rows(), [][]byte{{settledConfirmed | settledRetired}, {settledConfirmed}}; !slices.EqualFunc(got, want, bytes.Equal) {
		t.Fatalf("%v", got)
	}
	h.holds("as it was", map[uint64]uint64{1: 1})
	h.reopen()
	h.must(h.acknowledged(n, 2))
	if got := rows(); fmt.Sprint(got[1]) != fmt.Sprint(append([]byte{settledConfirmed}, number(2)...)) || len(got[0]) != 1 {
		t.Errorf("%v", got)
	}
	h.must(h.acknowledged(h.must(h.issue(replacing(n), func(i *Issue) { i.Bundle = 2 })), 0))
	if state, err := h.IssueState(n); err != nil || (state != IssueState{Confirmed: true, Retired: true, Bundle: 2}) {
		t.Errorf("%+v, %v", state, err)
	}
	h.holds("it grew, and was retired", map[uint64]uint64{2: 1})
}

// Somebody who covers his traces makes the hash chain hold again. What the ledger refuses is found nevertheless.
func TestVerifyFindsEvidenceThatTheLedgerWouldHaveRefused(t *testing.T) {
	t.Parallel()
	original := newHouse(t)
	original.must(bundle(2, 1))
	old := original.must(original.issue(bySDS))
	original.must(original.acknowledged(old, 2))
	renewed := original.must(original.issue(bySDS, replacing(old)))
	original.must(original.acknowledged(renewed, 0))
	twin := original.must(original.issue(bySDS, replacing(old)))
	file := original.must(original.issue())
	original.must(&Waiver{Gate: "clock", By: "uid=0"}) // in whose place something else comes
	changed := func(c *Confirm, change func(*Confirm)) *Confirm { change(c); return c }
	for _, test := range []struct {
		name  string
		event Body
		want  string
	}{
		{"the same bundle again", original.acknowledged(old, 2), "where it counts under 2 already"},
		{"an older bundle", original.acknowledged(renewed, 1), "where it counts under 2 already"},
		{"an older bundle at first", original.acknowledged(twin, 1), "where it counts under 2 already"},
		{"a bundle that there is not", original.acknowledged(twin, 3), "and there is none"},
		{"a second retirement", changed(original.acknowledged(twin, 2), func(c *Confirm) { c.Retires = old }), "no such holding is left"},
		{"a retirement by a second confirmation", changed(original.acknowledged(renewed, 3), func(c *Confirm) { c.Retires = old }), "is replaced"},
		{"a bundle that no holder has", original.issue(bySDS, func(i *Issue) { i.Held = 2 }), "does not count so"},
		{"a bundle of another holder", original.issue(bySDS, replacing(file), func(i *Issue) { i.Held = 1 }), "does not count so"},
		{"another bundle than the holder's", original.issue(bySDS, replacing(old), func(i *Issue) { i.Held = 1 }), "does not count so"},
		{"the bundle of a superseded certificate", original.issue(bySDS, replacing(old), func(i *Issue) { i.Held, i.Supersedes = 2, old }), "does not count so"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := original.copied()
			h.edit(func(tx *bolt.Tx) error {
				return relink(tx, func(raws [][]byte) [][]byte {
					e, _, err := unseal(raws[0])
					if err != nil {
						t.Fatal(err)
					}
					body, err := encodeBody(test.event)
					if err != nil {
						t.Fatal(err)
					}
					e.typ = test.event.Type()
					return [][]byte{e.seal(body)}
				})
			})
			report, err := h.Verify(context.Background())
			if found := strings.Join(report.Problems, "\n"); err != nil || !strings.Contains(found, test.want) || strings.Contains(found, "hash") {
				t.Errorf("Verify found:\n%s (%v)\nwant: %s", found, err, test.want)
			}
		})
	}
}
