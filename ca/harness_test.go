package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

// handClock is a clock that a test sets. It begins at the machine's time.
type handClock struct {
	mu      sync.Mutex
	wall    time.Time
	elapsed time.Duration
	running time.Time // since when it also goes by itself, in a bubble of testing/synctest; zero: it does not
}

func newHandClock() *handClock { return &handClock{wall: time.Now(), elapsed: time.Hour} }

func (h *handClock) clock() ca.Clock {
	return ca.Clock{
		Wall:    func() time.Time { h.mu.Lock(); defer h.mu.Unlock(); return h.wall.Add(h.ran()) },
		Elapsed: func() time.Duration { h.mu.Lock(); defer h.mu.Unlock(); return h.elapsed + h.ran() },
		Boot:    "boot-1",
	}
}

func (h *handClock) ran() time.Duration {
	if h.running.IsZero() {
		return 0
	}
	return time.Since(h.running)
}

// pass lets time go by.
func (h *handClock) pass(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall, h.elapsed = h.wall.Add(d), h.elapsed+d
}

// jump sets the wall clock without any time going by.
func (h *handClock) jump(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall = h.wall.Add(d)
}

// fixture is a CA over a real ledger, a real root and a real key store in one folder.
type fixture struct {
	dir     string
	clock   *handClock
	profile ca.ProfileConfig
	issuing time.Duration
	root    ca.Root // nil: the self-made one
	anchors ca.Anchors
	foreign ledger.Coverage // of the first roots
	window  time.Duration
	keys    ca.KeyStore
	log     bytes.Buffer

	ca     *ca.CA
	ledger *ledger.Ledger
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return &fixture{dir: t.TempDir(), clock: newHandClock(), profile: ca.DefaultProfileConfig(), issuing: 7 * 24 * time.Hour,
		foreign: ledger.Coverage{Kind: "complete"}, window: 48 * time.Hour}
}

// open opens the CA, or says why it cannot be.
func (f *fixture) open(t *testing.T) error {
	t.Helper()
	clock := f.clock.clock()
	log := slog.New(slog.NewTextHandler(&f.log, nil))
	book, err := ledger.Open(f.dir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: "0.1.0", Now: clock.Wall, Retention: time.Hour, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { book.Close() })
	root := f.root
	if root == nil {
		made, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name(), Now: clock.Wall, Logger: log})
		if err != nil {
			t.Fatal(err)
		}
		root = made
	}
	keys := f.keys
	if keys == nil {
		if keys, err = file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(f.dir, "keys")}); err != nil {
			t.Fatal(err)
		}
	}
	guarded, err := ca.OpenGuardedClock(filepath.Join(f.dir, "clock.json"), clock, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.DefaultProfile, f.profile)
	if err != nil {
		t.Fatal(err)
	}
	f.ledger = book
	f.ca, err = ca.Open(t.Context(), ca.Options{
		TrustDomain: td, Ledger: book, Root: root, Anchors: f.anchors, RootCoverage: f.foreign, ForeignWindow: f.window, Keys: keys,
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: f.issuing, IssuingKey: ca.P256,
		Clock: clock, Guarded: guarded, Logger: log,
	})
	return err
}

func (f *fixture) mustOpen(t *testing.T) {
	t.Helper()
	if err := f.open(t); err != nil {
		t.Fatal(err)
	}
}

// reopen does what a restart does.
func (f *fixture) reopen(t *testing.T) {
	t.Helper()
	if err := f.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	f.mustOpen(t)
}

// caller is somebody with a good token.
func (f *fixture) caller(path string) ca.Caller {
	proof := ledger.Proof{Method: ca.MethodKubernetes, Issuer: "test", Subject: path, Time: ledger.At(f.clock.clock().Wall())}
	return ca.Caller{ID: spiffeid.RequireFromPath(td, path), Proofs: []ledger.Proof{proof}, First: &proof, Holder: ledger.Holder{Kind: "pod", ID: "uid-" + path}, Peer: "192.0.2.1:4711"}
}

// issue gets an SVID for a new P-256 key.
func (f *fixture) issue(t *testing.T, caller ca.Caller, ttl time.Duration) (*ca.Issued, error) {
	t.Helper()
	return f.ca.Issue(t.Context(), caller, ca.Request{CSR: newCSR(t, newKey(t), nil), TTL: ttl, Delivery: ledger.DeliveryResponse, RequestID: "test"})
}

func (f *fixture) mustIssue(t *testing.T, caller ca.Caller, ttl time.Duration) *ca.Issued {
	t.Helper()
	issued, err := f.issue(t, caller, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// verify is what any client does with an SVID, at the fixture's time.
func (f *fixture) verify(t *testing.T, issued *ca.Issued) error {
	t.Helper()
	return verifyAt(issued, f.clock.clock().Wall())
}

// verifyAt is what any client does with an SVID, at each of some times.
func verifyAt(issued *ca.Issued, times ...time.Time) error {
	return verifyUnder(issued, issued.Bundle, times...)
}

// verifyUnder is what a client does that holds a bundle of its own.
func verifyUnder(issued *ca.Issued, bundle *ca.Bundle, times ...time.Time) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(bundle.PEM))
	for _, link := range issued.Chain[1:] {
		intermediates.AppendCertsFromPEM([]byte(link))
	}
	leaf, err := x509.ParseCertificate(issued.DER)
	for _, now := range times {
		if err == nil {
			_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		}
	}
	return err
}
