package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"

	"kedge/ca"
	"kedge/ca/ledger"
)

// stream gets an SVID as an SDS stream does: the CA makes the key.
func (f *fixture) stream(t *testing.T, caller ca.Caller) *ca.Issued {
	t.Helper()
	granted, err := f.ca.Grant(caller, "")
	if err != nil {
		t.Fatal(err)
	}
	requested, err := granted.ForKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	issued, err := requested.Issue(t.Context(), ca.Request{Delivery: ledger.DeliverySDS, RequestID: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func TestAKeyThatTheCAMadeIsJudgedLikeThatOfACSR(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	issued := f.stream(t, f.caller("/ns/default/sa/web"))
	if err := f.verify(t, issued); err != nil {
		t.Error(err)
	}
	granted, err := f.ca.Grant(f.caller("/ns/default/sa/web"), "")
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, pub := range []any{&weak.PublicKey, &curve.PublicKey, nil} {
		if _, err := granted.ForKey(pub); !errors.Is(err, ca.ErrDenied) || errors.Is(err, ca.ErrInvalid) {
			t.Errorf("%T: %v", pub, err)
		}
	}
}

func TestWhatAHolderAcknowledgedOrPresentedIsInTheLedgerOnce(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	ctx, one := t.Context(), f.stream(t, f.caller("/ns/default/sa/web"))
	two := f.mustIssue(t, f.caller("/ns/default/sa/vm"), 0)
	presented := &ca.Presented{Number: two.Number, Serial: two.Serial}
	for range 2 {
		if err := f.ca.Acknowledged(ctx, one.Number, one.Serial, 1); err != nil {
			t.Error(err)
		}
		if err := errors.Join(f.ca.Presented(ctx, presented), f.ca.Presented(ctx, nil)); err != nil {
			t.Error(err)
		}
	}
	var found []ledger.Confirm
	for e, err := range f.ledger.Events(ctx, ledger.Filter{Types: []ledger.Type{ledger.TypeConfirm}}) {
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, *e.Body.(*ledger.Confirm))
	}
	if len(found) != 2 || found[0].How != "sds-ack" || found[0].Bundle != 1 || found[1].How != ca.MethodClientCertificate || found[1].Bundle != 0 {
		t.Errorf("%+v", found)
	}
	if err := f.ca.Acknowledged(ctx, one.Number, one.Serial, 2); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("a bundle that there is not: %v", err)
	}
	if err := f.ca.Acknowledged(ctx, one.Number, two.Serial, 1); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("another certificate: %v", err)
	}
	if err := f.ca.Presented(ctx, &ca.Presented{Number: 1, Serial: two.Serial}); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("no certificate: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := f.ca.Acknowledged(ended, two.Number, two.Serial, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("after its time: %v", err)
	}
}

// All streams acknowledge a new root in the same second, while others want certificates.
func TestThousandsMayAcknowledgeAtOnce(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	one := f.stream(t, f.caller("/ns/default/sa/web"))
	event, err := f.ledger.Event(t.Context(), one.Number)
	if err != nil {
		t.Fatal(err)
	}
	const holders = 4096
	issues := make([]ledger.Body, holders) // like it, but for their serials
	for i := range issues {
		issue := *event.Body.(*ledger.Issue)
		issue.Serial = binary.BigEndian.AppendUint64(ledger.Serial{1}, uint64(i))
		issues[i] = &issue
	}
	first := one.Number + 1
	for batch := range slices.Chunk(issues, 256) {
		if _, err := f.ledger.Append(t.Context(), batch...); err != nil {
			t.Fatal(err)
		}
	}
	var group sync.WaitGroup
	for i, body := range issues {
		group.Go(func() {
			if err := f.ca.Acknowledged(t.Context(), first+uint64(i), body.(*ledger.Issue).Serial, 1); err != nil {
				t.Error(err)
			}
		})
	}
	f.mustIssue(t, f.caller("/ns/default/sa/other"), 0)
	group.Wait()
	held := map[uint64]uint64{}
	rows, err := f.ledger.Holdings()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		held[row.Bundle] += row.Count
	}
	if held[0] != 1 || held[1] != holders+1 || len(held) != 2 {
		t.Errorf("by bundle there are %v", held)
	}
}

func TestABundleNamesTheIncarnationThatNumberedIt(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	if got := f.ca.Bundle().Incarnation(); got.IsZero() || got != f.ledger.Head().Incarnation {
		t.Errorf("%s", got)
	}
	if f.ca.Floor() != f.ca.Bundle().Sequence {
		t.Errorf("the floor is %d", f.ca.Floor())
	}
}
