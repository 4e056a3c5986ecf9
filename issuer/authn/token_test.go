package authn_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
)

func TestAServiceAccountTokenProvesItsAccount(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	now := b.clock.Now()
	caller := b.accepts(t, key.sign(t, b.claims(server.URL)))
	proof := ledger.Proof{Method: ca.MethodKubernetes, Issuer: "cluster", Subject: "system:serviceaccount:prod:web", Time: ledger.At(now)}
	if caller.ID.String() != "spiffe://example.org/ns/prod/sa/web" || len(caller.Proofs) != 1 || caller.Proofs[0] != proof || caller.First == nil ||
		*caller.First != proof {
		t.Errorf("got %+v", caller)
	}
	if caller.Holder != (ledger.Holder{Kind: "pod", ID: "pod-uid"}) || !caller.IssuedAt.Equal(now) || caller.Replaces != 0 || caller.Presented != nil || caller.JoinToken != "" {
		t.Errorf("got %+v", caller)
	}
	if caller.Peer != "192.0.2.1:4711" || caller.ClusterID != "c1" {
		t.Errorf("got %+v", caller)
	}
}

func TestTokensAreTakenInEveryFormThatIssuersGiveThem(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	good := b.claims(server.URL)
	for name, header := range map[string]string{
		"scheme in lower case":       "bearer " + key.sign(t, good),
		"end of line":                "Bearer " + key.sign(t, good) + "\n",
		"no type":                    "Bearer " + key.signTyped(t, "", good),
		"access token":               "Bearer " + key.signTyped(t, "application/at+jwt", good),
		"audience as text":           "Bearer " + key.sign(t, with(good, claims{"aud": "istio-ca"})),
		"one audience of several":    "Bearer " + key.sign(t, with(good, claims{"aud": []string{"x", "other"}})),
		"no iat, no nbf":             "Bearer " + key.sign(t, with(good, claims{"iat": nil, "nbf": nil})),
		"fractions of a second":      "Bearer " + key.sign(t, with(good, claims{"exp": float64(b.clock.Now().Unix()) + 10.5})),
		"expired within the skew":    "Bearer " + key.sign(t, with(good, claims{"exp": b.clock.Now().Add(-29 * time.Second).Unix()})),
		"not yet within the skew":    "Bearer " + key.sign(t, with(good, claims{"nbf": b.clock.Now().Add(29 * time.Second).Unix()})),
		"a legacy token with expiry": "Bearer " + key.sign(t, with(good, claims{"kubernetes.io": nil})),
		"without key id":             "Bearer " + signer{"", key.alg, key.key}.sign(t, good),
	} {
		if _, err := b.ask(header); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEveryAsymmetricAlgorithmCounts(t *testing.T) {
	var signers []signer
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		signers = append(signers, signer{string(alg), alg, rsaKey()})
	}
	for alg, curve := range map[jose.SignatureAlgorithm]elliptic.Curve{jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, signer{string(alg), alg, key})
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signers = append(signers, signer{"EdDSA", jose.EdDSA, ed})
	server := newKeyServer(t, signers...)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	for _, s := range signers {
		b.accepts(t, s.sign(t, b.claims(server.URL)))
	}
	_, err = b.ask("Bearer " + signer{"RS256", jose.PS256, rsaKey()}.sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnauthenticated, "is not among the issuer's 10 keys") // that key's own "alg" is RS256

	only := server.config()
	only.Algorithms = []string{"ES256"}
	b = start(t, authn.Options{Issuers: []authn.IssuerConfig{only}})
	_, err = b.ask("Bearer " + signers[0].sign(t, b.claims(server.URL)))
	refuses(t, err, ca.ErrUnauthenticated, "algorithm RS256 is not one of [ES256]")
}

// raw puts a token together without a library that would refuse to.
func raw(header, payload, signature string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(header)) + "." + encode([]byte(payload)) + "." + encode([]byte(signature))
}

func TestBadTokensAreRefusedForTheRightReason(t *testing.T) {
	key, rs := newSigner(t, "k1"), signer{"rs", jose.RS256, rsaKey()}
	server := newKeyServer(t, key, rs)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	good, now := b.claims(server.URL), b.clock.Now()
	token := key.sign(t, good)
	parts := strings.Split(token, ".")
	payload := string(mustJSON(t, good))
	public, err := x509.MarshalPKIXPublicKey(rs.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	confused := func(secret []byte) string {
		return signWith(t, jose.HS256, jose.JSONWebKey{Key: secret, KeyID: "rs"}, &jose.SignerOptions{}, good)
	}
	withHeader := func(name jose.HeaderKey, value any) string {
		return signWith(t, jose.ES256, jose.JSONWebKey{Key: key.key, KeyID: "k1"}, (&jose.SignerOptions{}).WithHeader(name, value), good)
	}
	changed := func(name string, value any) string { return key.sign(t, with(good, claims{name: value})) }
	stranger := newSigner(t, "k1")
	embedded := signWith(t, jose.ES256, stranger.key, &jose.SignerOptions{EmbedJWK: true}, good)

	for _, c := range []struct {
		name, token, reason string
	}{
		{"empty", "", "not of the form 'Bearer TOKEN'"},
		{"blank", "   ", "not three parts"},
		{"not a token", "hello", "not three parts"},
		{"truncated after the header", parts[0], "not three parts"},
		{"truncated payload", parts[0] + "." + parts[1][:len(parts[1])/2] + "." + parts[2], "cannot be read"},
		{"truncated signature", token[:len(token)-8], "signature is not good"},
		{"no signature", parts[0] + "." + parts[1] + ".", "signature is not good"},
		{"four parts", token + ".x", "not three parts"},
		{"JSON serialization", `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, "not three parts"},
		{"standard base64", strings.Replace(token, ".", "=.", 1), "not three parts"},
		{"line breaks inside", parts[0] + ".\n" + parts[1] + "." + parts[2], "not three parts"},
		{"control characters", token[:20] + "\x00" + token[21:], "not three parts"},
		{"one octet too large", strings.Repeat("a", authn.MaxToken+1), "more than the 16384"},
		{"huge", strings.Repeat(token, 200000/len(token)), "more than the 16384"},
		{"header is no JSON", raw("x", payload, "s"), "header cannot be read"},
		{"header is a list", raw(`["ES256"]`, payload, "s"), "header cannot be read"},
		{"two algorithms", raw(`{"alg":"ES256","alg":"none"}`, payload, "s"), "header cannot be read"},
		{"payload is no JSON", key.sign(t, []byte("hello")), "claims cannot be read"},
		{"payload is a list", key.sign(t, []byte("[]")), "claims cannot be read"},
		{"two issuers", key.sign(t, []byte(`{"iss":"a","iss":"`+server.URL+`"}`)), "claims cannot be read"},
		{"deep nesting", key.sign(t, []byte(`{"iss":"`+server.URL+`","x":`+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)+`}`)), "it has no expiry"},
		{"alg none", raw(`{"alg":"none"}`, payload, ""), "only asymmetric signatures count"},
		{"alg None with signature", raw(`{"alg":"None","kid":"k1"}`, payload, "sig"), "only asymmetric signatures count"},
		{"no alg", raw(`{"kid":"k1"}`, payload, "sig"), "only asymmetric signatures count"},
		{"HS256 with the public key in PEM", confused(publicPEM), "only asymmetric signatures count"},
		{"HS256 with the public key in DER", confused(public), "only asymmetric signatures count"},
		{"HS256 with the modulus", confused(rsaKey().N.Bytes()), "only asymmetric signatures count"},
		{"a long algorithm", raw(`{"alg":"`+strings.Repeat("A", 5000)+`"}`, payload, ""), "only asymmetric signatures count"},
		{"encrypted", raw(`{"alg":"RSA-OAEP","enc":"A128GCM"}`, payload, "s"), "only asymmetric signatures count"},
		{"own key in the header", embedded, "brings its own key"},
		{"certificates in the header", withHeader("x5c", []string{"AAAA"}), "brings its own key"},
		{"critical parameters", withHeader("crit", []string{"b64"}), "critical parameters"},
		{"how the payload is encoded", withHeader("b64", false), "how its payload is encoded (b64)"},
		{"a key id that is no text", raw(`{"alg":"ES256","kid":1}`, payload, "s"), `its header cannot be read: "kid" is not a text`},
		{"an algorithm twice, in an object that nobody reads", raw(`{"alg":"ES256","x":{"alg":1,"alg":2}}`, payload, "s"), "header cannot be read"},
		{"another's key under our id", stranger.sign(t, good), "signature is not good"},
		{"changed payload", parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(payload, "prod", "root", 1))) + "." + parts[2],
			"signature is not good"},
		{"ES256 signature said to be RS256", raw(`{"alg":"RS256","kid":"rs"}`, payload, strings.Repeat("s", 64)), "signature is not good"},
		{"join token type", key.signTyped(t, "kedge-join+jwt", good), "join token, and they are switched off"},
		{"join token type in capitals", key.signTyped(t, "application/KEDGE-join+JWT", good), "join token, and they are switched off"},
		{"logout token", key.signTyped(t, "logout+jwt", good), `its type "logout+jwt" is not`},
		{"unknown issuer", changed("iss", "https://elsewhere.example"), `its issuer "https://elsewhere.example" is not one`},
		{"issuer with a slash more", changed("iss", server.URL+"/"), "is not one of those that are configured"},
		{"no issuer", changed("iss", nil), `its issuer "" is not one`},
		{"issuer is a number", changed("iss", 7), "claims cannot be read"},
		{"the issuer of join tokens", changed("iss", "kedge"), "join token, and they are switched off"},
		{"wrong audience", changed("aud", "vault"), `its audience ["vault"] is none of ["istio-ca" "other"]`},
		{"part of the audience", changed("aud", "istio"), "its audience"},
		{"no audience", changed("aud", nil), "its audience"},
		{"empty audience", changed("aud", []string{}), "its audience"},
		{"audience is an object", changed("aud", claims{"istio-ca": true}), "claims cannot be read"},
		{"many audiences", changed("aud", strings.Split(strings.Repeat("vault,", 1000), ",")), "its audience"},
		{"expired", changed("exp", now.Add(-31*time.Second).Unix()), "it expired at"},
		{"no expiry", changed("exp", nil), "it has no expiry"},
		{"expiry null", key.sign(t, []byte(strings.Replace(payload, fmt.Sprint(`"exp":`, good["exp"]), `"exp":null`, 1))), "it has no expiry"},
		{"expiry is text", changed("exp", "never"), "claims cannot be read"},
		{"expiry is absurd", changed("exp", 1e300), "claims cannot be read"},
		{"expiry is negative", changed("exp", -1), "it expired at"},
		{"not yet valid", changed("nbf", now.Add(31*time.Second).Unix()), "it is valid only from"},
		{"issued in the future", changed("iat", now.Add(31*time.Second).Unix()), "in the future"},
		{"no subject", changed("sub", nil), "its subject has 0 octets"},
		{"long subject", changed("sub", "system:serviceaccount:"+strings.Repeat("a", 1024)+":b"), "octets; it needs one of at most 1024"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := b.ask("Bearer " + c.token)
			refuses(t, err, ca.ErrUnauthenticated, c.reason, c.token)
			if log := b.log.String(); len(c.token) > 40 && strings.Contains(log, c.token[len(c.token)-40:]) {
				t.Error("the token is in the log")
			}
		})
	}

	for name, headers := range map[string][]string{
		"two headers":           {"Bearer " + token, "Bearer " + token},
		"two different headers": {"Basic YTpi", "Bearer " + token},
		"another scheme":        {"Basic YTpi"},
		"no scheme":             {token},
		"an empty header":       {""},
		"two tokens in one":     {"Bearer " + token + ", Bearer " + token},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := b.ask(headers...)
			refuses(t, err, ca.ErrUnauthenticated, "token: ", headers...)
		})
	}
	if server.fetches() != 1 {
		t.Errorf("%d fetches of keys, want 1", server.fetches())
	}
	b.accepts(t, token)
}

func TestATokenCountsOnlyWithTheKeysOfItsOwnIssuer(t *testing.T) {
	key1, key2 := newSigner(t, "same"), newSigner(t, "same")
	one, two := newKeyServer(t, key1), newKeyServer(t, key2)
	second := two.config()
	second.Name = "second"
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{one.config(), second}})
	if got := b.accepts(t, key1.sign(t, b.claims(one.URL))); got.Proofs[0].Issuer != "cluster" {
		t.Errorf("got %+v", got)
	}
	if got := b.accepts(t, key2.sign(t, b.claims(two.URL))); got.Proofs[0].Issuer != "second" {
		t.Errorf("got %+v", got)
	}
	token := key1.sign(t, b.claims(two.URL))
	_, err := b.ask("Bearer " + token)
	refuses(t, err, ca.ErrUnauthenticated, `token of issuer "second": its signature is not good`, token)
}

func TestATokenWithoutKeyIDNeedsExactlyOneKeyThatFits(t *testing.T) {
	key, other := newSigner(t, "k1"), newSigner(t, "k2")
	rs := signer{"rs", jose.RS256, rsaKey()}
	server := newKeyServer(t, key, rs)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	b.accepts(t, signer{"", jose.ES256, key.key}.sign(t, b.claims(server.URL)))
	b.accepts(t, signer{"", jose.RS256, rs.key}.sign(t, b.claims(server.URL)))

	server = newKeyServer(t, key, other)
	b = start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	token := signer{"", jose.ES256, key.key}.sign(t, b.claims(server.URL))
	_, err := b.ask("Bearer " + token)
	refuses(t, err, ca.ErrUnauthenticated, "names no key id, and 2 of the issuer's keys fit ES256", token)
	if server.fetches() != 1 {
		t.Errorf("%d fetches, want 1: more keys do not make it clearer", server.fetches())
	}
}
