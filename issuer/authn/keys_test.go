package authn_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kedge/ca"
	"kedge/issuer/authn"
)

func TestARotatedKeyIsFetchedWhenItsFirstTokenComes(t *testing.T) {
	first, second := newSigner(t, "k1"), newSigner(t, "k2")
	server := newKeyServer(t, first)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	b.accepts(t, first.sign(t, b.claims(server.URL)))
	server.set(func(s *keyServer) { s.keys = jwks(t, second) })
	b.accepts(t, first.sign(t, b.claims(server.URL)))

	b.clock.pass(10 * time.Second)
	b.accepts(t, second.sign(t, b.claims(server.URL)))
	_, err := b.ask("Bearer " + first.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnauthenticated, `its key (id "k1", ES256) is not among the issuer's 1 keys`)
	if server.fetches() != 2 {
		t.Errorf("%d fetches, want 2", server.fetches())
	}
}

func TestAFloodOfUnknownKeyIDsCausesOneFetchInTenSeconds(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	good := key.sign(t, with(b.claims(server.URL), claims{"iat": nil, "nbf": nil}))
	b.accepts(t, good)
	flood := func() {
		t.Helper()
		var all sync.WaitGroup
		for n := range 100 {
			token := signer{fmt.Sprintf("unknown-%d", n), key.alg, key.key}.sign(t, b.claims(server.URL))
			all.Go(func() {
				_, err := b.ask("Bearer " + token)
				refuses(t, err, ca.ErrUnauthenticated, "is not among the issuer's 1 keys", token)
			})
		}
		all.Wait()
		b.accepts(t, good)
	}
	flood()
	if got := server.fetches(); got != 1 {
		t.Errorf("%d fetches within ten seconds, want the one at the start", got)
	}
	for round := 2; round < 5; round++ {
		b.clock.pass(10 * time.Second)
		flood()
		if got := server.fetches(); got != round {
			t.Errorf("%d fetches after %d times ten seconds, want %d", got, round-1, round)
		}
	}
	b.clock.pass(-time.Hour) // a clock that was set back does not stop fetches for an hour
	flood()
	if got := server.fetches(); got != 5 {
		t.Errorf("%d fetches after the clock was set back, want 5", got)
	}
}

func TestKeysAreFetchedAnewAtEveryInterval(t *testing.T) {
	first, second := newSigner(t, "k1"), newSigner(t, "k2")
	server := newKeyServer(t, first)
	c := server.config()
	c.RefreshInterval = 10 * time.Millisecond
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	b.accepts(t, first.sign(t, b.claims(server.URL)))
	server.set(func(s *keyServer) { s.keys = jwks(t, second) })
	for range 3 { // of which the last began after the change
		<-server.asked
	}
	for { // until what was fetched is taken up; nothing asks for a fetch meanwhile, since the clock stands still
		if _, err := b.ask("Bearer " + second.sign(t, b.claims(server.URL))); err == nil {
			break
		}
		<-server.asked
	}
	if s := b.Issuers()[0]; s.Name != "cluster" || s.Keys != 1 || s.Fetches < 2 || s.Failures != 0 || s.Failure != "" || !s.FailingSince.IsZero() || s.Fetched.IsZero() {
		t.Errorf("got %+v", s)
	}
}

func TestAnIssuerThatIsAwayKeepsItsLastKeys(t *testing.T) {
	key, next := newSigner(t, "k1"), newSigner(t, "k2")
	for name, answer := range map[string]http.HandlerFunc{
		"error":            status(http.StatusInternalServerError),
		"forbidden":        status(http.StatusForbidden),
		"no JSON":          body([]byte("<html>")),
		"no keys":          body([]byte(`{}`)),
		"empty keys":       body([]byte(`{"keys":[]}`)),
		"too large":        body(append(jwks(t, key), bytes.Repeat([]byte(" "), 1<<20)...)),
		"endless":          func(w http.ResponseWriter, _ *http.Request) { endless(w) },
		"too many keys":    body(manyKeys(t, key, 101)),
		"connection ended": func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) },
		"other scheme": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host+"/keys", http.StatusFound)
		},
		"endless redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/keys", http.StatusFound) },
	} {
		t.Run(name, func(t *testing.T) {
			server := newKeyServer(t, key)
			b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
			good := key.sign(t, b.claims(server.URL))
			b.accepts(t, good)
			fetched := b.clock.Now()
			server.set(func(s *keyServer) { s.answer = answer })
			for range 3 {
				b.clock.pass(10 * time.Second)
				unknown := next.sign(t, b.claims(server.URL))
				_, err := b.ask("Bearer " + unknown)
				refuses(t, err, ca.ErrUnavailable, "the issuer's keys cannot be had now", unknown)
				b.accepts(t, good)
			}
			since := fetched.Add(10 * time.Second).UTC().Format(time.RFC3339)
			problems := b.Problems()
			if len(problems) != 1 || !strings.Contains(problems[0], "since "+since) || !strings.Contains(problems[0], "those of "+fetched.UTC().Format(time.RFC3339)) {
				t.Errorf("got the problems %q, want since %s", problems, since)
			}
			if s := b.Issuers()[0]; s.Keys != 1 || s.Failures != 3 || s.Failure == "" || !s.FailingSince.Equal(fetched.Add(10*time.Second)) || !s.Fetched.Equal(fetched) {
				t.Errorf("got %+v", s)
			}
			if n := strings.Count(b.log.String(), "cannot be had; the last ones go on serving"); n != 1 {
				t.Errorf("said %d times, want once:\n%s", n, b.log)
			}

			server.set(func(s *keyServer) { s.answer, s.keys = nil, jwks(t, key, next) })
			b.clock.pass(10 * time.Second)
			b.accepts(t, next.sign(t, b.claims(server.URL)))
			if problems := b.Problems(); len(problems) != 0 {
				t.Errorf("it is back, and there are still the problems %q", problems)
			}
			if !strings.Contains(b.log.String(), "can be had again") {
				t.Errorf("nothing says that it is back:\n%s", b.log)
			}
		})
	}
}

func endless(w http.ResponseWriter) {
	for chunk := bytes.Repeat([]byte(" "), 64<<10); ; {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func manyKeys(t *testing.T, key signer, n int) []byte {
	t.Helper()
	all := make([]signer, n)
	for i := range all {
		all[i] = signer{fmt.Sprint(i), key.alg, key.key}
	}
	return jwks(t, all...)
}

func TestAnIssuerThatNeverGaveKeysMakesCallersTryAgain(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	server.set(func(s *keyServer) { s.answer = status(http.StatusServiceUnavailable) })
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	good := key.sign(t, b.claims(server.URL))
	for range 3 {
		_, err := b.ask("Bearer " + good)
		refuses(t, err, ca.ErrUnavailable, "503", good)
	}
	if server.fetches() != 1 {
		t.Errorf("%d fetches in no time, want 1", server.fetches())
	}
	if problems := b.Problems(); len(problems) != 1 || !strings.Contains(problems[0], "none of its tokens is accepted") {
		t.Errorf("got the problems %q", problems)
	}
	server.set(func(s *keyServer) { s.answer = nil })
	b.clock.pass(10 * time.Second)
	b.accepts(t, good)
}

// TestAnIssuerThatIsBackIsFoundWithoutACall: in the background, whether or not its keys were ever had. Each outage is logged once.
func TestAnIssuerThatIsBackIsFoundWithoutACall(t *testing.T) {
	for name, c := range map[string]struct {
		before, after error // what a good token gets before the outage, and during it
		says          string
	}{
		"it was there before": {nil, nil, "those of "},
		"it never was":        {ca.ErrUnavailable, ca.ErrUnavailable, "and never were"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				key, file := newSigner(t, "k1"), filepath.Join(t.TempDir(), "jwks.json")
				if c.before == nil {
					write(t, file, jwks(t, key))
				}
				const issuer = "https://cluster.example"
				b := start(t, authn.Options{Now: time.Now, Issuers: []authn.IssuerConfig{
					{Name: "cluster", Kind: authn.KindKubernetes, Issuer: issuer, Audiences: []string{"istio-ca"}, JWKSFile: file, RefreshInterval: 5 * time.Minute}}})
				token := key.sign(t, b.claims(issuer))
				ask := func(want error) {
					t.Helper()
					if _, err := b.ask("Bearer " + token); !errors.Is(err, want) {
						t.Errorf("got %v, want %v", err, want)
					}
				}
				synctest.Wait()
				ask(c.before)
				if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
				<-time.After(10 * time.Minute)
				ask(c.after)
				if problems := b.Problems(); len(problems) != 1 || !strings.Contains(problems[0], c.says) {
					t.Errorf("got the problems %q", problems)
				}
				if n := strings.Count(b.log.String(), "the issuer's keys cannot be had"); n != 1 {
					t.Errorf("said %d times, want once:\n%s", n, b.log)
				}
				write(t, file, jwks(t, key))
				<-time.After(20 * time.Second) // twice the shortest time between fetches
				synctest.Wait()
				if problems := b.Problems(); len(problems) != 0 {
					t.Errorf("it is back, and there are still the problems %q", problems)
				}
				ask(nil)
			})
		})
	}
}

func TestARestartWhileTheIssuerIsAwayUsesTheKeysOfBefore(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	dir := filepath.Join(t.TempDir(), "issuers")
	o := authn.Options{Issuers: []authn.IssuerConfig{server.config()}, CacheDir: dir}
	b := start(t, o)
	good := key.sign(t, b.claims(server.URL))
	b.accepts(t, good)
	fetched := b.clock.Now()
	b.stop()
	server.Close()

	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %v, %v", files, err)
	}
	path := filepath.Join(dir, files[0].Name())
	for name, mode := range map[string]os.FileMode{dir: 0o700 | os.ModeDir, path: 0o600} {
		if info, err := os.Stat(name); err != nil || info.Mode() != mode {
			t.Errorf("%s has the mode %v (%v), want %v", name, info.Mode(), err, mode)
		}
	}

	b = start(t, o)
	b.accepts(t, good)
	b.clock.pass(10 * time.Second)
	_, err = b.ask("Bearer " + newSigner(t, "k2").sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnavailable, "the issuer's keys cannot be had now")
	b.accepts(t, good)
	if problems := b.Problems(); len(problems) != 1 || !strings.Contains(problems[0], "those of "+fetched.UTC().Format(time.RFC3339)) {
		t.Errorf("got the problems %q", problems)
	}
	b.stop()

	kept, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := newKeyServer(t, key)
	other.set(func(s *keyServer) { s.answer = status(http.StatusNotFound) })
	moved := server.config()
	moved.JWKSURL, moved.CAFile = other.URL+"/keys", other.caFile
	stranger := server.config()
	stranger.Issuer, stranger.JWKSURL = "https://stranger.example", server.URL+"/.well-known/openid-configuration"
	for name, c := range map[string]struct {
		issuer authn.IssuerConfig
		kept   []byte
	}{
		"another issuer, from the same place": {stranger, kept},
		"another issuer of that name":         {other.config(), kept},
		"keys from another place":             {moved, kept},
		"a file that was cut off":             {server.config(), kept[:len(kept)/2]},
		"a file without keys":                 {server.config(), bytes.Replace(kept, []byte(`"kty"`), []byte(`"kt"`), -1)},
		"a file that is something else":       {server.config(), []byte("[]")},
	} {
		write(t, path, c.kept)
		b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c.issuer}, CacheDir: dir})
		token := key.sign(t, b.claims(c.issuer.Issuer))
		_, err := b.ask("Bearer " + token)
		refuses(t, err, ca.ErrUnavailable, "cannot be had now", token)
		if !strings.Contains(b.log.String(), "do not count") {
			t.Errorf("%s: nothing says that the kept keys do not count:\n%s", name, b.log)
		}
		b.stop()
	}
}

func TestKeysThatCannotBeKeptAreAProblemAndNoFailure(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, nil)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}, CacheDir: filepath.Join(file, "below")})
	b.accepts(t, key.sign(t, b.claims(server.URL)))
	if problems := b.Problems(); len(problems) != 1 || !strings.Contains(problems[0], "could not be kept for the next start") {
		t.Errorf("got the problems %q", problems)
	}
}

func TestTheBearerTokenIsReadAnewForEachFetchAndNeverSaid(t *testing.T) {
	key, next := newSigner(t, "k1"), newSigner(t, "k2")
	server := newKeyServer(t, key)
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, []byte("secret-one\n"))
	c := server.config()
	c.BearerTokenFile = file
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	b.accepts(t, key.sign(t, b.claims(server.URL)))
	if got := <-server.asked; got != "Bearer secret-one" {
		t.Errorf("got %q", got)
	}
	write(t, file, []byte("secret-two"))
	server.set(func(s *keyServer) { s.keys = jwks(t, next) })
	b.clock.pass(10 * time.Second)
	b.accepts(t, next.sign(t, b.claims(server.URL)))
	if got := <-server.asked; got != "Bearer secret-two" {
		t.Errorf("got %q", got)
	}

	elsewhere := newKeyServer(t, key)
	for reason, fault := range map[string]func(){
		"to another host, which must not get": func() {
			server.set(func(s *keyServer) {
				s.answer = func(w http.ResponseWriter, r *http.Request) {
					http.Redirect(w, r, elsewhere.URL+"/keys", http.StatusFound)
				}
			})
		},
		"no such file":               func() { os.Remove(file) },
		"does not hold one token":    func() { write(t, file, []byte("secret-two\nsecret-three")) },
		"more than the 65536 octets": func() { write(t, file, bytes.Repeat([]byte("secret-two"), 10000)) },
		"answered 401": func() {
			write(t, file, []byte("secret-two"))
			server.set(func(s *keyServer) { s.answer = status(401) })
		},
		"invalid header field value": func() { write(t, file, []byte("secret-two\x01")) },
	} {
		server.set(func(s *keyServer) { s.answer = nil })
		write(t, file, []byte("secret-two"))
		fault()
		b.clock.pass(10 * time.Second)
		_, err := b.ask("Bearer " + key.sign(t, b.claims(server.URL)))
		refuses(t, err, ca.ErrUnavailable, reason)
	}
	if elsewhere.fetches() != 0 {
		t.Error("the bearer token went to another host")
	}
	if all := b.log.String() + fmt.Sprint(b.Problems(), b.Issuers()); strings.Contains(all, "secret-") {
		t.Errorf("the bearer token is in the log or among the problems:\n%s", all)
	}
}

func TestAKeyServerCannotLeadToAnUnprotectedPlace(t *testing.T) {
	key, fake := newSigner(t, "k1"), newSigner(t, "fake")
	unprotected := httptest.NewServer(body(jwks(t, fake)))
	t.Cleanup(unprotected.Close)
	server := newKeyServer(t, key)
	server.set(func(s *keyServer) {
		s.answer = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, unprotected.URL, http.StatusFound) }
	})
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	_, err := b.ask("Bearer " + fake.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnavailable, "it redirects from https to http")
}

func TestKeysFromAURLAndByARedirectOnTheSameHost(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	server.set(func(s *keyServer) {
		s.doc = []byte("not asked for")
		s.answer = func(w http.ResponseWriter, r *http.Request) {
			if r.URL.RawQuery == "" {
				http.Redirect(w, r, "/keys?again", http.StatusFound)
				return
			}
			w.Write(s.keys)
		}
	})
	c := server.config()
	c.Issuer, c.JWKSURL = "kubernetes/serviceaccount", server.URL+"/keys"
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	b.accepts(t, key.sign(t, b.claims("kubernetes/serviceaccount")))
}

func TestADiscoveryDocumentMustBeTheIssuersOwnAndLeadToAProtectedPlace(t *testing.T) {
	key := newSigner(t, "k1")
	for reason, doc := range map[string]func(url string) any{
		`is for the issuer "https://elsewhere.example"`: func(url string) any { return claims{"issuer": "https://elsewhere.example", "jwks_uri": url + "/keys"} },
		`keys would come from "http://192.0.2.1/keys"`:  func(url string) any { return claims{"issuer": url, "jwks_uri": "http://192.0.2.1/keys"} },
		`keys would come from "file:///etc/passwd"`:     func(url string) any { return claims{"issuer": url, "jwks_uri": "file:///etc/passwd"} },
		`keys would come from ""`:                       func(url string) any { return claims{"issuer": url} },
		"reading the discovery document":                func(url string) any { return "text" },
		"bad jwks_uri":                                  func(url string) any { return claims{"issuer": url, "jwks_uri": "https://\x7f"} },
	} {
		server := newKeyServer(t, key)
		server.set(func(s *keyServer) { s.doc = mustJSON(t, doc(s.URL)) })
		b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
		_, err := b.ask("Bearer " + key.sign(t, b.claims(server.URL)))
		refuses(t, err, ca.ErrUnavailable, reason)
	}
}

func TestOnlyTheConfiguredRootsProveAKeyServer(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	c := server.config()
	c.CAFile = ""
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	_, err := b.ask("Bearer " + key.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnavailable, "certificate")

	c = server.config()
	right, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	c.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	write(t, c.CAFile, right)
	b = start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	b.accepts(t, key.sign(t, b.claims(server.URL)))
	write(t, c.CAFile, []byte("no PEM"))
	b.clock.pass(10 * time.Second)
	next := newSigner(t, "k2")
	_, err = b.ask("Bearer " + next.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnavailable, "has no certificate in PEM")
	write(t, c.CAFile, right) // read anew
	server.set(func(s *keyServer) { s.keys = jwks(t, next) })
	b.clock.pass(10 * time.Second)
	b.accepts(t, next.sign(t, b.claims(server.URL)))
}

func TestPlainHTTPIsForThisMachineOnly(t *testing.T) {
	key := newSigner(t, "k1")
	server := httptest.NewServer(body(jwks(t, key)))
	t.Cleanup(server.Close)
	c := authn.IssuerConfig{Name: "local", Kind: authn.KindKubernetes, Issuer: "https://issuer.example", Audiences: []string{"istio-ca"}, JWKSURL: server.URL}
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	b.accepts(t, key.sign(t, b.claims("https://issuer.example")))
	for _, url := range []string{"http://192.0.2.1/keys", "http://localhost.example/", "ftp://localhost/", "https://", "https://user:password@issuer.example/",
		"keys.json", "http://127.0.0.1.example/"} {
		c.JWKSURL = url
		if _, err := authn.New(authn.Options{TrustDomain: td, Issuers: []authn.IssuerConfig{c}}); err == nil || strings.Contains(err.Error(), "password") {
			t.Errorf("%s: %v", url, err)
		}
	}
}

func TestAJWKSFileIsReadAnewAndABrokenOneKeepsTheLastKeys(t *testing.T) {
	first, second := newSigner(t, "k1"), newSigner(t, "k2")
	file := filepath.Join(t.TempDir(), "jwks.json")
	c := authn.IssuerConfig{Name: "file", Kind: authn.KindKubernetes, Issuer: "https://issuer.example", Audiences: []string{"istio-ca"}, JWKSFile: file}
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	one, two := first.sign(t, b.claims(c.Issuer)), second.sign(t, b.claims(c.Issuer))
	_, err := b.ask("Bearer " + one)
	refuses(t, err, ca.ErrUnavailable, "no such file")

	write(t, file, jwks(t, first))
	b.clock.pass(10 * time.Second)
	b.accepts(t, one)
	write(t, file, []byte("{"))
	b.clock.pass(10 * time.Second)
	_, err = b.ask("Bearer " + two)
	refuses(t, err, ca.ErrUnavailable, "cannot be read")
	b.accepts(t, one)
	write(t, file, jwks(t, second))
	b.clock.pass(10 * time.Second)
	b.accepts(t, two)
	_, err = b.ask("Bearer " + one)
	refuses(t, err, ca.ErrUnauthenticated, "is not among the issuer's 1 keys")
}

func TestKeysThatMustNotBeUsedArePassedOverWithAWord(t *testing.T) {
	good := newSigner(t, "good")
	public := func(bits int, e int) claims {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
		if err != nil {
			t.Fatal(err)
		}
		n.SetBit(n, bits-1, 1).SetBit(n, 0, 1)
		key := signer{"bad", "RS256", rsaKey()}.jwk()
		key.Key = &rsa.PublicKey{N: n, E: e}
		var members claims
		if err := json.Unmarshal(mustJSON(t, key), &members); err != nil {
			t.Fatal(err)
		}
		return members
	}
	var private claims
	key := signer{"bad", "RS256", rsaKey()}.jwk()
	key.Key = rsaKey()
	if err := json.Unmarshal(mustJSON(t, key), &private); err != nil {
		t.Fatal(err)
	}
	fine := public(2048, 65537)
	for reason, bad := range map[string]any{
		"RSA of 1024 bits":              public(1024, 65537),
		"RSA of 2047 bits":              public(2047, 65537),
		"modulus too large":             public(8193, 65537),
		"RSA of more than 8192 bits":    public(20000, 65537),
		"exponent is even":              public(2048, 65536),
		"bad e value":                   public(2048, 1),
		"exponent of more than 31 bits": with(fine, claims{"e": "AQAAAAAAAQAB"}),
		"secret or private key":         private,
		"secret or private key, which":  claims{"kty": "oct", "kid": "bad", "k": "c2VjcmV0"},
		"its use is":                    with(fine, claims{"use": "enc"}),
		"not for verifying":             with(fine, claims{"key_ops": []string{"encrypt"}}),
		"unknown":                       claims{"kty": "XX", "kid": "bad"},
		"unsupported elliptic curve":    claims{"kty": "EC", "kid": "bad", "crv": "secp256k1", "x": "AAAA", "y": "AAAA"},
		"not on declared curve":         claims{"kty": "EC", "kid": "bad", "crv": "P-256", "x": strings.Repeat("A", 43), "y": strings.Repeat("A", 43)},
		"cannot unmarshal":              "text",
	} {
		t.Run(reason, func(t *testing.T) {
			server := newKeyServer(t)
			server.set(func(s *keyServer) { s.keys = mustJSON(t, claims{"keys": []any{bad, good.jwk()}}) })
			b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
			b.accepts(t, good.sign(t, b.claims(server.URL)))
			if n := b.Issuers()[0].Keys; n != 1 {
				t.Errorf("%d keys, want 1", n)
			}
			log := b.log.String()
			if strings.Count(log, "passed over") != 1 || !strings.Contains(log, "key 1 of 2") || reason != "unknown" && !strings.Contains(log, reason) {
				t.Errorf("want one word about %q:\n%s", reason, log)
			}
			b.clock.pass(10 * time.Second)
			_, err := b.ask("Bearer " + signer{"bad", "RS256", rsaKey()}.sign(t, b.claims(server.URL)))
			refuses(t, err, ca.ErrUnauthenticated, "is not among the issuer's 1 keys")
			if n := strings.Count(b.log.String(), "passed over"); n != 1 {
				t.Errorf("said %d times of the same JWKS", n)
			}
		})
	}
}

// A fetch may take as long as the pause between fetches. Were the pause counted from its beginning, the next one would be due at once, and whoever
// brings an unknown key id would always wait.
func TestAfterAFetchThatFailedSlowlyNobodyWaitsForTheNext(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	b.accepts(t, key.sign(t, b.claims(server.URL)))
	<-server.asked
	unknown := func() string { return signer{"unknown", key.alg, key.key}.sign(t, b.claims(server.URL)) }
	release := make(chan struct{})
	server.set(func(s *keyServer) { s.working, s.answer = release, status(http.StatusServiceUnavailable) })
	b.clock.pass(time.Minute)
	waiting, refused := unknown(), make(chan error, 1)
	go func() { _, err := b.ask("Bearer " + waiting); refused <- err }()
	<-server.asked
	b.clock.pass(10 * time.Second) // goes by while it hangs
	close(release)
	refuses(t, <-refused, ca.ErrUnavailable, "503", waiting)
	for range 100 {
		token := unknown()
		_, err := b.ask("Bearer " + token)
		refuses(t, err, ca.ErrUnavailable, "503", token)
	}
	if got := server.fetches(); got != 2 {
		t.Errorf("%d fetches, want the one at the start and the one that failed", got)
	}
}

// A call gives its turn away before it waits for keys, and has one again afterwards.
func TestWhoWaitsForKeysStandsAside(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	hold := make(chan struct{})
	server.set(func(s *keyServer) { s.working = hold })
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	token := key.sign(t, b.claims(server.URL))
	var order []string
	aside := make(chan struct{})
	credentials := authn.Credentials{Tokens: []string{"Bearer " + token}, Aside: func() func(context.Context) error {
		order = append(order, "aside")
		close(aside)
		return func(context.Context) error { order = append(order, "back"); return nil }
	}}
	answered := make(chan error, 1)
	go func() { _, err := b.Authenticate(t.Context(), credentials); answered <- err }()
	<-aside
	close(hold)
	if err := <-answered; err != nil || !slices.Equal(order, []string{"aside", "back"}) {
		t.Errorf("%v, %v", order, err)
	}
	credentials.Aside = func() func(context.Context) error { t.Error("it stood aside for a key that is known"); return nil }
	if _, err := b.Authenticate(t.Context(), credentials); err != nil {
		t.Error(err)
	}
}

func TestACallerWaitsForKeysOnlyAsLongAsItsContext(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	gate := make(chan struct{})
	server.set(func(s *keyServer) { s.working = gate })
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	token := key.sign(t, b.claims(server.URL))
	<-server.asked // the fetch is under way, and hangs
	ctx, cancel := context.WithCancel(t.Context())
	refused := make(chan error)
	go func() {
		_, err := b.Authenticate(ctx, authn.Credentials{Tokens: []string{"Bearer " + token}})
		refused <- err
	}()
	cancel()
	err := <-refused
	refuses(t, err, ca.ErrUnavailable, "waiting for the issuer's keys", token)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not say that the caller went away", err)
	}
	close(gate)
	b.accepts(t, token)
}

func TestAfterTheEndNobodyWaitsAndKnownKeysGoOn(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	gate := make(chan struct{})
	server.set(func(s *keyServer) { s.working = gate })
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	<-server.asked
	b.stop() // while a fetch hangs
	if problems := b.Problems(); len(problems) != 0 {
		t.Errorf("the end is not the issuer's fault: %q", problems)
	}
	b.clock.pass(time.Minute)
	_, err := b.ask("Bearer " + key.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnavailable, "stopping")
	close(gate)

	server = newKeyServer(t, key)
	b = start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	token := key.sign(t, b.claims(server.URL))
	b.accepts(t, token)
	b.stop()
	b.accepts(t, token)
}
