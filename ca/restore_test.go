package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/backup"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

// backup makes a backup of the running CA.
func (f *fixture) backup(t *testing.T) (path string) {
	t.Helper()
	made, err := backup.Take(t.Context(), f.ca, "0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "backup.tar")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(made.Write(file), file.Close(), made.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// restore makes a CA of a backup, on the same clock, while the lost one goes on.
func (f *fixture) restore(t *testing.T, path string) *fixture {
	t.Helper()
	r := &fixture{dir: filepath.Join(t.TempDir(), "restored"), clock: f.clock, profile: f.profile, issuing: f.issuing}
	if _, err := backup.Restore(t.Context(), backup.Options{From: path, Dir: r.dir, By: "test", Version: "0.1.0", Clock: f.clock.clock(),
		Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestARestoredCASignsWithANewIssuingCAAtOnce(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	old := f.mustIssue(t, f.caller("/ns/default/sa/old"), 0)
	r := f.restore(t, f.backup(t))
	r.mustOpen(t)
	if got := r.states(t); got != "retired active" {
		t.Fatalf("states %q", got)
	}
	young := r.mustIssue(t, r.caller("/ns/default/sa/young"), 0)
	log := r.ledger.Head().Log
	if young.Authority == old.Authority || string(young.Serial[1:4]) != string(log[:3]) || log == f.ledger.Head().Log {
		t.Errorf("serial %s under %s, in log %s", young.Serial, young.Authority, log)
	}
	if young.Bundle.Sequence < uint64(f.clock.clock().Wall().Unix()) || young.Bundle.PEM != old.Bundle.PEM {
		t.Errorf("its bundle has the sequence %d", young.Bundle.Sequence)
	}
	for _, issued := range []*ca.Issued{old, young} {
		if err := r.verify(t, issued); err != nil {
			t.Error(err)
		}
	}
	all, err := r.ca.Authorities()
	if err != nil || all[0].Coverage.Kind != "since" || all[1].Coverage.Kind != "since" || all[2].Coverage.Kind != "complete" {
		t.Errorf("%+v, %v", all, err)
	}
	r.reopen(t)
	if got := r.states(t); got != "retired active" {
		t.Errorf("another start made another issuing CA: %q", got)
	}
	report, err := r.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("%+v, %v", report, err)
	}
}

func TestARestoredCAWhoseRootIsAwaySignsWithWhatItHas(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	r := f.restore(t, f.backup(t))
	good, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(r.dir, "root"), TrustDomain: td.Name()})
	if err != nil {
		t.Fatal(err)
	}
	down := errors.New("the vault is sealed")
	r.root = badRoot{good, func(root *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
		if down != nil {
			return nil, down
		}
		return root.Certify(context.Background(), q)
	}}
	r.mustOpen(t)
	r.mustIssue(t, r.caller("/ns/default/sa/web"), 0)
	if problems := r.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "the vault is sealed") {
		t.Errorf("problems %v", problems)
	}
	down = nil
	r.ca.Housekeep(t.Context())
	if got := r.states(t); got != "retired active" || len(r.ca.Problems()) > 0 {
		t.Errorf("states %q, problems %v", got, r.ca.Problems())
	}
}

// TestWhatTheLostCAIssuedCountsAsTheCoverageSays: what it issued before the backup is known, what it issued between backup and restore is not, and
// after that the ledger must know everything.
func TestWhatTheLostCAIssuedCountsAsTheCoverageSays(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	before := f.mustIssue(t, f.caller("/ns/default/sa/before"), 0)
	saved := f.backup(t)
	between := f.mustIssue(t, f.caller("/ns/default/sa/between"), 0)
	f.clock.pass(time.Minute)
	r := f.restore(t, saved)
	f.clock.pass(2 * time.Minute)
	after := f.mustIssue(t, f.caller("/ns/default/sa/after"), 0)
	f.clock.pass(f.issuing/2 + time.Minute)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.clock.jump(-f.issuing / 2)
	r.mustOpen(t)
	verify := func(issued *ca.Issued) (ca.ClientCertificate, error) {
		return r.ca.ClientCertificates().Verify(t.Context(), []*x509.Certificate{parse(t, issued.DER)})
	}
	if proven, err := verify(before); err != nil || proven.Number != before.Number || proven.First == nil {
		t.Errorf("of before the backup: %+v, %v", proven, err)
	}
	if proven, err := verify(between); err != nil || proven.Number != 0 || proven.First != nil || !proven.Own {
		t.Errorf("of between backup and restore: %+v, %v", proven, err)
	}
	if proven, err := verify(after); !errors.Is(err, ca.ErrUnauthenticated) || !strings.Contains(err.Error(), "is not in the ledger") {
		t.Errorf("of after the restore: %+v, %v", proven, err)
	}
	f.clock.jump(f.issuing / 2)
	young := f.mustIssue(t, f.caller("/ns/default/sa/young"), 0)
	if proven, err := verify(young); !errors.Is(err, ca.ErrUnauthenticated) || !strings.Contains(err.Error(), "none of the issuing CAs that count") {
		t.Errorf("of an issuing CA that was made after the backup: %+v, %v", proven, err)
	}
}

// TestARestoredIssuingCAIsRemovedOnlyAfterItsOwnEnd, where one that the ledger knows everything of goes when nothing is left under it.
func TestARestoredIssuingCAIsRemovedOnlyAfterItsOwnEnd(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	all, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	end := all[1].NotAfter
	r := f.restore(t, f.backup(t))
	r.mustOpen(t)
	left := end.Sub(f.clock.clock().Wall())
	for _, step := range []struct {
		pass time.Duration
		want string
	}{{48 * time.Hour, "retired active"}, {left - 48*time.Hour, "retired removed active"}, {2 * time.Hour, "removed removed active"}} {
		f.clock.pass(step.pass)
		r.ca.Housekeep(t.Context())
		if got := r.states(t); got != step.want {
			t.Errorf("%s after its end: states %q, want %q", f.clock.clock().Wall().Sub(end), got, step.want)
		}
	}
}

// TestARestoredCAUnderARootOfOthersWaitsForTheWindowAndNoLonger: what the lost CA, and whoever shares the root, signed up to the restore has ended when the window has gone by since.
// Then another root may sign; it does not take the old root's own end.
func TestARestoredCAUnderARootOfOthersWaitsForTheWindowAndNoLonger(t *testing.T) {
	f, root, first := newMoving(t)
	f.foreign = ledger.Coverage{Kind: "foreign", Until: ledger.At(f.clock.clock().Wall().Add(f.window))}
	issuing, next := makeCA(t, f, "an intermediate", first, nil), makeCA(t, f, "the next root", nil, nil)
	root.bring(issuing)
	f.mustOpen(t)
	f.clock.pass(f.window - time.Hour)
	r := f.restore(t, f.backup(t))
	r.root, r.window, r.foreign = root, f.window, f.foreign
	r.mustOpen(t)
	if err := r.signs(t, issuing); err != nil {
		t.Fatal(err)
	}
	end := f.clock.clock().Wall().Add(f.window)
	all, err := r.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if a.Coverage.Kind != "foreign" || a.UnseenUntil == nil || a.UnseenUntil.Sub(end).Abs() > time.Minute {
			t.Errorf("of %s it says %+v, and that others live until %v, where the window ends at %s", a.Subject, a.Coverage, a.UnseenUntil, end)
		}
	}
	root.set(func() { root.anchors = []*madeCA{next, first} })
	root.bring(makeCA(t, f, "an intermediate of the next root", next, nil))
	r.chores(t)
	r.clock.pass(f.window - time.Hour)
	if err := r.ca.RenewIssuing(t.Context()); err == nil || !strings.Contains(err.Error(), "no issuing CA signs under the new root") {
		t.Errorf("within the window the next root signs: %v", err)
	}
	r.clock.pass(2 * time.Hour)
	if err := r.ca.RenewIssuing(t.Context()); err != nil {
		t.Errorf("after the window: %v", err)
	}
}
