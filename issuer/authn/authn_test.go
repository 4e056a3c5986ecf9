package authn_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
	"kedge/plugins/file"
)

// verdict is what a client certificate proves, or why it does not.
type verdict struct {
	certificate ca.ClientCertificate
	err         error
}

func (v *verdict) Verify(context.Context, []*x509.Certificate) (ca.ClientCertificate, error) {
	return v.certificate, v.err
}

func TestATokenAndACertificateTogether(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	away := newKeyServer(t, key)
	away.set(func(s *keyServer) { s.answer = status(503) })
	second := away.config()
	second.Name = "away"
	v := &verdict{}
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config(), second}, Certificates: v})
	now := ledger.At(b.clock.Now())
	id := spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/web")
	began := &ledger.Proof{Method: ca.MethodJoinToken, Issuer: "kedge", Subject: "jti", Time: now - 3600}
	good := ca.ClientCertificate{ID: id, Proof: ledger.Proof{Method: ca.MethodClientCertificate, Issuer: "a", Subject: "01", Time: now}, First: began,
		Holder: ledger.Holder{Kind: "install", ID: "jti"}, Number: 7, Serial: ledger.Serial{1}, Own: true}
	stranger, unrecorded := good, good
	stranger.ID = spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/other")
	unrecorded.Number, unrecorded.First = 0, nil
	foreign := unrecorded
	foreign.Own, foreign.Number = false, 7 // a number of ours is no number of theirs
	token := "Bearer " + key.sign(t, b.claims(server.URL))
	badToken := "Bearer " + key.sign(t, with(b.claims(server.URL), claims{"aud": "x"}))
	unknowable := "Bearer " + key.sign(t, b.claims(away.URL))
	bad, later := ca.Unauthenticated(errors.New("it is revoked")), ca.Unavailable(errors.New("the ledger is away"))
	forbidden := ca.Denied(errors.New("not this"))

	for _, c := range []struct {
		name    string
		token   string
		cert    *ca.ClientCertificate
		certErr error

		kind            error
		reasons         []string
		methods         string
		first           *ledger.Proof
		replaces        uint64
		holder, logLine string
	}{
		{name: "neither", kind: ca.ErrUnauthenticated, reasons: []string{"neither a token nor a client certificate"}},
		{name: "token", token: token, methods: "kubernetes", holder: "pod"},
		{name: "certificate", cert: &good, methods: "client-certificate", first: began, replaces: 7, holder: "install"},
		{name: "both", token: token, cert: &good, methods: "kubernetes client-certificate", replaces: 7, holder: "pod"},
		{name: "both, differing", token: token, cert: &stranger, kind: ca.ErrDenied, reasons: []string{id.String(), stranger.ID.String()}},
		{name: "good token, bad certificate", token: token, certErr: bad, methods: "kubernetes", holder: "pod",
			logLine: `level=WARN msg="the client certificate does not count, the token does" request_id=r1 spiffe_id=` + id.String() + ` reason="it is revoked"`},
		{name: "good token, unknowable certificate", token: token, certErr: later, methods: "kubernetes", holder: "pod", logLine: `reason="the ledger is away"`},
		{name: "bad token, good certificate", token: badToken, cert: &good, methods: "client-certificate", first: began, replaces: 7, holder: "install",
			logLine: `level=WARN msg="the token does not count, the client certificate does" request_id=r1`},
		{name: "unknowable token, good certificate", token: unknowable, cert: &good, methods: "client-certificate", first: began,
			replaces: 7, holder: "install", logLine: "the token does not count"},
		{name: "bad token of another, good certificate", token: badToken, cert: &stranger, methods: "client-certificate", first: began, replaces: 7, holder: "install"},
		{name: "both bad", token: badToken, certErr: bad, kind: ca.ErrUnauthenticated, reasons: []string{"its audience", "it is revoked"}},
		{name: "both unknowable", token: unknowable, certErr: later, kind: ca.ErrUnavailable, reasons: []string{"503", "the ledger is away"}},
		{name: "token bad, certificate unknowable", token: badToken, certErr: later, kind: ca.ErrUnavailable, reasons: []string{"its audience", "the ledger is away"}},
		{name: "token unknowable, certificate bad", token: unknowable, certErr: bad, kind: ca.ErrUnavailable, reasons: []string{"503", "it is revoked"}},
		{name: "token bad, certificate forbidden", token: badToken, certErr: forbidden, kind: ca.ErrUnauthenticated, reasons: []string{"its audience", "not this"}},
		{name: "certificate forbidden", certErr: forbidden, kind: ca.ErrDenied, reasons: []string{"not this"}},
		{name: "own certificate without a record", cert: &unrecorded, methods: "client-certificate", holder: "install", logLine: "level=INFO msg=\"the ledger has no record"},
		{name: "foreign certificate", cert: &foreign, methods: "client-certificate", holder: "install", logLine: "own=false"},
	} {
		t.Run(c.name, func(t *testing.T) {
			credentials := authn.Credentials{Peer: "p", ClusterID: "c", RequestID: "r1"}
			if c.token != "" {
				credentials.Tokens = []string{c.token}
			}
			if v.err = c.certErr; c.cert != nil {
				v.certificate = *c.cert
			}
			if c.cert != nil || c.certErr != nil {
				credentials.Certificates = []*x509.Certificate{{}}
			}
			before := len(b.log.String())
			caller, err := b.Authenticate(t.Context(), credentials)
			log := b.log.String()[before:]
			if c.kind != nil {
				for _, reason := range c.reasons {
					refuses(t, err, c.kind, reason, c.token)
				}
				if !caller.ID.IsZero() || len(caller.Proofs) > 0 || caller.Peer != "p" {
					t.Errorf("with the refusal came %+v", caller)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var methods []string
			for _, proof := range caller.Proofs {
				methods = append(methods, proof.Method)
			}
			if got := strings.Join(methods, " "); got != c.methods {
				t.Errorf("proven by %s, want %s", got, c.methods)
			}
			first := c.first
			if c.token == token {
				first = &caller.Proofs[0]
			}
			if (caller.First == nil) != (first == nil) || first != nil && *caller.First != *first {
				t.Errorf("began with %+v, want %+v", caller.First, first)
			}
			if caller.Replaces != c.replaces || (caller.Presented != nil) != (c.replaces != 0) || caller.Presented != nil && caller.Presented.Number != c.replaces {
				t.Errorf("replaces %d, presented %+v, want %d", caller.Replaces, caller.Presented, c.replaces)
			}
			if caller.Holder.Kind != c.holder || caller.IssuedAt.IsZero() == (c.token == token) {
				t.Errorf("got %+v", caller)
			}
			if !strings.Contains(log, c.logLine) {
				t.Errorf("want %q in the log:\n%s", c.logLine, log)
			}
			if strings.Contains(log, "does not count") != (c.token != "" && c.certErr != nil || c.token != "" && c.token != token) {
				t.Errorf("the log says:\n%s", log)
			}
		})
	}
}

func TestClientCertificatesThatAreSwitchedOffAreNotLookedAt(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	_, err := b.Authenticate(t.Context(), authn.Credentials{Certificates: []*x509.Certificate{{}}})
	refuses(t, err, ca.ErrUnauthenticated, "neither a token nor a client certificate that could count")
	caller, err := b.Authenticate(t.Context(), authn.Credentials{Tokens: []string{"Bearer " + key.sign(t, b.claims(server.URL))}, Certificates: []*x509.Certificate{{}}})
	if err != nil || len(caller.Proofs) != 1 {
		t.Errorf("got %+v, %v", caller, err)
	}
}

func TestACallersOwnWordIsBoundedAndText(t *testing.T) {
	b := start(t, authn.Options{})
	caller, err := b.Authenticate(t.Context(), authn.Credentials{ClusterID: "a\xffb" + strings.Repeat("ä", 1000)})
	refuses(t, err, ca.ErrUnauthenticated, "neither")
	if len(caller.ClusterID) > 260 || !utf8.ValidString(caller.ClusterID) || !strings.HasPrefix(caller.ClusterID, "a\ufffdb") {
		t.Errorf("got %q", caller.ClusterID)
	}
}

// A join token, then client certificates with and without a token, through a real CA with a real ledger: the first proof travels along, the
// holder stays the same, and a spent token is refused.
func TestALineageThroughARealCA(t *testing.T) {
	clock, dir := newClock(), t.TempDir()
	caClock := ca.Clock{Wall: clock.Now, Elapsed: func() time.Duration { return time.Hour }, Boot: "boot"}
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: "0.1.0", Now: clock.Now, Retention: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { book.Close() })
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: td.Name(), Now: clock.Now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")})
	if err != nil {
		t.Fatal(err)
	}
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), caClock, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Open(t.Context(), ca.Options{TrustDomain: td, Ledger: book, Root: root, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys,
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256, Clock: caClock, Guarded: guarded,
		Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	j := joinTokens(t, newSigner(t, "").key, clock, book, "ns/default/sa/*")
	b := start(t, authn.Options{Join: j, Certificates: authority.ClientCertificates(), Now: clock.Now})
	token, record, err := j.Create(web, 10*time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.ask("Bearer " + token)
	refuses(t, err, ca.ErrUnauthenticated, ledger.ErrTokenUnknown.Error(), token) // it is not recorded yet
	record.By = "test"
	if _, err := book.Append(t.Context(), &record); err != nil {
		t.Fatal(err)
	}

	issue := func(c authn.Credentials) (ca.Caller, *x509.Certificate, *ledger.Issue) {
		t.Helper()
		caller, err := b.Authenticate(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		issued, err := authority.Issue(t.Context(), caller, ca.Request{CSR: csr(t, newSigner(t, "").key), Delivery: ledger.DeliveryResponse, RequestID: "r"})
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(issued.DER)
		if err != nil {
			t.Fatal(err)
		}
		event, err := book.Event(t.Context(), issued.Number)
		if err != nil {
			t.Fatal(err)
		}
		return caller, leaf, event.Body.(*ledger.Issue)
	}
	first, leaf, _ := issue(authn.Credentials{Tokens: []string{"Bearer " + token}})
	began := first.Proofs[0]
	for n := range 3 {
		clock.pass(time.Hour)
		before, err := book.FindIssue(t.Context(), leaf.SerialNumber.Bytes(), leaf.NotBefore)
		if err != nil {
			t.Fatal(err)
		}
		caller, next, event := issue(authn.Credentials{Certificates: []*x509.Certificate{leaf}})
		if caller.First == nil || *caller.First != began || caller.Holder != first.Holder || caller.Replaces != before.Number {
			t.Errorf("generation %d: the caller is %+v; it replaces %d", n+2, caller, before.Number)
		}
		if event.FirstProof == nil || *event.FirstProof != began || event.Holder != first.Holder || event.Replaces != before.Number {
			t.Errorf("generation %d: the ledger says %+v", n+2, event)
		}
		if state, err := book.IssueState(before.Number); err != nil || !state.Confirmed {
			t.Errorf("generation %d: what was presented is not confirmed: %+v, %v", n+2, state, err)
		}
		leaf = next
	}
	_, err = b.ask("Bearer " + token)
	refuses(t, err, ca.ErrUnauthenticated, "expired at", token)

	if _, err := authority.Revoke(t.Context(), leaf.SerialNumber.Bytes(), "test", "test"); err != nil {
		t.Fatal(err)
	}
	_, err = b.Authenticate(t.Context(), authn.Credentials{Certificates: []*x509.Certificate{leaf}})
	refuses(t, err, ca.ErrUnauthenticated, "is revoked")
}

func csr(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
