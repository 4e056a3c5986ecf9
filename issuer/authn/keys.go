package authn

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// Limits on what a key server may send, and on how often it is asked.
const (
	maxJWKS        = 1 << 20 // octets
	maxKeys        = 100
	minRSABits     = 2048
	maxRSABits     = 8192 // a larger one makes every verification dear
	fetchLimit     = 10 * time.Second
	defaultRefresh = 5 * time.Minute
	defaultRefetch = 10 * time.Second
	maxRedirects   = 3
	discoveryPath  = "/.well-known/openid-configuration" // OpenID Connect Discovery 4
)

// keySet is the keys of one issuer: those that were fetched last, for as long as newer ones cannot be had.
type keySet struct {
	issuer, file, url, bearerFile, cache string
	refresh, refetch                     time.Duration
	client                               *http.Client
	now                                  func() time.Time
	log                                  *slog.Logger

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time     // when keys were had last; zero: they are from the cache, or there are none
	began   time.Time     // when the last fetch began
	failed  error         // why the last fetch failed; nil: it did not
	flight  chan struct{} // closed when the fetch under way ends; nil: none is
}

func newKeySet(c IssuerConfig, cache string, now func() time.Time, log *slog.Logger) (*keySet, error) {
	k := &keySet{issuer: c.Issuer, file: c.JWKSFile, url: c.JWKSURL, bearerFile: c.BearerTokenFile, cache: cache,
		refresh: c.RefreshInterval, refetch: c.MinRefetch, now: now, log: log.With("token_issuer", c.Name)}
	if k.refresh == 0 {
		k.refresh = defaultRefresh
	}
	if k.refetch == 0 {
		k.refetch = defaultRefetch
	}
	if k.file != "" && k.url != "" {
		return nil, errors.New("it has both a JWKS file and a JWKS URL: its keys come from one of them")
	}
	if k.file != "" {
		return k, nil
	}
	start := k.url
	if start == "" {
		start = k.issuer
	}
	if err := checkURL(start); err != nil {
		return nil, err
	}
	roots, err := readRoots(c.CAFile)
	if err != nil {
		return nil, err
	}
	k.client = &http.Client{
		Timeout:   fetchLimit,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) >= maxRedirects {
				return errors.New("it redirects too often")
			}
			return checkURL(r.URL.String())
		},
	}
	k.readCache()
	return k, nil
}

// checkURL lets keys come over https only; over http from this machine itself.
func checkURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("the URL for its keys: %w", err)
	}
	host := net.ParseIP(u.Hostname())
	if u.Scheme == "https" && u.Host != "" || u.Scheme == "http" && (u.Hostname() == "localhost" || host != nil && host.IsLoopback()) {
		return nil
	}
	return fmt.Errorf("its keys would come from %q: that takes an https URL (http only on a loopback address), or a JWKS file", text)
}

func readRoots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil // the system's
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the roots for its key server: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("reading the roots for its key server: %s has no certificate in PEM", path)
	}
	return pool, nil
}

// run fetches the keys now, and then at every interval, until ctx ends.
func (k *keySet) run(ctx context.Context) {
	for {
		k.fetchNow(ctx)
		wait := k.refresh*3/4 + rand.N(k.refresh/2)
		k.mu.Lock()
		if k.failed != nil {
			wait = min(wait, 2*k.refetch)
		}
		k.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// find returns the keys that may have signed a token with this key id and algorithm. For an unknown id the keys are fetched
// anew, but no more often than refetch allows: all callers wait for the one fetch under way, and a flood causes no others.
func (k *keySet) find(ctx context.Context, id, algorithm string) ([]jose.JSONWebKey, error) {
	found, known := k.match(id, algorithm)
	if len(found) > 0 {
		return found, nil
	}
	if err := k.await(ctx); err != nil {
		return nil, ca.Unavailable(err)
	}
	if found, known = k.match(id, algorithm); len(found) > 0 {
		return found, nil
	}
	if !known {
		return nil, ca.Unavailable(fmt.Errorf("its keys have never been had: %w", k.lastFailure()))
	}
	if id == "" {
		return nil, ca.Unauthenticated(fmt.Errorf("it names no key id, and not exactly one key fits %s", algorithm))
	}
	return nil, ca.Unauthenticated(fmt.Errorf("its key id %.64q is not among the issuer's keys for %s", id, algorithm))
}

// match finds keys in what is there. known says whether there are any at all.
func (k *keySet) match(id, algorithm string) (found []jose.JSONWebKey, known bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range k.keys {
		if (id == "" || key.KeyID == id) && fits(key, algorithm) {
			found = append(found, key)
		}
	}
	if id == "" && len(found) > 1 {
		found = nil
	}
	return found, len(k.keys) > 0
}

// fits says whether a key can make signatures of an algorithm (RFC 7518 3.1), and may (its own "alg").
func fits(key jose.JSONWebKey, algorithm string) bool {
	if key.Algorithm != "" && key.Algorithm != algorithm {
		return false
	}
	switch pub := key.Key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		return map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[pub.Curve.Params().BitSize] == algorithm
	case ed25519.PublicKey:
		return algorithm == "EdDSA"
	}
	return false
}

// await begins a fetch if one is due and waits for the one under way.
func (k *keySet) await(ctx context.Context) error {
	k.mu.Lock()
	flight := k.flight
	if flight == nil {
		if !k.began.IsZero() && k.now().Sub(k.began) < k.refetch && !k.now().Before(k.began) {
			k.mu.Unlock()
			return nil
		}
		flight = k.begin()
		go k.fetch(context.WithoutCancel(ctx), flight) // it is for all who wait, and has a limit of its own
	}
	k.mu.Unlock()
	select {
	case <-flight:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the issuer's keys: %w", ctx.Err())
	}
}

// begin notes that a fetch is under way; mu is held.
func (k *keySet) begin() chan struct{} {
	k.flight, k.began = make(chan struct{}), k.now()
	return k.flight
}

// fetchNow fetches, or waits for the fetch under way.
func (k *keySet) fetchNow(ctx context.Context) {
	k.mu.Lock()
	if flight := k.flight; flight != nil {
		k.mu.Unlock()
		select {
		case <-flight:
		case <-ctx.Done():
		}
		return
	}
	flight := k.begin()
	k.mu.Unlock()
	k.fetch(ctx, flight)
}

func (k *keySet) fetch(ctx context.Context, flight chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	keys, raw, err := k.read(ctx)
	if err == nil && k.cache != "" {
		if err := writeCache(k.cache, raw); err != nil {
			k.log.Warn("the issuer's keys could not be kept for the next start", "error", err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	before := k.failed
	k.failed, k.flight = err, nil
	if err == nil {
		k.keys, k.fetched = keys, k.now()
	}
	close(flight)
	switch {
	case err != nil && before == nil && ctx.Err() != context.Canceled:
		k.log.Warn("the issuer's keys cannot be had; those that were had last go on serving", "error", err, "keys", len(k.keys))
	case err == nil && before != nil:
		k.log.Info("the issuer's keys can be had again", "keys", len(keys))
	}
}

// read gets the keys from the file, or from the key server.
func (k *keySet) read(ctx context.Context) ([]jose.JSONWebKey, []byte, error) {
	if k.file != "" {
		file, err := os.Open(k.file)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the JWKS: %w", err)
		}
		defer file.Close()
		raw, err := readLimited(file, k.file)
		if err != nil {
			return nil, nil, err
		}
		keys, err := k.parse(raw)
		return keys, raw, err
	}
	where := k.url
	if where == "" {
		raw, err := k.get(ctx, strings.TrimSuffix(k.issuer, "/")+discoveryPath)
		if err != nil {
			return nil, nil, err
		}
		var document struct {
			Issuer string `json:"issuer"`
			JWKS   string `json:"jwks_uri"`
		}
		if err := json.Unmarshal(raw, &document); err != nil {
			return nil, nil, fmt.Errorf("the discovery document of %s: %w", k.issuer, err)
		}
		if document.Issuer != k.issuer { // OpenID Connect Discovery 4.3
			return nil, nil, fmt.Errorf("the discovery document of %s is for the issuer %.200q", k.issuer, document.Issuer)
		}
		if err := checkURL(document.JWKS); err != nil {
			return nil, nil, err
		}
		where = document.JWKS
	}
	raw, err := k.get(ctx, where)
	if err != nil {
		return nil, nil, err
	}
	keys, err := k.parse(raw)
	return keys, raw, err
}

func (k *keySet) get(ctx context.Context, where string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		return nil, fmt.Errorf("asking for the issuer's keys: %w", err)
	}
	request.Header.Set("Accept", "application/json")
	if k.bearerFile != "" {
		token, err := os.ReadFile(k.bearerFile)
		if err != nil {
			return nil, fmt.Errorf("reading the bearer token for the key server: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	response, err := k.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("asking for the issuer's keys: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking for the issuer's keys: %s answered %s", where, response.Status)
	}
	return readLimited(response.Body, where)
}

func readLimited(r io.Reader, where string) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxJWKS+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", where, err)
	}
	if len(raw) > maxJWKS {
		return nil, fmt.Errorf("reading %s: it has more than the %d octets that are read", where, maxJWKS)
	}
	return raw, nil
}

// parse takes the keys that may be used from a JWKS (RFC 7517 5). One that cannot be is passed over, with a word in the log.
func (k *keySet) parse(raw []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, fmt.Errorf("the issuer's JWKS cannot be read: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the issuer's JWKS has %d keys, more than the %d that are read", len(set.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	for n, text := range set.Keys {
		var key jose.JSONWebKey
		err := key.UnmarshalJSON(text)
		if err == nil {
			err = usable(key)
		}
		if err != nil {
			k.log.Warn("a key of the issuer is passed over", "key", n+1, "kid", key.KeyID, "reason", err)
			continue
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("the issuer's JWKS has no key that can be used")
	}
	return keys, nil
}

func usable(key jose.JSONWebKey) error {
	if !key.Valid() || !key.IsPublic() {
		return errors.New("it is not a public key")
	}
	if key.Use != "" && key.Use != "sig" {
		return fmt.Errorf("its use is %.40q, not sig", key.Use)
	}
	if pub, ok := key.Key.(*rsa.PublicKey); ok {
		if bits := pub.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("it is RSA of %d bits, and %d to %d are allowed", bits, minRSABits, maxRSABits)
		}
	}
	return nil
}

func (k *keySet) lastFailure() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.failed == nil {
		return errors.New("no fetch has ended yet")
	}
	return k.failed
}

// problem says what is wrong with the keys; "" for nothing.
func (k *keySet) problem() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.failed == nil:
		return ""
	case len(k.keys) == 0:
		return fmt.Sprintf("its keys have never been had, so its tokens are refused for now: %v", k.failed)
	case k.fetched.IsZero():
		return fmt.Sprintf("its keys cannot be had; those of an earlier run serve: %v", k.failed)
	}
	return fmt.Sprintf("its keys cannot be had; those of %s serve: %v", k.fetched.UTC().Format(time.RFC3339), k.failed)
}

func writeCache(path string, raw []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(path, raw)
}

// readCache takes up the keys of an earlier run.
func (k *keySet) readCache() {
	if k.cache == "" {
		return
	}
	raw, err := os.ReadFile(k.cache)
	if err != nil {
		return // the first start, or nothing that a fetch will not mend
	}
	if keys, err := k.parse(raw); err == nil {
		k.keys = keys
	}
}
