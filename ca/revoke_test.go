package ca_test

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

// renew does what a call with that certificate does.
func (f *fixture) renew(t *testing.T, caller ca.Caller, issued *ca.Issued) (*ca.Issued, error) {
	proven, err := f.present(t, issued)
	if err != nil {
		return nil, err
	}
	caller.Presented, caller.Replaces = &ca.Presented{Number: proven.Number, Serial: proven.Serial}, proven.Number
	return f.issue(t, caller, 0)
}

func numbers(revoked []ledger.Revoke) (all []uint64) {
	for _, r := range revoked {
		all = append(all, r.Number)
	}
	return all
}

func TestALineageIsRevokedFromACertificateOn(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/default/sa/web")
	renew := func(issued *ca.Issued) *ca.Issued {
		t.Helper()
		next, err := f.renew(t, caller, issued)
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	first := f.mustIssue(t, caller, 0)
	f.clock.pass(13 * time.Hour)
	second := renew(first)
	f.clock.pass(12 * time.Hour) // the first has expired
	third, twin := renew(second), renew(second)
	fourth := renew(twin)
	other := renew(f.mustIssue(t, caller, 0))

	one, err := f.ca.Revoke(t.Context(), second.Serial, "r", "uid 0")
	if err != nil || !slices.Equal(numbers(one.Revoked), []uint64{second.Number}) || len(one.Alive) != 3 || one.Alive[2].Number != fourth.Number {
		t.Errorf("the certificate alone: %+v, %v", one, err)
	}
	if _, err := f.present(t, fourth); err != nil {
		t.Errorf("what follows on it: %v", err)
	}
	if _, err := f.ca.Revoke(t.Context(), second.Serial, "r", "uid 0"); !errors.Is(err, ledger.ErrAlready) {
		t.Errorf("once more: %v", err)
	}
	all, err := f.ca.RevokeLineage(t.Context(), first.Serial, "r", "uid 0")
	if err != nil || !slices.Equal(numbers(all.Revoked), []uint64{third.Number, twin.Number, fourth.Number}) || len(all.Alive) != 0 {
		t.Errorf("the lineage: %+v, %v", all, err)
	}
	if _, err := f.ca.RevokeLineage(t.Context(), first.Serial, "r", "uid 0"); !errors.Is(err, ledger.ErrAlready) {
		t.Errorf("the lineage once more: %v", err)
	}
	if _, err := f.ca.RevokeLineage(t.Context(), ledger.Serial{9}, "r", "uid 0"); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("an unknown one: %v", err)
	}
	if _, err := f.present(t, other); err != nil {
		t.Errorf("another lineage of the same identity: %v", err)
	}
}

// Hundreds of successors, and holders that go on renewing meanwhile: when the lineage is revoked, none of it is left.
func TestNobodyOutrunsTheRevocationOfALineage(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/default/sa/web")
	first := f.mustIssue(t, caller, 0)
	if _, err := f.renew(t, caller, first); err != nil {
		t.Fatal(err)
	}
	event, err := f.ledger.Event(t.Context(), first.Number)
	if err != nil {
		t.Fatal(err)
	}
	var twins []ledger.Body
	for n := range 250 {
		twin := *event.Body.(*ledger.Issue)
		twin.Serial, twin.Replaces = append(slices.Clone(twin.Serial[:len(twin.Serial)-1]), byte(n), 1), first.Number
		twins = append(twins, &twin)
	}
	if _, err := f.ledger.Append(t.Context(), twins...); err != nil {
		t.Fatal(err)
	}

	started := make(chan struct{}, 8)
	var renewing sync.WaitGroup
	for range cap(started) {
		renewing.Go(func() {
			holds := first
			for n := 0; ; n++ {
				next, err := f.renew(t, caller, holds)
				if errors.Is(err, ca.ErrUnauthenticated) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				holds = next
				if n == 3 {
					started <- struct{}{}
				}
			}
		})
	}
	for range cap(started) {
		<-started
	}
	done, err := f.ca.RevokeLineage(t.Context(), first.Serial, "stolen", "uid 0")
	if err != nil {
		t.Fatal(err)
	}
	renewing.Wait()
	if len(done.Revoked) < 250+8 {
		t.Errorf("%d are revoked", len(done.Revoked))
	}
	for event, err := range f.ledger.Events(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, SPIFFEID: caller.ID.String()}) {
		if err != nil {
			t.Fatal(err)
		}
		if revoked, err := f.ledger.Revoked(event.Body.(*ledger.Issue).Serial); err != nil || !revoked {
			t.Errorf("number %d is not revoked, %v", event.Number, err)
		}
	}
}
