package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
	"kedge/plugins/memory"
)

// fickleKey signs as it should until a test lets it do something else.
type fickleKey struct {
	crypto.Signer
	instead func() ([]byte, error)
}

func (f *fickleKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if f.instead != nil {
		return f.instead()
	}
	return f.Signer.Sign(random, digest, opts)
}

// keptKey is a key store with one key, which it has from the first day on.
type keptKey struct{ oneKey }

func (k keptKey) Open(context.Context, string) (crypto.Signer, error) { return k.key, nil }

func TestACAWhoseKeyDoesNotSignIsNotReadyAndIssuesNothing(t *testing.T) {
	f := newFixture(t)
	key := &fickleKey{Signer: newKey(t)}
	f.keys = keptKey{oneKey{key}}
	f.mustOpen(t)
	for name, test := range map[string]struct {
		instead func() ([]byte, error)
		says    string
	}{
		"it fails":                 {func() ([]byte, error) { return nil, errors.New("the token is gone") }, "does not sign: the token is gone"},
		"its signature is garbage": {func() ([]byte, error) { return []byte{1, 2, 3}, nil }, "the signature is not good"},
		"its signature is another's": {func() ([]byte, error) {
			return newKey(t).Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		}, "the signature is not good"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := f.ca.Ready(t.Context()); err != nil {
				t.Fatalf("while it signs: %v", err)
			}
			before := f.ledger.Head().Number
			key.instead = test.instead
			if err := f.ca.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("ready: %v", err)
			}
			if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
				t.Errorf("a caller is told %v", err)
			}
			if after := f.ledger.Head().Number; after != before {
				t.Errorf("%d events were recorded", after-before)
			}
			key.instead = nil
			f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
		})
	}
}

// run lets the CA renew and remove until the test ends.
func (f *fixture) run(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := f.ca.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

func TestARestartThatCannotMakeAnIssuingCAReadsOnAndHealsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		good, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name()})
		if err != nil {
			t.Fatal(err)
		}
		var sealed atomic.Bool
		f.root = badRoot{good, func(r *file.Root, q ca.CertifyRequest) ([]*x509.Certificate, error) {
			if sealed.Load() {
				return nil, errors.New("the vault is sealed")
			}
			return r.Certify(context.Background(), q)
		}}
		f.mustOpen(t)
		issued := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
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
		sealed.Store(true)
		f.reopen(t)

		if err := f.ca.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no issuing CA that can sign") {
			t.Errorf("ready: %v", err)
		}
		if problems := f.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "issuing CA: making a new issuing CA") ||
			!strings.Contains(problems[0].Error(), "the vault is sealed") {
			t.Errorf("problems %v", problems)
		}
		if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
			t.Errorf("a caller is told %v", err)
		}
		if n, err := f.ledger.Count(t.Context(), ledger.Filter{Serial: issued.Serial}); err != nil || n != 1 {
			t.Errorf("the ledger has %d of the certificate (%v)", n, err)
		}
		if f.ca.Bundle().PEM != issued.Bundle.PEM {
			t.Error("the bundle is another one")
		}

		f.run(t)
		<-time.After(time.Hour)
		sealed.Store(false)
		<-time.After(5 * time.Minute)
		if err := f.ca.Ready(t.Context()); err != nil {
			t.Errorf("ready: %v", err)
		}
		if problems := f.ca.Problems(); len(problems) > 0 {
			t.Errorf("problems %v", problems)
		}
		f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	})
}

func TestARestartWithoutAnIssuingCATriesForOneAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		key := &fickleKey{Signer: newKey(t)}
		f.keys = keptKey{oneKey{key}}
		f.mustOpen(t)
		key.instead = func() ([]byte, error) { return nil, errors.New("the token is gone") }
		f.reopen(t)
		key.instead = nil
		f.run(t)
		synctest.Wait() // and no time passes
		if err := f.ca.Ready(t.Context()); err != nil {
			t.Errorf("ready: %v", err)
		}
	})
}

func TestAnIssuingCAWhoseKeyCannotBeOpenedAgainIsAProblem(t *testing.T) {
	f := newFixture(t)
	f.keys = oneKey{newKey(t)} // it never finds it again
	if err := f.open(t); err == nil || !strings.Contains(err.Error(), "taking up the new issuing CA") {
		t.Errorf("error %v", err)
	}
}

// remoteKeys is a key store that may be away, or lose a key (Delete) that signs.
type remoteKeys struct {
	memory.KeyStore
	away atomic.Bool
}

func (s *remoteKeys) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if s.away.Load() {
		return nil, errors.New("the key store is away")
	}
	key, err := s.KeyStore.Open(ctx, ref)
	return remoteKey{key, s, ref}, err
}

type remoteKey struct {
	crypto.Signer
	store *remoteKeys
	ref   string
}

func (k remoteKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, err := k.store.Open(context.Background(), k.ref); err != nil {
		return nil, errors.New("it does not say why")
	}
	return k.Signer.Sign(random, digest, opts)
}

// lose loses the key of the active issuing CA, which a caller finds.
func (s *remoteKeys) lose(t *testing.T, f *fixture) {
	t.Helper()
	records, err := f.ledger.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), records[len(records)-1].KeyRef); err != nil {
		t.Fatal(err)
	}
	if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("a caller is told %v", err)
	}
}

// TestAnIssuingCAWhoseKeyIsLostIsReplacedAtOnce, and not one whose key is only away.
func TestAnIssuingCAWhoseKeyIsLostIsReplacedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, keys := newFixture(t), &remoteKeys{}
		f.keys = keys
		f.mustOpen(t)
		f.run(t)
		first := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
		keys.away.Store(true)
		if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
			t.Errorf("a caller is told %v", err)
		}
		pass(time.Hour)
		if problems := f.ca.Problems(); len(problems) != 1 || !strings.HasPrefix(problems[0].Error(), "signing: the key of the issuing CA ") {
			t.Errorf("problems %v", problems)
		}
		keys.away.Store(false)
		if again := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0); again.Authority != first.Authority || f.states(t) != "active" {
			t.Errorf("a key store that was away made the states %q", f.states(t))
		}
		pass(5 * time.Second)
		if problems := f.ca.Problems(); len(problems) > 0 {
			t.Errorf("the key store is back, and there are the problems %v", problems)
		}
		keys.lose(t, f)
		pass(time.Second) // commits take some of it
		if next := f.mustIssue(t, f.caller("/ns/default/sa/web"), 0); next.Authority == first.Authority || f.states(t) != "retired active" {
			t.Errorf("after the key was lost the states are %q", f.states(t))
		}
		pass(5 * time.Second)
		if problems := f.ca.Problems(); len(problems) > 0 {
			t.Errorf("problems %v", problems)
		}
	})
}

// TestWhileNothingCanBeSignedARenewalIsTriedMoreOften, however many callers come.
func TestWhileNothingCanBeSignedARenewalIsTriedMoreOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, keys := newFixture(t), &remoteKeys{}
		root := newWeakRoot(t, f)
		f.root, f.keys = root, keys
		f.mustOpen(t)
		f.run(t)
		synctest.Wait()
		root.set(errors.New("the vault is sealed"))
		keys.lose(t, f)
		for range 600 {
			if _, err := f.issue(t, f.caller("/ns/default/sa/web"), 0); !errors.Is(err, ca.ErrUnavailable) {
				t.Errorf("a caller is told %v", err)
			}
			pass(time.Second)
		}
		var seconds []int
		for _, pause := range root.pauses() {
			seconds = append(seconds, int(pause/time.Second))
		}
		if want := []int{5, 10, 20, 30, 30, 30}; len(seconds) < len(want) || !slices.Equal(seconds[:len(want)], want) || slices.Max(seconds) > 30 {
			t.Errorf("it was tried again after %d seconds", seconds)
		}
		root.set(nil)
		pass(30 * time.Second)
		f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	})
}
