package ledger

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestAnIssueNeedsAnActiveAuthorityAndABundleAboveTheFloor(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	next := founding("next", RoleIssuing, StatePrepared)
	old := founding("old", RoleIssuing, StatePrepared)
	h.must(next, old, move(old.ID, StatePrepared, StateActive), move(old.ID, StateActive, StateRetired), bundle(2, 1), bundle(3, 2))
	under := func(id Hash) func(*Issue) { return func(i *Issue) { i.Authority, i.Bundle = id, 3 } }
	with := func(n uint64) func(*Issue) { return func(i *Issue) { i.Bundle = n } }

	h.refused(ErrNotActive, h.issue(under(Hash{9})))
	h.refused(ErrNotActive, h.issue(under(next.ID)))
	h.refused(ErrNotActive, h.issue(under(old.ID)))
	h.refused(ErrBelowFloor, h.issue(with(1)))
	h.refused(ErrNotFound, h.issue(with(4)))
	h.refused(ErrNotFound, h.issue(with(0)))
	h.must(h.issue(with(2)), h.issue(with(3)))

	// In one draft: the authority becomes active and issues, and a tainted one no longer does.
	h.must(move(next.ID, StatePrepared, StateActive), h.issue(under(next.ID)))
	taint := move(next.ID, StateActive, StateActive)
	taint.Tainted = true
	h.refused(ErrNotActive, taint, h.issue(under(next.ID)))
	h.must(h.issue(under(next.ID))) // the draft that was refused left nothing
	h.must(taint)
	h.refused(ErrNotActive, h.issue(under(next.ID)))
	if floor := h.Floor(); floor != 2 {
		t.Errorf("the floor is %d", floor)
	}
	h.clean()
}

func TestAnAuthorityOnlyGoesItsWays(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		events func(id Hash, enter *Authority) []Body
		want   error // nil: accepted
		text   string
	}{
		{"prepared, active, retired, removed", func(id Hash, enter *Authority) []Body {
			return []Body{enter, move(id, StatePrepared, StateActive), move(id, StateActive, StateRetired), move(id, StateRetired, StateRemoved)}
		}, nil, ""},
		{"prepared, removed", func(id Hash, enter *Authority) []Body { return []Body{enter, move(id, StatePrepared, StateRemoved)} }, nil, ""},
		{"unknown", func(id Hash, enter *Authority) []Body { return []Body{move(id, StatePrepared, StateActive)} }, ErrConflict, "does not know"},
		{"twice", func(id Hash, enter *Authority) []Body { return []Body{enter, enter} }, ErrConflict, "it is prepared"},
		{"from another state", func(id Hash, enter *Authority) []Body { return []Body{enter, move(id, StateActive, StateRetired)} }, ErrConflict, "prepared"},
		{"prepared to retired", func(id Hash, enter *Authority) []Body { return []Body{enter, move(id, StatePrepared, StateRetired)} }, nil, "cannot go"},
		{"active to removed", func(id Hash, enter *Authority) []Body {
			return []Body{enter, move(id, StatePrepared, StateActive), move(id, StateActive, StateRemoved)}
		}, nil, "cannot go"},
		{"back to active", func(id Hash, enter *Authority) []Body {
			return []Body{enter, move(id, StatePrepared, StateActive), move(id, StateActive, StateRetired), move(id, StateRetired, StateActive)}
		}, nil, ""},
		{"back to prepared", func(id Hash, enter *Authority) []Body {
			return []Body{enter, move(id, StatePrepared, StateRemoved), move(id, StateRemoved, StatePrepared)}
		}, nil, ""},
		{"retired to prepared", func(id Hash, enter *Authority) []Body {
			return []Body{enter, move(id, StatePrepared, StateActive), move(id, StateActive, StateRetired), move(id, StateRetired, StatePrepared)}
		}, nil, "cannot go"},
		{"nothing new", func(id Hash, enter *Authority) []Body { return []Body{enter, move(id, StatePrepared, StatePrepared)} }, ErrAlready, "nothing new"},
		{"entering retired", func(id Hash, enter *Authority) []Body { enter.To = StateRetired; return []Body{enter} }, nil, "cannot enter"},
		{"a second active issuing CA", func(id Hash, enter *Authority) []Body { enter.To = StateActive; return []Body{enter} }, ErrConflict, "another issuing CA"},
		{"another trust domain", func(id Hash, enter *Authority) []Body { enter.TrustDomain = "other"; return []Body{enter} }, nil, `"other"`},
		{"an id that is not its certificate's", func(id Hash, enter *Authority) []Body { enter.ID = Hash{1}; return []Body{enter} }, nil, "SHA-256"},
		{"entering without a record", func(id Hash, enter *Authority) []Body { enter.Record = nil; return []Body{enter} }, nil, "record"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			enter := founding("x", RoleIssuing, StatePrepared)
			_, err := h.Append(context.Background(), test.events(enter.ID, enter)...)
			if test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("the error is %v, want one that is %q", err, test.want)
			}
			if (test.text == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), test.text)) {
				t.Errorf("the error is %v, want one with %q", err, test.text)
			}
			if err != nil && h.Head().Number != 3 {
				t.Error("a refused draft left something")
			}
			h.clean()
		})
	}
}

func TestATaintStays(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	taint := move(h.ca.ID, StateActive, StateActive)
	taint.Tainted = true
	h.must(taint)
	h.refused(ErrAlready, taint)
	h.must(move(h.ca.ID, StateActive, StateRetired))
	h.refused(ErrConflict, move(h.ca.ID, StateRetired, StateActive))
	h.reopen()
	records, err := h.Authorities()
	if err != nil || !records[1].Tainted || records[1].State != StateRetired {
		t.Errorf("the authority is %+v, %v", records[1], err)
	}
	h.clean()
}

func TestBundlesAreNumberedWithoutGapsAndTheFloorNeverFalls(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.refused(ErrConflict, bundle(1, 1))
	h.refused(ErrConflict, bundle(3, 1))
	h.refused(ErrConflict, bundle(2, 3))
	h.must(bundle(2, 2))
	h.refused(ErrConflict, bundle(3, 1))
	h.must(bundle(3, 2))
	other := bundle(4, 2)
	other.TrustDomain = "other"
	if _, err := h.Append(context.Background(), other); err == nil {
		t.Error("a bundle of another trust domain was accepted")
	}
	for sequence := uint64(1); sequence <= 3; sequence++ {
		record, err := h.BundleBySequence(sequence)
		if err != nil || record.Sequence != sequence || record.Incarnation != h.Head().Incarnation {
			t.Errorf("bundle %d: %+v, %v", sequence, record, err)
		}
	}
	if _, err := h.BundleBySequence(4); !errors.Is(err, ErrNotFound) {
		t.Errorf("bundle 4: %v", err)
	}
	h.clean()
}

func TestNothingIsRecordedTwice(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	issue := h.issue()
	n := h.must(issue)
	confirm := &Confirm{Number: n, Serial: issue.Serial, How: "client-certificate"}
	revoke := &Revoke{Serial: issue.Serial, NotAfter: issue.NotAfter, By: "uid=0"}
	token := &Token{ID: "t", SPIFFEID: issue.SPIFFEID, Expires: h.clock.at() + 60, By: "uid=0"}
	for _, body := range []Body{confirm, revoke, token} {
		h.must(body)
		h.refused(ErrAlready, body)
		h.refused(ErrAlready, h.issue(), body) // nor as a part of more
	}
	h.refused(ErrNotFound, &Confirm{Number: 1, Serial: issue.Serial, How: "x"})
	h.refused(ErrNotFound, &Confirm{Number: n, Serial: Serial{9}, How: "x"})
	h.refused(ErrNotFound, &Confirm{Number: 99, Serial: issue.Serial, How: "x"})
	h.clean()
}

// One commit decides whether a renewal or the revocation of what it renews came first.
func TestARevokedCertificateIsNotRenewed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	issue := h.issue()
	n := h.must(issue)
	follows := func(i *Issue) { i.Replaces = n }
	revoke := &Revoke{Serial: issue.Serial, NotAfter: issue.NotAfter, By: "uid=0"}
	h.must(h.issue(follows))
	h.refused(ErrRevoked, revoke, h.issue(follows))
	h.must(h.issue(follows), revoke)
	h.refused(ErrRevoked, h.issue(follows))
	proven := func(subject string) func(*Issue) {
		return func(i *Issue) {
			i.Proofs = []Proof{{Method: "client-certificate", Issuer: "a", Subject: subject, Time: At(time.Now())}}
		}
	}
	h.refused(ErrRevoked, h.issue(proven(issue.Serial.String()))) // as an SDS stream that it opened asks, whose SVID replaces none
	h.must(h.issue(proven("0a0b")))
	h.must(h.issue())
	h.clean()
}

func TestAConfirmationRetiresWhatTheCertificateReplaces(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx := context.Background()
	confirm := func(n uint64) uint64 {
		t.Helper()
		e, err := h.Event(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		at := h.must(&Confirm{Number: n, Serial: e.Body.(*Issue).Serial, How: "client-certificate", Retires: 77})
		if e, err = h.Event(ctx, at); err != nil {
			t.Fatal(err)
		}
		return e.Body.(*Confirm).Retires
	}
	follows := func(n uint64, change ...func(*Issue)) uint64 {
		return h.must(h.issue(append(change, func(i *Issue) { i.Replaces = n })...))
	}
	total := func() (count uint64) {
		rows, err := h.Holdings()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			count += row.Count
		}
		return count
	}
	a := follows(0)
	b := follows(a)
	twin := follows(a)
	stranger := follows(a, func(i *Issue) { i.SPIFFEID = "spiffe://cluster.local/stranger" })
	nothing := follows(3) // no issue
	future := follows(1000)
	for _, step := range []struct {
		name       string
		number     uint64
		retires    uint64
		holdsAfter uint64
	}{
		{"first of its line", a, 0, 6}, {"another identity", stranger, 0, 6}, {"the successor", b, a, 5}, {"a second successor", twin, 0, 5},
		{"what replaces no certificate", nothing, 0, 5}, {"what replaces what is not there", future, 0, 5},
	} {
		if got := confirm(step.number); got != step.retires || total() != step.holdsAfter {
			t.Errorf("%s: confirming %d retires %d and leaves %d, want %d and %d", step.name, step.number, got, total(), step.retires, step.holdsAfter)
		}
	}
	if state, err := h.IssueState(a); err != nil || !state.Retired || !state.Confirmed {
		t.Errorf("issue %d: %+v, %v", a, state, err)
	}
	late := follows(b)
	h.clock.advance(2 * time.Hour)
	if got := confirm(late); got != 0 {
		t.Errorf("confirming after the old certificate expired retires %d", got)
	}
	h.clean()
}

func TestASingleUseTokenIsSpentOnceButALostResponseStrandsNobody(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const id = "spiffe://cluster.local/vm/1"
	h.must(&Token{ID: "t", SPIFFEID: id, Expires: h.clock.at() + 3600, By: "uid=0"})
	spend := func(i *Issue) { i.SPIFFEID, i.Token = id, "t" }
	h.refused(ErrTokenUnknown, h.issue(spend, func(i *Issue) { i.Token = "other" }))
	h.refused(ErrTokenUnknown, h.issue(spend, func(i *Issue) { i.SPIFFEID += "0" }))
	if err := h.Redeemable("other"); !errors.Is(err, ErrTokenUnknown) {
		t.Error(err)
	}
	last := uint64(0)
	for try := range 4 {
		if err := h.Redeemable("t"); err != nil {
			t.Errorf("try %d: %v", try, err)
		}
		n := h.must(h.issue(spend))
		e, err := h.Event(context.Background(), n)
		if err != nil || e.Body.(*Issue).Replaces != last {
			t.Errorf("try %d replaces %d (%v), want %d", try, e.Body.(*Issue).Replaces, err, last)
		}
		last = n
		h.clock.advance(time.Minute)
	}
	h.refused(ErrTokenSpent, h.issue(spend))
	if err := h.Redeemable("t"); !errors.Is(err, ErrTokenSpent) {
		t.Error(err)
	}
	record, err := h.Token("t")
	if err != nil || record.Redeemed != 4 || record.Last != last {
		t.Errorf("%+v, %v", record, err)
	}
	if _, err := h.Token("other"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	h.clean()
}

// A token that is redeemed again leaves one certificate that counts, the latest. Those before it may be in somebody's hands until they expire.
func TestOnlyTheLatestCertificateOfASingleUseTokenIsGood(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const id = "spiffe://cluster.local/vm/1"
	h.must(&Token{ID: "t", SPIFFEID: id, Expires: h.clock.at() + 3600, By: "uid=0"}, &Token{ID: "many", SPIFFEID: id, Expires: h.clock.at() + 3600, Reusable: true, By: "uid=0"})
	superseded := func(n uint64) bool {
		t.Helper()
		state, err := h.IssueState(n)
		if err != nil {
			t.Fatal(err)
		}
		return state.Superseded
	}
	confirm := func(n uint64) *Confirm {
		return &Confirm{Number: n, Serial: mustIssue(h, n).Serial, How: "client-certificate"}
	}
	held := h.must(h.issue(func(i *Issue) { i.SPIFFEID = id }))
	spend := func(i *Issue) { i.SPIFFEID, i.Token = id, "t" }
	first := h.must(h.issue(spend, func(i *Issue) { i.Supersedes = held })) // a caller cannot say so
	second := h.must(h.issue(spend, func(i *Issue) { i.Replaces = held }))  // its caller presented another certificate as well
	if got := mustIssue(h, first); got.Supersedes != 0 || superseded(held) {
		t.Errorf("the first redemption supersedes %d", got.Supersedes)
	}
	if got := mustIssue(h, second); got.Supersedes != first || got.Replaces != held {
		t.Errorf("the second redemption supersedes %d and replaces %d, want %d and %d", got.Supersedes, got.Replaces, first, held)
	}
	h.refused(ErrSuperseded, confirm(first))
	h.refused(ErrSuperseded, h.issue(), confirm(first))
	h.refused(ErrSuperseded, h.issue(spend), confirm(second)) // in one draft it is superseded, too
	h.reopen()
	third := h.must(h.issue(spend))
	for _, n := range []uint64{held, first, second, third} {
		if want := n == first || n == second; superseded(n) != want {
			t.Errorf("issue %d is superseded: %t", n, !want)
		}
	}
	h.refused(ErrSuperseded, confirm(second))
	at := h.must(confirm(third))
	if e, err := h.Event(context.Background(), at); err != nil || e.Body.(*Confirm).Retires != 0 {
		t.Errorf("the confirmation retires a certificate that somebody else may have: %+v, %v", e.Body, err)
	}
	h.refused(ErrTokenSpent, h.issue(spend))
	rows, err := h.Holdings()
	if err != nil || len(rows) != 1 || rows[0].Count != 4 {
		t.Errorf("holdings %+v, %v: all four may be in use", rows, err)
	}

	reusable := func(i *Issue) { i.SPIFFEID, i.Token = id, "many" }
	one := h.must(h.issue(reusable))
	two := h.must(h.issue(reusable))
	if superseded(one) || mustIssue(h, two).Supersedes != 0 {
		t.Error("a reusable token supersedes")
	}
	h.must(confirm(one), confirm(two))
	h.clean()
	h.reopen()
	h.clean()
}

func TestASpentTokenIsNotRedeemedAgain(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		token Token
		after func(h *house, n uint64, issue *Issue)
		want  error // nil: redeemed again
	}{
		{"at once", Token{}, func(h *house, n uint64, issue *Issue) {}, nil},
		{"five minutes later", Token{}, func(h *house, n uint64, issue *Issue) { h.clock.advance(5 * time.Minute) }, nil},
		{"more than five minutes later", Token{}, func(h *house, n uint64, issue *Issue) { h.clock.advance(301 * time.Second) }, ErrTokenSpent},
		{"its certificate was confirmed", Token{}, func(h *house, n uint64, issue *Issue) {
			h.must(&Confirm{Number: n, Serial: issue.Serial, How: "client-certificate"})
		}, ErrTokenSpent},
		{"its certificate was revoked", Token{}, func(h *house, n uint64, issue *Issue) {
			h.must(&Revoke{Serial: issue.Serial, NotAfter: issue.NotAfter, By: "uid=0"})
		}, ErrTokenSpent},
		{"another certificate was revoked", Token{}, func(h *house, n uint64, issue *Issue) {
			h.must(&Revoke{Serial: Serial{9}, NotAfter: issue.NotAfter, By: "uid=0"})
		}, nil},
		{"expired", Token{}, func(h *house, n uint64, issue *Issue) { h.clock.advance(time.Hour) }, ErrTokenExpired},
		{"reusable, much later", Token{Reusable: true}, func(h *house, n uint64, issue *Issue) { h.clock.advance(30 * time.Minute) }, nil},
		{"reusable, expired", Token{Reusable: true}, func(h *house, n uint64, issue *Issue) { h.clock.advance(time.Hour) }, ErrTokenExpired},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			token := test.token
			token.ID, token.SPIFFEID, token.Expires, token.By = "t", "spiffe://cluster.local/vm/1", h.clock.at()+3600, "uid=0"
			issue := h.issue(func(i *Issue) { i.SPIFFEID, i.Token = token.SPIFFEID, "t" })
			n := h.must(&token, issue) + 1
			test.after(h, n, issue)
			again := h.issue(func(i *Issue) { i.SPIFFEID, i.Token = token.SPIFFEID, "t" })
			if err := h.Redeemable("t"); !errors.Is(err, test.want) {
				t.Errorf("Redeemable: %v, want %v", err, test.want)
			}
			if test.want != nil {
				h.refused(test.want, again)
				return
			}
			e, err := h.Event(context.Background(), h.must(again))
			if err != nil {
				t.Fatal(err)
			}
			if replaces := e.Body.(*Issue).Replaces; (replaces != n) != token.Reusable {
				t.Errorf("the second redemption replaces %d", replaces)
			}
			h.clean()
		})
	}
}

// Two machines with one token: exactly as many redemptions as allowed win, whatever the order.
func TestOneCommitDecidesWhoSpendsAToken(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const id = "spiffe://cluster.local/vm/1"
	h.must(&Token{ID: "t", SPIFFEID: id, Expires: h.clock.at() + 3600, By: "uid=0"})
	results := make(chan error)
	for range 20 {
		go func() {
			_, err := h.Append(context.Background(), h.issue(func(i *Issue) { i.SPIFFEID, i.Token = id, "t" }))
			results <- err
		}()
	}
	won := 0
	for range 20 {
		if err := <-results; err == nil {
			won++
		} else if !errors.Is(err, ErrTokenSpent) {
			t.Error(err)
		}
	}
	if won != 4 {
		t.Errorf("%d redemptions, want the first and three more", won)
	}
	h.clean()
}

func TestWhatCannotBeReadBackIsNotRecorded(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tests := map[string][]Body{
		"nothing":               {},
		"nil":                   {nil},
		"invalid UTF-8":         {h.issue(func(i *Issue) { i.ClusterID = "\xff" })},
		"no serial":             {h.issue(func(i *Issue) { i.Serial = nil })},
		"leading zeros":         {h.issue(func(i *Issue) { i.Serial = Serial{0, 1} })},
		"ends before it begins": {h.issue(func(i *Issue) { i.NotAfter = i.NotBefore - 1 })},
		"no delivery":           {h.issue(func(i *Issue) { i.Delivery = 0 })},
		"too many names":        {h.issue(func(i *Issue) { i.Names = make([]string, 10000) })},
		"too large":             {h.issue(func(i *Issue) { i.Profile = strings.Repeat("x", maxEvent) })},
		"of a later version":    {&Unknown{Of: 77, Raw: []byte{0xa0}}},
		"bundle without roots":  {&Bundle{TrustDomain: domain, Sequence: 2, Floor: 1}},
		"token without id":      {&Token{SPIFFEID: "spiffe://cluster.local/x"}},
		"too many at once":      make([]Body, maxDraft+1),
	}
	for name, bodies := range tests {
		t.Run(name, func(t *testing.T) {
			if n, err := h.Append(context.Background(), bodies...); err == nil {
				t.Errorf("it was recorded as event %d", n)
			}
		})
	}
	if h.Head().Number != 3 {
		t.Error("something was recorded")
	}
	h.clean()
}
