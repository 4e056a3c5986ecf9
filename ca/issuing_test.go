package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

// states lists the issuing CAs' states in order of entry.
func (f *fixture) states(t *testing.T) string {
	t.Helper()
	all, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	var states []string
	for _, a := range all {
		if a.Role == ledger.RoleIssuing {
			states = append(states, a.State.String())
		}
	}
	return strings.Join(states, " ")
}

// active is the issuing CA that signs.
func (f *fixture) active(t *testing.T) ledger.Hash {
	t.Helper()
	id, ok := f.ca.Active()
	if !ok {
		t.Fatal("there is no active issuing CA")
	}
	return id
}

func TestTheFirstStartMakesARootAndAnIssuingCAAndARestartKeepsThem(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	before, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	bundle := f.ca.Bundle()
	f.reopen(t)
	after, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != 2 || len(after) != 2 || before[1].ID != after[1].ID || after[0].State != ledger.StateActive || after[1].State != ledger.StateActive {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	if again := f.ca.Bundle(); again.PEM != bundle.PEM || again.Sequence != 1 {
		t.Errorf("the bundle's bytes changed: sequence %d", again.Sequence)
	}
}

func TestTheIssuingCAIsRenewedAtHalfItsLifeAndWhatItIssuedStaysGood(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	old := f.mustIssue(t, f.caller("/ns/default/sa/old"), 0)
	changed := f.ca.Changed()
	if err := f.ca.RenewIssuing(t.Context()); err != nil || f.states(t) != "active" {
		t.Fatalf("renewed too early: %v, %s", err, f.states(t))
	}
	f.clock.pass(f.issuing/2 + time.Minute)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told of the change")
	}
	if got := f.states(t); got != "retired active" {
		t.Errorf("states %q", got)
	}
	young := f.mustIssue(t, f.caller("/ns/default/sa/young"), 0)
	if old.Authority == young.Authority {
		t.Error("the old one still signs")
	}
	if err := f.verify(t, young); err != nil {
		t.Errorf("under the new one: %v", err)
	}
	if old.Bundle.PEM != young.Bundle.PEM {
		t.Error("a renewal of the issuing CA changed the bundle")
	}
}

func TestWhatIsStillValidUnderTheOldIssuingCAVerifiesAfterARenewal(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing/2 - 2*time.Hour)
	old := f.mustIssue(t, f.caller("/ns/default/sa/old"), 0)
	f.clock.pass(3 * time.Hour)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.verify(t, old); err != nil {
		t.Error(err)
	}
}

func TestARetiredIssuingCAIsRemovedOnlyWhenNothingUnderItIsAlive(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing / 2)
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 24*time.Hour)
	f.ca.Housekeep(t.Context())
	if got := f.states(t); got != "retired active" {
		t.Fatalf("states %q", got)
	}
	keys, err := filepath.Glob(filepath.Join(f.dir, "keys", "*.pem"))
	if err != nil || len(keys) != 2 {
		t.Fatalf("keys %v %v", keys, err)
	}
	f.clock.jump(365 * 24 * time.Hour)
	f.ca.RemoveRetired(t.Context())
	if got := f.states(t); got != "retired active" {
		t.Errorf("a jump of the clock removed it: %q", got)
	}
	f.clock.jump(-365 * 24 * time.Hour)
	f.clock.pass(23 * time.Hour)
	f.ca.Housekeep(t.Context())
	if got := f.states(t); got != "retired active" {
		t.Errorf("removed while a certificate lives: %q", got)
	}
	f.clock.pass(3 * time.Hour)
	f.ca.Housekeep(t.Context())
	if got := f.states(t); got != "removed active" {
		t.Errorf("states %q", got)
	}
	if keys, err = filepath.Glob(filepath.Join(f.dir, "keys", "*.pem")); err != nil || len(keys) != 1 {
		t.Errorf("its key is still there: %v %v", keys, err)
	}
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
}

func TestACrashBetweenPreparedAndActiveIsHealedByTheNextStart(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing/2 + time.Minute)
	if err := f.ca.CrashAfterPreparing(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.reopen(t)
	if got := f.states(t); got != "retired prepared active" {
		t.Errorf("states %q", got)
	}
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	f.clock.pass(f.issuing/2 + time.Minute)
	f.ca.Housekeep(t.Context())
	f.ca.Housekeep(t.Context())
	if got := f.states(t); strings.Contains(got, "prepared") {
		t.Errorf("the half-made one is left behind: %q", got)
	}
}

func TestALostIssuingKeyMeansANewIssuingCA(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	store, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(f.dir, "keys")})
	if err != nil {
		t.Fatal(err)
	}
	records, err := f.ledger.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), records[1].KeyRef); err != nil {
		t.Fatal(err)
	}
	f.reopen(t)
	if got := f.states(t); got != "retired active" {
		t.Errorf("states %q", got)
	}
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
}

func TestARootThatIsNotTheLedgersIsRefused(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	if err := f.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := file.OpenRoot(file.RootOptions{Dir: t.TempDir(), TrustDomain: td.Name()})
	if err != nil {
		t.Fatal(err)
	}
	f.root = other
	if err := f.open(t); err == nil || !strings.Contains(err.Error(), "data folder") {
		t.Errorf("error %v", err)
	}
}

// badRoot is a file root whose certificates were tampered with on the way, as a misconfigured or hostile parent CA's would be.
type badRoot struct {
	ca.Root
	tamper func(root *file.Root, request ca.CertifyRequest) ([]*x509.Certificate, error)
}

func (b badRoot) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	return b.tamper(b.Root.(*file.Root), request)
}

func TestAnIssuingCACertificateThatIsNotWhatWasAskedForIsNeverUsed(t *testing.T) {
	certify := func(r *file.Root, request ca.CertifyRequest) ([]*x509.Certificate, error) {
		return r.Certify(context.Background(), request)
	}
	tampers := map[string]struct {
		tamper func(r *file.Root, request ca.CertifyRequest) ([]*x509.Certificate, error)
		says   string
	}{
		"nothing": {func(*file.Root, ca.CertifyRequest) ([]*x509.Certificate, error) { return nil, nil }, "no certificate"},
		"another key": {func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
			key, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: t.TempDir()})
			if err != nil {
				return nil, err
			}
			_, signer, err := key.Create(context.Background(), ca.P256)
			if err != nil {
				return nil, err
			}
			q.PublicKey = signer.Public()
			return certify(r, q)
		}, "public key"},
		"longer than asked": {func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
			q.NotAfter = q.NotAfter.Add(time.Hour)
			return certify(r, q)
		}, "longer than"},
		"another trust domain's": {func(*file.Root, ca.CertifyRequest) ([]*x509.Certificate, error) {
			return nil, errors.New("permission denied")
		}, "permission denied"},
		"the root itself": {func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
			return r.Roots(context.Background())
		}, "public key"},
		"the root in the chain": {func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
			chain, err := certify(r, q)
			if err != nil {
				return nil, err
			}
			roots, err := r.Roots(context.Background())
			return append(chain, roots...), err
		}, "not in order"},
	}
	for name, test := range tampers {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			good, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name()})
			if err != nil {
				t.Fatal(err)
			}
			f.root = badRoot{good, test.tamper}
			if err := f.open(t); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("error %v", err)
			}
			records, err := f.ledger.Authorities()
			if err != nil || len(records) != 1 {
				t.Errorf("it entered the ledger: %+v %v", records, err)
			}
			if keys, err := filepath.Glob(filepath.Join(f.dir, "keys", "*.pem")); err != nil || len(keys) > 0 {
				t.Errorf("its key is left: %v %v", keys, err)
			}
		})
	}
}

// badKey does not sign as it should, as a broken token's would not.
// It signs right as often as right says, and then no more.
type badKey struct {
	crypto.Signer
	right int
	sign  func() ([]byte, error)
}

func (b *badKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if b.right > 0 {
		b.right--
		return b.Signer.Sign(random, digest, opts)
	}
	return b.sign()
}

// oneKey is a key store that hands out one key.
type oneKey struct{ key crypto.Signer }

func (o oneKey) Create(context.Context, ca.KeySpec) (string, crypto.Signer, error) {
	return "bad", o.key, nil
}
func (oneKey) Open(context.Context, string) (crypto.Signer, error) { return nil, fs.ErrNotExist }
func (oneKey) Delete(context.Context, string) error                { return nil }

func TestAKeyThatDoesNotSignRightIsNeverUsed(t *testing.T) {
	for name, sign := range map[string]func() ([]byte, error){
		"it fails":                 func() ([]byte, error) { return nil, errors.New("the token is gone") },
		"its signature is garbage": func() ([]byte, error) { return []byte{1, 2, 3}, nil },
		"its signature is another's": func() ([]byte, error) {
			return newKey(t).Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for right, want := range []string{"signing the request", "throwaway"} {
				f := newFixture(t)
				f.keys = oneKey{&badKey{newKey(t), right, sign}}
				if err := f.open(t); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("after %d good signatures: error %v", right, err)
				}
			}
		})
	}
}

func TestAFailedRenewalKeepsTheOldOneAndIsReported(t *testing.T) {
	f := newFixture(t)
	good, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name()})
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
	down = errors.New("the vault is sealed")
	f.clock.pass(f.issuing/2 + time.Minute)
	f.ca.Housekeep(t.Context())
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	problems := f.ca.Problems()
	if len(problems) != 1 || !strings.Contains(problems[0].Error(), "the vault is sealed") ||
		!strings.Contains(problems[0].Error(), "The issuing CA that there is ends at ") {
		t.Errorf("problems %v", problems)
	}
	down = nil
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
	if got := f.states(t); got != "retired active" {
		t.Errorf("states %q", got)
	}
}

func TestAClockThatWasAheadAndIsRightAgainCostsNothingButANewIssuingCA(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	const ahead = 60 * 24 * time.Hour
	f.clock.jump(ahead)
	if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("under an issuing CA that has expired: %v", err)
	}
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	early := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if err := f.verify(t, early); err != nil {
		t.Errorf("while the clock is ahead: %v", err)
	}

	f.clock.jump(-ahead)
	for what, err := range map[string]error{
		"issuing":   func() error { _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); return err }(),
		"readiness": f.ca.Ready(t.Context()),
	} {
		if !errors.Is(err, ca.ErrUnavailable) || !strings.Contains(err.Error(), "the clock was set back") {
			t.Errorf("%s under an issuing CA whose life has not begun: %v", what, err)
		}
	}
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.ca.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	now := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if err := f.verify(t, now); err != nil {
		t.Errorf("after the clock was set right: %v", err)
	}
	if before := f.active(t); f.ca.RenewIssuing(t.Context()) != nil || f.active(t) != before {
		t.Error("another issuing CA was made, though the new one is in the first half of its life")
	}
	f.reopen(t)
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	f.ca.Housekeep(t.Context())
	if got := f.states(t); got != "removed retired active" { // nothing was issued under the first; of the second there is a certificate
		t.Errorf("states %q", got)
	}
	f.verifyLedger(t)
}

// TestNothingIsPrunedOnTheWordOfAClockThatJumpedAhead, until a token issuer's fresh token bears the clock out.
func TestNothingIsPrunedOnTheWordOfAClockThatJumpedAhead(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.mustIssue(t, f.caller("/ns/default/sa/web"), time.Hour)
	f.clock.jump(24 * time.Hour) // the retention time is an hour
	for range 2 {
		f.ca.Housekeep(t.Context())
		f.mustIssue(t, f.caller("/ns/default/sa/web"), time.Hour)
	}
	if first := f.ledger.Head().First; first != 1 {
		t.Errorf("the log begins with %d", first)
	}
	if problems := f.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "nothing is pruned or removed for what lies between") {
		t.Errorf("problems %v", problems)
	}
	caller := f.caller("/ns/default/sa/web")
	caller.IssuedAt = f.clock.clock().Wall().Add(-2 * time.Minute)
	f.mustIssue(t, caller, time.Hour)
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("a fresh token was shown, and there are the problems %v", problems)
	}
	if first := f.ledger.Head().First; first == 1 {
		t.Error("nothing is pruned though the clock was borne out")
	}
	f.verifyLedger(t)
}

func TestAClockBeforeTheRootsLifeIsAProblemAndMakesNoIssuingCAs(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.jump(-24 * time.Hour)
	for range 3 {
		f.ca.Housekeep(t.Context())
	}
	if got, keys := f.states(t), f.keyFiles(t); got != "active" || len(keys) != 1 {
		t.Errorf("states %q, %d keys", got, len(keys))
	}
	problems := fmt.Sprint(f.ca.Problems())
	if !strings.Contains(problems, "root: ") || !strings.Contains(problems, " is valid only from ") {
		t.Errorf("problems %v", problems)
	}
	if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("issuing: %v", err)
	}
	f.clock.jump(24 * time.Hour)
	f.ca.Guarded().Corroborate(f.clock.clock().Wall()) // as a fresh token does
	f.ca.Housekeep(t.Context())
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if problems := f.ca.Problems(); len(problems) > 0 || f.states(t) != "active" {
		t.Errorf("the clock is right again: problems %v, states %q", problems, f.states(t))
	}
}

// verifyLedger makes sure that the hash chain holds, and that the holdings equal a recount.
func (f *fixture) verifyLedger(t *testing.T) {
	t.Helper()
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("the ledger: %v %v", err, report.Problems)
	}
}

func TestARestartWhileTheRootIsAwayServesOn(t *testing.T) {
	f := newFixture(t)
	root := newWeakRoot(t, f)
	f.root = root
	f.mustOpen(t)
	before := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	bundle := f.ca.Bundle().PEM

	root.set(errors.New("the vault is sealed"))
	f.reopen(t)
	after := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if after.Authority != before.Authority || f.ca.Bundle().PEM != bundle {
		t.Error("it signs with something else than before")
	}
	if err := f.verify(t, after); err != nil {
		t.Error(err)
	}
	if err := f.ca.Ready(t.Context()); err != nil {
		t.Errorf("it can sign and record, and says: %v", err)
	}
	problem := func() string {
		problems := f.ca.Problems()
		if len(problems) != 1 {
			t.Fatalf("problems %v", problems)
		}
		return problems[0].Error()
	}
	if got := problem(); !strings.HasPrefix(got, "root: ") || !strings.Contains(got, "the vault is sealed") {
		t.Errorf("problem %q", got)
	}
	f.ca.Housekeep(t.Context())
	problem()
	if got := strings.Count(f.log.String(), "something is wrong and is tried again"); got != 1 {
		t.Errorf("it was logged %d times, want once:\n%s", got, f.log.String())
	}

	root.set(nil)
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("the root is back, and there are the problems %v", problems)
	}
	if !strings.Contains(f.log.String(), `msg="works again" about=root`) {
		t.Errorf("the log does not say that it is back:\n%s", f.log.String())
	}
}

func TestARestartWhileTheRootIsAwayAndNothingCanSignIsNotReadyAndSaysWhy(t *testing.T) {
	f := newFixture(t)
	root := newWeakRoot(t, f)
	f.root = root
	root.set(errors.New("the vault is sealed"))
	if err := f.open(t); err == nil || !strings.Contains(err.Error(), "asking the root for its trust anchors: the vault is sealed") {
		t.Errorf("a first start: %v", err)
	}
	root.set(nil)
	f.reopen(t)
	f.clock.pass(f.issuing - time.Minute)
	root.set(errors.New("the vault is sealed"))
	if err := f.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	f.mustOpen(t)
	if err := f.ca.Ready(t.Context()); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("ready with a minute left of the issuing CA: %v", err)
	}
	const reason = "making a new issuing CA: having it certified by the root: the vault is sealed"
	if problems := fmt.Sprint(f.ca.Problems()); !strings.Contains(problems, reason) {
		t.Errorf("with a minute left of the issuing CA: %v", problems)
	}
	root.set(nil)
	f.ca.Housekeep(t.Context())
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
}

func TestReadyEndsWhenTheIssuingCAHasLessLeftThanTheShortestCertificate(t *testing.T) {
	f := newFixture(t)
	f.clock.wall = f.clock.wall.Truncate(time.Second) // as the times in certificates are
	f.mustOpen(t)
	f.clock.pass(f.issuing - 5*time.Minute)
	if err := f.ca.Ready(t.Context()); err != nil {
		t.Errorf("with the shortest lifetime left to the second: %v", err)
	}
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 5*time.Minute)
	if problems := f.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "its renewal is overdue") {
		t.Errorf("problems %v", problems)
	}
	f.clock.pass(time.Second)
	for what, err := range map[string]error{
		"readiness": f.ca.Ready(t.Context()),
		"issuing":   func() error { _, err := f.issue(t, f.caller("/ns/default/sa/web"), 5*time.Minute); return err }(),
	} {
		if !errors.Is(err, ca.ErrUnavailable) || !strings.Contains(err.Error(), "the 4m59s that are left are less than the minimum of 5m0s") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.ca.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
}

// TestARenewalUnderLoadRefusesNobody: whoever signs under the old issuing CA while the new one takes over is signed for again, once. Renewals are
// days apart; here at least each caller has got an answer to a call that began after the one before.
func TestARenewalUnderLoadRefusesNobody(t *testing.T) {
	const callers, renewals = 24, 20
	f := newFixture(t)
	f.mustOpen(t)
	var round atomic.Int64
	answered, ended := make(chan struct{}), make(chan struct{})
	var seen [callers]map[ledger.Hash]bool
	var running sync.WaitGroup
	for i := range callers {
		seen[i] = map[ledger.Hash]bool{}
		caller, request := f.caller(fmt.Sprintf("/ns/default/sa/web-%d", i)), ca.Request{CSR: newCSR(t, newKey(t), nil), Delivery: ledger.DeliveryResponse}
		running.Go(func() {
			for told := int64(-1); told < renewals; {
				began := round.Load()
				issued, err := f.ca.Issue(context.Background(), caller, request)
				if err == nil {
					err = verifyAt(issued, issued.NotBefore, issued.NotAfter)
				}
				if err != nil {
					t.Errorf("a call that began after %d renewals: %v", began, err)
				} else {
					seen[i][issued.Authority] = true
				}
				if began > told {
					told = began
					select {
					case answered <- struct{}{}:
					case <-ended:
						return
					}
				}
			}
		})
	}
	defer func() {
		close(ended)
		running.Wait()
		for i := range seen {
			if len(seen[i]) != renewals+1 {
				t.Errorf("caller %d had certificates of %d issuing CAs, of %d", i, len(seen[i]), renewals+1)
			}
		}
		f.verifyLedger(t)
	}()
	for n := int64(0); ; n++ {
		round.Store(n)
		for range callers {
			<-answered
		}
		if n == renewals {
			return
		}
		f.clock.pass(f.issuing/2 + time.Minute)
		if err := f.ca.RenewIssuing(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSerialsNeverRepeat(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	seen := map[string]bool{}
	for range 200 {
		serial := new(big.Int).SetBytes(f.mustIssue(t, f.caller("/ns/default/sa/web"), 0).Serial).String()
		if seen[serial] {
			t.Fatalf("serial %s twice", serial)
		}
		seen[serial] = true
	}
}
