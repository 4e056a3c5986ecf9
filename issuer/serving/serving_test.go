package serving_test

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/serving"
	"kedge/plugins/file"
)

const ttl = time.Hour // of the serving certificates here

// house is a serving certificate of a CA over a real ledger, a real root and a real key store. It lives in a bubble of synctest, so that
// hours pass at once; its wall clock goes with the bubble's time, and can be set.
type house struct {
	ca    *ca.CA
	set   atomic.Int64          // how far the wall clock was set, in nanoseconds
	fault atomic.Pointer[error] // of every signature
	tries atomic.Int64          // signatures that were asked for
	*serving.Certificate
}

// inHouse runs a test in a house. The certificate is there and is not renewed yet.
func inHouse(t *testing.T, test func(*testing.T, *house)) {
	synctest.Test(t, func(t *testing.T) {
		h := &house{}
		h.open(t)
		h.serve(t, ttl)
		test(t, h)
	})
}

func (h *house) open(t *testing.T) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	td, dir, began := spiffeid.RequireTrustDomainFromString("cluster.local"), t.TempDir(), time.Now()
	clock := ca.Clock{
		Wall:    func() time.Time { return time.Now().Round(0).Add(time.Duration(h.set.Load())) },
		Elapsed: func() time.Duration { return time.Since(began) },
		Boot:    "boot-1",
	}
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), Now: clock.Wall})
	must(err)
	t.Cleanup(func() { book.Close() })
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: td.Name(), Now: clock.Wall})
	must(err)
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")})
	must(err)
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), clock, time.Time{})
	must(err)
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	must(err)
	h.ca, err = ca.Open(t.Context(), ca.Options{
		TrustDomain: td, Ledger: book, Root: root, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: faultyKeys{keys, h},
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256,
		Clock: clock, Guarded: guarded, Logger: slog.New(slog.DiscardHandler),
	})
	must(err)
}

// serve does what the start of a server does.
func (h *house) serve(t *testing.T, ttl time.Duration) {
	t.Helper()
	certificate, err := serving.New(t.Context(), h.ca, []string{"localhost", "127.0.0.1"}, ttl, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	h.Certificate = certificate
}

// run renews until the test ends, and returns once it waits.
func (h *house) run(t *testing.T) {
	t.Helper()
	go func() {
		if err := h.Run(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	synctest.Wait()
}

// pass lets time go by.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func (h *house) setClock(by time.Duration) { h.set.Add(int64(by)) }

// breakKeys lets every signature fail from now on; nil: they work.
func (h *house) breakKeys(err error) {
	h.fault.Store(nil)
	if err != nil {
		h.fault.Store(&err)
	}
}

// leaf is what the server shows.
func (h *house) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	shown, err := h.TLS().GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return shown.Leaf
}

// renewed makes sure that the server shows another certificate than before, which is good now and comes from the issuing CA that signs now.
func (h *house) renewed(t *testing.T, before *x509.Certificate) {
	t.Helper()
	shown, err := h.TLS().GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if shown.Leaf.Equal(before) {
		t.Fatal("it is not renewed")
	}
	if err := h.Ready(); err != nil {
		t.Error(err)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(h.ca.Bundle().PEM))
	issuer, err := x509.ParseCertificate(shown.Certificate[1])
	if err != nil {
		t.Fatal(err)
	}
	intermediates.AddCert(issuer)
	if _, err := shown.Leaf.Verify(x509.VerifyOptions{DNSName: "localhost", Roots: roots, Intermediates: intermediates, CurrentTime: h.ca.Now()}); err != nil {
		t.Error(err)
	}
	if active, _ := h.ca.Active(); ca.AuthorityID(issuer) != active {
		t.Error("it comes from another issuing CA than the one that signs now")
	}
	if got := h.NotAfter(); !got.Equal(shown.Leaf.NotAfter) {
		t.Errorf("NotAfter says %s, and the certificate %s", got, shown.Leaf.NotAfter)
	}
	if problem := h.problem(); problem != "" {
		t.Error(problem)
	}
}

// problem is what the CA says of the serving certificate; "" when all is well.
func (h *house) problem() string {
	for _, problem := range h.ca.Problems() {
		if text, ok := strings.CutPrefix(problem.Error(), "serving certificate: "); ok {
			return text
		}
	}
	return ""
}

// faultyKeys are keys that break when the house says so.
type faultyKeys struct {
	ca.KeyStore
	house *house
}

func (f faultyKeys) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	ref, key, err := f.KeyStore.Create(ctx, spec)
	return ref, faultyKey{key, f.house}, err
}

func (f faultyKeys) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	key, err := f.KeyStore.Open(ctx, ref)
	return faultyKey{key, f.house}, err
}

type faultyKey struct {
	crypto.Signer
	house *house
}

func (f faultyKey) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	f.house.tries.Add(1)
	if err := f.house.fault.Load(); err != nil {
		return nil, *err
	}
	return f.Signer.Sign(rand, digest, opts)
}

func TestItIsRenewedAtHalfOfItsLife(t *testing.T) {
	inHouse(t, func(t *testing.T, h *house) {
		first := h.leaf(t)
		h.run(t)
		pass(ttl/2 - time.Second)
		if !h.leaf(t).Equal(first) {
			t.Fatal("it was renewed before")
		}
		pass(2 * time.Second)
		h.renewed(t, first)
		second := h.leaf(t)
		pass(ttl / 2)
		h.renewed(t, second)
	})
}

func TestItIsRenewedWhenAnotherIssuingCATakesOver(t *testing.T) {
	for name, steps := range map[string][]func(*house, *testing.T){
		"while it runs":  {(*house).run, (*house).takeOver},
		"before it runs": {(*house).takeOver, (*house).run},
	} {
		t.Run(name, func(t *testing.T) {
			inHouse(t, func(t *testing.T, h *house) {
				first := h.leaf(t)
				for _, step := range steps { // and no time passes …
					step(h, t)
				}
				pass(time.Second) // … but what commits take
				h.renewed(t, first)
			})
		})
	}
}

// takeOver makes another issuing CA active.
func (h *house) takeOver(t *testing.T) {
	t.Helper()
	active, _ := h.ca.Active()
	if err := h.ca.Taint(t.Context(), active, "it is tried out", "a test"); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

func TestAClockThatIsSetIsNoticedWithinAMinute(t *testing.T) {
	inHouse(t, func(t *testing.T, h *house) {
		first := h.leaf(t)
		h.run(t)
		h.setClock(2 * ttl)
		if err := h.Ready(); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("with a certificate that has expired: %v", err)
		}
		pass(time.Minute)
		h.renewed(t, first)

		second := h.leaf(t)
		h.setClock(-2 * ttl)
		if err := h.Ready(); err == nil || !strings.Contains(err.Error(), "clock") {
			t.Errorf("with a certificate of the future: %v", err)
		}
		pass(time.Minute)
		h.renewed(t, second)
	})
}

func TestWhatIsMendedByTheClockIsNoProblemAnyMore(t *testing.T) {
	inHouse(t, func(t *testing.T, h *house) {
		first := h.leaf(t)
		h.run(t)
		h.setClock(-30 * 24 * time.Hour) // before the issuing CA's own notBefore: it cannot sign
		pass(time.Minute)
		if problem := h.problem(); !strings.Contains(problem, "the clock was set back") {
			t.Errorf("problem %q", problem)
		}
		h.setClock(30 * 24 * time.Hour)
		pass(time.Minute)
		if problem := h.problem(); problem != "" || !h.leaf(t).Equal(first) || h.Ready() != nil {
			t.Errorf("problem %q, ready %v", problem, h.Ready())
		}
	})
}

func TestARenewalThatFailsIsAProblemUntilItWorks(t *testing.T) {
	inHouse(t, func(t *testing.T, h *house) {
		first := h.leaf(t)
		h.run(t)
		h.breakKeys(errors.New("the token is gone"))
		pass(ttl/2 + time.Second)
		if problem := h.problem(); !strings.Contains(problem, "the token is gone") {
			t.Errorf("problem %q", problem)
		}
		if !h.leaf(t).Equal(first) || h.Ready() != nil {
			t.Errorf("the old one is not served on: %v", h.Ready())
		}
		pass(ttl)
		if err := h.Ready(); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("when it has expired: %v", err)
		}
		h.breakKeys(nil)
		pass(10 * time.Second)
		h.renewed(t, first)
	})
}

func TestAStartWithoutACertificateHealsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &house{}
		h.open(t)
		h.breakKeys(errors.New("the token is gone"))
		h.serve(t, ttl)
		if err := h.Ready(); err == nil || !strings.Contains(err.Error(), "the token is gone") {
			t.Errorf("ready without a certificate: %v", err)
		}
		if end := h.NotAfter(); !end.IsZero() {
			t.Errorf("no certificate ends at %s", end)
		}
		if err := h.handshake(t); err == nil || !strings.Contains(err.Error(), "internal error") {
			t.Errorf("a handshake without a certificate: %v", err)
		}
		h.run(t)
		pass(time.Hour)
		if problem := h.problem(); !strings.Contains(problem, "the token is gone") {
			t.Errorf("problem %q", problem)
		}
		h.breakKeys(nil)
		pass(10 * time.Second)
		h.renewed(t, nil)
		if err := h.handshake(t); err != nil {
			t.Errorf("a handshake: %v", err)
		}
	})
}

// handshake is a client's.
func (h *house) handshake(t *testing.T) error {
	t.Helper()
	ours, theirs := net.Pipe()
	server := tls.Server(ours, h.TLS())
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_ = server.HandshakeContext(t.Context()) // the client's error tells
		_ = ours.Close()
	}()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(h.ca.Bundle().PEM))
	err := tls.Client(theirs, &tls.Config{ServerName: "localhost", RootCAs: roots, Time: h.ca.Now}).HandshakeContext(t.Context())
	_ = theirs.Close()
	<-answered
	return err
}

func TestItIsNeverTriedInAHotLoop(t *testing.T) {
	t.Run("while every signature fails", func(t *testing.T) {
		inHouse(t, func(t *testing.T, h *house) {
			h.run(t)
			h.breakKeys(errors.New("the token is gone"))
			pass(ttl / 2)
			h.tries.Store(0)
			pass(100 * time.Second)
			if tries := h.tries.Load(); tries < 8 || tries > 14 {
				t.Errorf("%d tries in 100 seconds", tries)
			}
		})
	})
	t.Run("while issuing CAs come and go", func(t *testing.T) {
		inHouse(t, func(t *testing.T, h *house) {
			h.run(t)
			before := h.served(t)
			for range 10 { // at one moment
				h.takeOver(t)
			}
			if made := h.served(t) - before; made != 1 {
				t.Errorf("%d serving certificates were made at one moment", made)
			}
			last := h.leaf(t)
			pass(time.Second)
			h.renewed(t, last)
			if made := h.served(t) - before; made != 2 {
				t.Errorf("%d serving certificates were made within a second", made)
			}
		})
	})
}

// served counts the serving certificates that the ledger has.
func (h *house) served(t *testing.T) uint64 {
	t.Helper()
	n, err := h.ca.Ledger().Count(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
