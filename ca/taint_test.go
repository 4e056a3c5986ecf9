package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

func (f *fixture) present(t *testing.T, issued *ca.Issued) (ca.ClientCertificate, error) {
	t.Helper()
	return f.ca.ClientCertificates().Verify(t.Context(), []*x509.Certificate{parse(t, issued.DER)})
}

func TestATaintedIssuingCASignsNoMoreAndItsCertificatesAuthenticateNobody(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	old := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if proven, err := f.present(t, old); err != nil || proven.Number != old.Number {
		t.Fatalf("before: %+v %v", proven, err)
	}
	changed := f.ca.Changed()
	if err := f.ca.Taint(t.Context(), old.Authority, "its key was copied", "uid 0"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told")
	}
	if got := f.states(t); got != "retired active" {
		t.Errorf("states %q", got)
	}
	young := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if young.Authority == old.Authority {
		t.Error("it still signs")
	}
	for _, when := range []string{"at once", "after a restart"} {
		if _, err := f.present(t, old); !errors.Is(err, ca.ErrUnauthenticated) || !strings.Contains(err.Error(), "tainted") {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := f.present(t, young); err != nil {
			t.Errorf("%s, under the new one: %v", when, err)
		}
		if err := f.verify(t, old); err != nil {
			t.Errorf("%s it no longer verifies among workloads: %v", when, err)
		}
		f.reopen(t)
	}
	if err := f.ca.Taint(t.Context(), old.Authority, "again", "uid 0"); !errors.Is(err, ledger.ErrAlready) {
		t.Errorf("a second time: %v", err)
	}
}

func TestTaintingARetiredIssuingCALeavesTheOneThatSigns(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing/2 - time.Hour)
	old := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	f.clock.pass(2 * time.Hour)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, _ := f.ca.Active()
	if err := f.ca.Taint(t.Context(), old.Authority, "", "uid 0"); err != nil {
		t.Fatal(err)
	}
	if after, ok := f.ca.Active(); !ok || after != before {
		t.Error("the one that signs was replaced")
	}
	if _, err := f.present(t, old); !errors.Is(err, ca.ErrUnauthenticated) {
		t.Errorf("error %v", err)
	}
}

func TestWhatIsNoIssuingCAOfThisLedgerIsNotTainted(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	if err := f.ca.Taint(t.Context(), ledger.Hash{1}, "", "uid 0"); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	all, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.ca.Taint(t.Context(), all[0].ID, "", "uid 0"); all[0].Role != ledger.RoleRoot || !errors.Is(err, ca.ErrInvalid) {
		t.Errorf("a root: %v", err)
	}
}

func TestATaintCountsThoughNoNewIssuingCACanBeMadeNow(t *testing.T) {
	f := newFixture(t)
	good, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name(), Now: f.clock.clock().Wall})
	if err != nil {
		t.Fatal(err)
	}
	var down error
	f.root = badRoot{good, func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
		if down != nil {
			return nil, down
		}
		return r.Certify(context.Background(), q)
	}}
	f.mustOpen(t)
	old := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	down = errors.New("the vault is sealed")
	if err := f.ca.Taint(t.Context(), old.Authority, "", "uid 0"); err == nil || !strings.Contains(err.Error(), "is tainted") || !errors.Is(err, down) {
		t.Errorf("error %v", err)
	}
	if _, err := f.present(t, old); !errors.Is(err, ca.ErrUnauthenticated) {
		t.Errorf("it still authenticates: %v", err)
	}
	if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("issuing: %v", err)
	}
	if len(f.ca.Problems()) == 0 {
		t.Error("it is no problem")
	}
	down = nil
	f.ca.Housekeep(t.Context())
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
}
