package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"path/filepath"
	"strings"
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
type badKey struct {
	crypto.Signer
	sign func() ([]byte, error)
}

func (b badKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return b.sign() }

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
			f := newFixture(t)
			f.keys = oneKey{badKey{newKey(t), sign}}
			if err := f.open(t); err == nil || !strings.Contains(err.Error(), "throwaway") {
				t.Errorf("error %v", err)
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
	if len(problems) != 1 || !strings.Contains(problems[0].Error(), "the vault is sealed") {
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
