package authn_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/issuer/authn"
)

// Whatever comes as a token, there is an answer of one kind, and it carries no large part of the input. Only the seeds are good.
func FuzzToken(f *testing.F) {
	key, join := newSigner(f, "k1"), newSigner(f, "")
	path := filepath.Join(f.TempDir(), "jwks.json")
	write(f, path, jwks(f, key))
	c := authn.IssuerConfig{Name: "a", Kind: authn.KindKubernetes, Issuer: "https://issuer.example", Audiences: []string{"istio-ca"}, JWKSFile: path}
	clock := newClock()
	j := joinTokens(f, join.key, clock, &redeemable{}, "ns/*/sa/*")
	b := start(f, authn.Options{Issuers: []authn.IssuerConfig{c}, Join: j, Now: clock.Now})
	good := key.sign(f, with(b.claims(c.Issuer), claims{"exp": 1 << 40}))
	joined, _, err := j.Create(web, time.Hour, true)
	if err != nil {
		f.Fatal(err)
	}
	b.accepts(f, good)
	b.accepts(f, joined)
	payload := string(mustJSON(f, b.claims(c.Issuer)))
	for _, seed := range []string{
		"Bearer " + good, "bearer " + joined, "Bearer " + good[:len(good)/2], "Bearer " + good[:len(good)-8], "Basic YTpi", "Bearer ..", "Bearer .", "",
		"Bearer " + raw(`{"alg":"none"}`, payload, ""), "Bearer " + raw(`{"alg":"HS256"}`, payload, "s"), "Bearer " + raw(`{"alg":"ES256","kid":"k1"}`, payload, "s"),
		"Bearer " + raw(`{"alg":"ES256","typ":"kedge-join+jwt"}`, payload, "s"), "Bearer " + raw(`{"alg":"ES256","jwk":{}}`, payload, "s"),
		"Bearer " + raw(`{"alg":"EdDSA","crit":["exp"],"exp":1}`, `{"iss":"kedge"}`, "s"), "Bearer " + raw(strings.Repeat("[", 3000), payload, "s"),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		caller, err := b.ask(header)
		if err == nil {
			if _, token, _ := strings.Cut(header, " "); strings.TrimSpace(token) != good && strings.TrimSpace(token) != joined && !sameSignature(token, good, joined) {
				t.Errorf("accepted %q as %s", header, caller.ID)
			}
			return
		}
		kinds := 0
		for _, kind := range []error{ca.ErrUnauthenticated, ca.ErrDenied, ca.ErrUnavailable} {
			if errors.Is(err, kind) {
				kinds++
			}
		}
		if kinds != 1 || len(err.Error()) > 1000 || len(caller.Proofs) != 0 {
			t.Errorf("%d kinds, %d octets: %q, %+v", kinds, len(err.Error()), err, caller)
		}
	})
}

// A JWS is read as go-jose reads it, its signature is by whose go-jose says it is, and nothing is taken that go-jose refuses. Refused besides is what
// no token here has: its own key, critical parameters, a type that is no text, and line breaks, which are not base64url.
func FuzzJWS(f *testing.F) {
	signers := []signer{newSigner(f, "k1")}
	for alg, curve := range map[jose.SignatureAlgorithm]elliptic.Curve{jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			f.Fatal(err)
		}
		signers = append(signers, signer{string(alg), alg, key})
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	signers = append(signers, signer{"", jose.EdDSA, edwards})
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		signers = append(signers, signer{string(alg), alg, rsaKey()})
	}
	for _, s := range signers {
		good := s.sign(f, claims{"iss": "a"})
		f.Add(good)
		header, _, _ := strings.Cut(good, ".")
		f.Add(header + "." + header + ".c2ln")
		f.Add(good[:len(good)-3])
		for _, other := range signers { // its signature under another algorithm
			text, err := base64.RawURLEncoding.DecodeString(header)
			if err != nil {
				f.Fatal(err)
			}
			changed := strings.Replace(string(text), string(s.alg), string(other.alg), 1)
			f.Add(base64.RawURLEncoding.EncodeToString([]byte(changed)) + good[len(header):])
		}
	}
	for _, header := range []string{`{"alg":"ES256","crit":["b64"],"b64":false}`, `{"alg":"ES256","b64":true}`, `{"alg":"ES256","nonce":1}`, `{"alg":"ES256","typ":null,"kid":null}`,
		`{"alg":"ES256","typ":1}`, `{"alg":"ES256","x":{"a":1,"a":1}}`, `{"alg":"ES256","x":1e999}`, `{"alg":"ES256","ALG":"none"}`, `{"alg":"none"}`, `{"alg":"HS256"}`, `{"alg":null}`,
		`{"alg":"ES256","jwk":null}`, `{"alg":"ES256","x5c":[]}`, `{"alg":"\u0045S256"}`, `{"alg":"ES256"} x`, " {\"alg\":\"ES256\"}\n", `null`, `[]`, ``} {
		f.Add(raw(header, `{}`, "s"))
	}
	f.Add("..")
	for _, s := range signers { // an algorithm of another curve, with the hash that it names, and signatures as long as the key's curve takes
		key, ok := s.key.(*ecdsa.PrivateKey)
		if !ok {
			continue
		}
		size := (key.Params().BitSize + 7) / 8
		for alg, hash := range map[string]crypto.Hash{"ES256": crypto.SHA256, "ES384": crypto.SHA384, "ES512": crypto.SHA512} {
			unsigned := strings.TrimSuffix(raw(`{"alg":"`+alg+`"}`, `{}`, ""), ".")
			digest := hash.New()
			digest.Write([]byte(unsigned))
			r, v, err := ecdsa.Sign(rand.Reader, key, digest.Sum(nil))
			if err != nil {
				f.Fatal(err)
			}
			signature := append(r.FillBytes(make([]byte, size)), v.FillBytes(make([]byte, size))...)
			f.Add(unsigned + "." + base64.RawURLEncoding.EncodeToString(signature))
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		algorithm, keyID, payload, signedWith, err := authn.ReadJWS(text)
		theirs, refused := jose.ParseSignedCompact(text, authn.Algorithms)
		if err != nil {
			if refused != nil {
				return
			}
			for _, name := range []string{"(crit)", "(b64)", "(jwk or x5c)", `"typ" is not a text`} {
				if strings.Contains(err.Error(), name) {
					return
				}
			}
			if strings.ContainsAny(text, "\r\n") {
				return
			}
			t.Fatalf("refused %q: %v", text, err)
		}
		if refused != nil {
			t.Fatalf("took %q, which go-jose refuses: %v", text, refused)
		}
		header := theirs.Signatures[0].Header
		if algorithm != header.Algorithm || keyID != header.KeyID || !bytes.Equal(payload, theirs.UnsafePayloadWithoutVerification()) {
			t.Errorf("read %s, %q, %q of %q, and go-jose %+v, %q", algorithm, keyID, payload, text, header, theirs.UnsafePayloadWithoutVerification())
		}
		for _, s := range signers {
			_, err := theirs.Verify(s.key.Public())
			if signedWith(s.key.Public()) != (err == nil) {
				t.Errorf("signed by %s: %t, and go-jose says %v: %q", s.alg, err != nil, err, text)
			}
		}
	})
}

// sameSignature says whether a token differs from a good one only in the unused bits at the end of its signature's base64url (RFC 4648 3.5).
func sameSignature(token string, good ...string) bool {
	for _, g := range good {
		if len(token) == len(g) && token[:len(g)-1] == g[:len(g)-1] {
			return true
		}
	}
	return false
}

// A template that is taken makes valid paths of one number of segments, or an error.
func FuzzIdentityTemplate(f *testing.F) {
	key := newSigner(f, "k1")
	path := filepath.Join(f.TempDir(), "jwks.json")
	write(f, path, jwks(f, key))
	for _, seed := range [][2]string{{"ci/{claim:a}", "x"}, {"{claim:a}/{claim:b.c}", "../x"}, {"a-{claim:a}-b", ".."},
		{"{claim:a}{claim:a}", "x"}, {"a/{", "ä"}, {"{claim:https://x}", "."}} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, template, value string) {
		if _, err := authn.ParseIdentityTemplate(template); err != nil {
			if len(err.Error()) > 2000 {
				t.Errorf("the reason has %d octets", len(err.Error()))
			}
			return
		}
		c := authn.IssuerConfig{Name: "a", Kind: authn.KindOIDC, Issuer: "https://issuer.example", Audiences: []string{"istio-ca"}, JWKSFile: path, Identity: template}
		b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
		caller, err := b.ask("Bearer " + key.sign(t, with(b.claims(c.Issuer), claims{"a": value, "b": claims{"c": value}})))
		if err != nil {
			return
		}
		if err := spiffeid.ValidatePath(caller.ID.Path()); err != nil || !caller.ID.MemberOf(td) {
			t.Errorf("%q with %q makes %s: %v", template, value, caller.ID, err)
		}
		claim := strings.ReplaceAll(strings.ReplaceAll(template, "{claim:a}", "x"), "{claim:b.c}", "x")
		if strings.Count(caller.ID.Path(), "/") != strings.Count(claim, "/")+1 && !strings.Contains(claim, "{") {
			t.Errorf("%q with %q makes %s", template, value, caller.ID)
		}
	})
}

// Whatever a key server sends, every key that is taken can be used, and no more than are allowed.
func FuzzJWKS(f *testing.F) {
	key := newSigner(f, "k1")
	for _, seed := range []string{string(jwks(f, key)), string(jwks(f, signer{"rs", "RS256", rsaKey()})), `{"keys":[{}]}`, `{"keys":null}`, `[]`,
		`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`, `{"keys":[{"kty":"oct","k":"AAAA"}]}`, `{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA"}]}`,
		`{"keys":[{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA","x5c":["AAAA"]}]}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, passedOver, err := authn.ParseJWKS(text)
		if (err == nil) != (len(keys) > 0) || len(keys)+len(passedOver) > 100 {
			t.Errorf("%d keys, %d passed over, %v", len(keys), len(passedOver), err)
		}
		for _, key := range keys {
			if !key.Valid() || !key.IsPublic() || len(key.Certificates) > 0 {
				t.Errorf("took %+v", key)
			}
		}
	})
}
