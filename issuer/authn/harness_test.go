package authn_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/issuer/authn"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// handClock is a clock that a test sets.
type handClock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *handClock { return &handClock{now: time.Now().Truncate(time.Second)} }

func (c *handClock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }

func (c *handClock) pass(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.now = c.now.Add(d) }

// logText collects what is logged.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.text.String() }

// signer is a key of a token issuer.
type signer struct {
	kid string
	alg jose.SignatureAlgorithm
	key crypto.Signer
}

func newSigner(t testing.TB, kid string) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{kid, jose.ES256, key}
}

// rsaKey is slow to make, so that there is one.
var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func (s signer) jwk() jose.JSONWebKey {
	return jose.JSONWebKey{Key: s.key.Public(), KeyID: s.kid, Algorithm: string(s.alg), Use: "sig"}
}

func jwks(t testing.TB, signers ...signer) []byte {
	t.Helper()
	set := jose.JSONWebKeySet{}
	for _, s := range signers {
		set.Keys = append(set.Keys, s.jwk())
	}
	return mustJSON(t, set)
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

type claims = map[string]any

// with changes claims; nil takes one away.
func with(base, changes claims) claims {
	all := maps.Clone(base)
	for name, value := range changes {
		if all[name] = value; value == nil {
			delete(all, name)
		}
	}
	return all
}

func (s signer) sign(t testing.TB, payload any) string { return s.signTyped(t, "JWT", payload) }

func (s signer) signTyped(t testing.TB, typ string, payload any) string {
	t.Helper()
	options := &jose.SignerOptions{}
	if typ != "" {
		options = options.WithType(jose.ContentType(typ))
	}
	return signWith(t, s.alg, jose.JSONWebKey{Key: s.key, KeyID: s.kid}, options, payload)
}

func signWith(t testing.TB, alg jose.SignatureAlgorithm, key any, options *jose.SignerOptions, payload any) string {
	t.Helper()
	maker, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, options)
	if err != nil {
		t.Fatal(err)
	}
	text, ok := payload.([]byte)
	if !ok {
		text = mustJSON(t, payload)
	}
	object, err := maker.Sign(text)
	if err != nil {
		t.Fatal(err)
	}
	token, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// keyServer is a token issuer with a TLS certificate under a CA of its own. It serves discovery and keys, and counts who asks for the keys.
type keyServer struct {
	*httptest.Server
	caFile string
	asked  chan string // the authorization header of each request for keys

	mu      sync.Mutex
	keys    []byte
	count   int
	answer  http.HandlerFunc // instead of the keys
	doc     []byte           // instead of the right discovery document
	working chan struct{}    // requests for keys wait for it
}

func newKeyServer(t testing.TB, signers ...signer) *keyServer {
	t.Helper()
	s := &keyServer{keys: jwks(t, signers...), asked: make(chan string, 10000)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		doc := s.doc
		s.mu.Unlock()
		if doc == nil {
			doc = mustJSON(t, claims{"issuer": s.URL, "jwks_uri": s.URL + "/keys"})
		}
		w.Write(doc)
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.count++
		keys, answer, working := s.keys, s.answer, s.working
		s.mu.Unlock()
		s.asked <- r.Header.Get("Authorization")
		if working != nil {
			select {
			case <-working:
			case <-r.Context().Done():
				return // nobody reads it, or half of it
			}
		}
		if answer != nil {
			answer(w, r)
			return
		}
		w.Write(keys)
	})
	s.Server = httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.caFile = filepath.Join(t.TempDir(), "ca.pem")
	write(t, s.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	return s
}

func write(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *keyServer) set(change func(*keyServer)) { s.mu.Lock(); defer s.mu.Unlock(); change(s) }

func (s *keyServer) fetches() int { s.mu.Lock(); defer s.mu.Unlock(); return s.count }

func (s *keyServer) config() authn.IssuerConfig {
	return authn.IssuerConfig{Name: "cluster", Kind: authn.KindKubernetes, Issuer: s.URL, Audiences: []string{"istio-ca", "other"}, CAFile: s.caFile}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func body(text []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(text) }
}

// bench is an authenticator and what it stands on.
type bench struct {
	*authn.Authenticator
	clock  *handClock
	log    *logText
	cancel context.CancelFunc
	ended  chan struct{}
}

// start makes an authenticator and runs it until the test ends.
func start(t testing.TB, o authn.Options) *bench {
	t.Helper()
	b := &bench{clock: newClock(), log: &logText{}, ended: make(chan struct{})}
	o.TrustDomain = td
	if o.Now == nil {
		o.Now = b.clock.Now
	}
	o.Logger = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	if b.Authenticator, err = authn.New(o); err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(b.ended)
		if err := b.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(b.stop)
	return b
}

func (b *bench) stop() { b.cancel(); <-b.ended }

func (b *bench) claims(issuer string) claims {
	now := b.clock.Now()
	return claims{
		"iss": issuer, "sub": "system:serviceaccount:prod:web", "aud": []string{"istio-ca"}, "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": claims{"namespace": "prod", "serviceaccount": claims{"name": "web", "uid": "sa-uid"}, "pod": claims{"name": "web-1", "uid": "pod-uid"},
			"node": claims{"name": "node-1", "uid": "node-uid"}},
	}
}

func (b *bench) ask(headers ...string) (ca.Caller, error) {
	return b.Authenticate(context.Background(), authn.Credentials{Tokens: headers, Peer: "192.0.2.1:4711", ClusterID: "c1", RequestID: "r1"})
}

func (b *bench) accepts(t testing.TB, token string) ca.Caller {
	t.Helper()
	caller, err := b.ask("Bearer " + token)
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	return caller
}

// refuses says that err is of one kind, tells the reason, and no part of the token.
func refuses(t testing.TB, err, kind error, reason string, tokens ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted; want a refusal about %q", reason)
	}
	for _, k := range []error{ca.ErrUnauthenticated, ca.ErrDenied, ca.ErrUnavailable, ca.ErrInvalid} {
		if errors.Is(err, k) != (k == kind) {
			t.Errorf("%q: is %q: %v; want it to be %q alone", err, k, errors.Is(err, k), kind)
		}
	}
	if !strings.Contains(err.Error(), reason) {
		t.Errorf("the reason is %q; want it to say %q", err, reason)
	}
	if len(err.Error()) > 2000 {
		t.Errorf("the reason has %d octets", len(err.Error()))
	}
	for _, token := range tokens {
		for _, part := range strings.Split(token, ".") {
			if len(part) >= 16 && strings.Contains(err.Error(), part) {
				t.Errorf("the reason %q contains a part of the token", err)
			}
		}
	}
}
