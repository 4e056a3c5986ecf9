package authn_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
