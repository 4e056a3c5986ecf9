package authn_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
)

// redeemable says of every token what the ledger would.
type redeemable struct{ err error }

func (r *redeemable) Redeemable(string) error { return r.err }

var web = spiffeid.RequireFromString("spiffe://example.org/ns/default/sa/web")

func joinTokens(t testing.TB, key crypto.Signer, clock *handClock, book authn.Redeemer, identities ...string) *authn.JoinTokens {
	t.Helper()
	j, err := authn.NewJoinTokens(authn.JoinOptions{TrustDomain: td, Key: key, Identities: identities, MaxTTL: time.Hour, Ledger: book, Now: clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestAJoinTokenProvesTheIdentityItWasMadeFor(t *testing.T) {
	key, clock := newSigner(t, "").key, newClock()
	j := joinTokens(t, key, clock, &redeemable{}, "ns/default/sa/*")
	token, record, err := j.Create(web, 10*time.Minute, true)
	if err != nil {
		t.Fatal(err)
	}
	want := ledger.Token{ID: record.ID, SPIFFEID: web.String(), Expires: ledger.At(clock.Now().Add(10 * time.Minute)), Reusable: true}
	if record != want || len(record.ID) != 32 {
		t.Errorf("got the record %+v, want %+v", record, want)
	}
	header, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[0])
	thumbprint, err2 := (&jose.JSONWebKey{Key: key.Public()}).Thumbprint(crypto.SHA256)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if kid := base64.RawURLEncoding.EncodeToString(thumbprint); string(header) != `{"alg":"ES256","kid":"`+kid+`","typ":"kedge-join+jwt"}` {
		t.Errorf("got the header %s", header)
	}

	b := start(t, authn.Options{Join: j, Now: clock.Now})
	caller := b.accepts(t, token)
	proof := ledger.Proof{Method: ca.MethodJoinToken, Issuer: "kedge", Subject: record.ID, Time: ledger.At(clock.Now())}
	if caller.ID != web || caller.JoinToken != record.ID || caller.Holder != (ledger.Holder{Kind: "install", ID: record.ID}) || len(caller.Proofs) != 1 ||
		caller.Proofs[0] != proof || *caller.First != proof {
		t.Errorf("got %+v", caller)
	}
	if !caller.IssuedAt.IsZero() {
		t.Error("our own word about the time corroborates nothing")
	}
	other, second, err := j.Create(web, time.Minute, false)
	if err != nil || second.ID == record.ID || other == token {
		t.Errorf("two tokens are one (%v)", err)
	}
}

func TestJoinTokensAreMadeOnlyForWhatIsListed(t *testing.T) {
	j := joinTokens(t, newSigner(t, "").key, newClock(), &redeemable{}, "ns/default/sa/web-*", "vm/*")
	for _, c := range []struct {
		id   string
		ttl  time.Duration
		kind error
		text string
	}{
		{"spiffe://example.org/ns/default/sa/web-1", time.Minute, nil, ""},
		{"spiffe://example.org/vm/a", time.Hour, nil, ""},
		{"spiffe://example.org/vm/a", time.Second, nil, ""},
		{"spiffe://example.org/ns/default/sa/api", time.Minute, ca.ErrDenied, "callers.joinTokens.identities in the configuration lists [ns/default/sa/web-* vm/*]"},
		{"spiffe://example.org/vm/a/b", time.Minute, ca.ErrDenied, "may not be had by join token"},
		{"spiffe://example.org", time.Minute, ca.ErrDenied, "may not be had by join token"},
		{"spiffe://example.com/vm/a", time.Minute, ca.ErrDenied, "is not of the trust domain"},
		{"spiffe://example.org/vm/a", time.Hour + time.Second, ca.ErrInvalid, "from 1s to 1h, not 1h0m1s"},
		{"spiffe://example.org/vm/a", 0, ca.ErrInvalid, "not 0s"},
		{"spiffe://example.org/vm/a", -time.Hour, ca.ErrInvalid, "from 1s to 1h"},
	} {
		token, _, err := j.Create(spiffeid.RequireFromString(c.id), c.ttl, false)
		if c.kind == nil {
			if err != nil || token == "" {
				t.Errorf("%s for %s: %v", c.id, c.ttl, err)
			}
			continue
		}
		if token != "" || !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s for %s: got %v, want %v about %q", c.id, c.ttl, err, c.kind, c.text)
		}
	}
	if _, _, err := joinTokens(t, newSigner(t, "").key, newClock(), &redeemable{}).Create(web, time.Minute, false); !errors.Is(err, ca.ErrDenied) {
		t.Errorf("nothing is listed: %v", err)
	}
}

func TestBadJoinTokensAreRefused(t *testing.T) {
	key, clock := newSigner(t, ""), newClock()
	book := &redeemable{}
	b := start(t, authn.Options{Join: joinTokens(t, key.key, clock, book, "ns/default/sa/*"), Now: clock.Now})
	now := clock.Now()
	thumbprint, err := (&jose.JSONWebKey{Key: key.key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	key.kid = base64.RawURLEncoding.EncodeToString(thumbprint)
	good := claims{"iss": "kedge", "aud": "kedge-join:example.org", "sub": web.String(), "jti": "0123456789abcdef0123456789abcdef",
		"iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}
	const typ = "kedge-join+jwt"
	changed := func(name string, value any) string { return key.signTyped(t, typ, with(good, claims{name: value})) }
	stranger := signer{key.kid, jose.ES256, newSigner(t, "").key}
	if _, err := b.ask("Bearer " + key.signTyped(t, typ, good)); err != nil {
		t.Fatalf("the good one is refused: %v", err)
	}

	for _, c := range []struct {
		name, token string
		kind        error
		reason      string
	}{
		{"another key under our id", stranger.signTyped(t, typ, good), ca.ErrUnauthenticated, "signature is not good"},
		{"another key", signer{"other", jose.ES256, stranger.key}.signTyped(t, typ, good), ca.ErrUnauthenticated, "signed with another key"},
		{"no key id", signer{"", jose.ES256, key.key}.signTyped(t, typ, good), ca.ErrUnauthenticated, "signed with another key"},
		{"another algorithm", signer{key.kid, jose.RS256, rsaKey()}.signTyped(t, typ, good), ca.ErrUnauthenticated, "its algorithm RS256"},
		{"no type", key.signTyped(t, "", good), ca.ErrUnauthenticated, `its type "" is not a join token's`},
		{"the type of others", key.signTyped(t, "JWT", good), ca.ErrUnauthenticated, `its type "jwt" is not a join token's`},
		{"audience of another trust domain", changed("aud", "kedge-join:example.com"), ca.ErrUnauthenticated, "audience"},
		{"audience of Istio", changed("aud", "istio-ca"), ca.ErrUnauthenticated, "audience"},
		{"no audience", changed("aud", nil), ca.ErrUnauthenticated, "audience"},
		{"another issuer", changed("iss", "https://elsewhere.example"), ca.ErrUnauthenticated, "issuer"},
		{"no id", changed("jti", nil), ca.ErrUnauthenticated, "no id"},
		{"no expiry", changed("exp", nil), ca.ErrUnauthenticated, "no expiry"},
		{"no time of issue", changed("iat", nil), ca.ErrUnauthenticated, "no time of issue"},
		{"issued in the future", changed("iat", now.Add(31*time.Second).Unix()), ca.ErrUnauthenticated, "issued in the future"},
		{"expired this moment", changed("exp", now.Unix()), ca.ErrUnauthenticated, "expired at"},
		{"subject is no SPIFFE ID", changed("sub", "web"), ca.ErrUnauthenticated, "its subject"},
		{"subject is hostile", changed("sub", "spiffe://example.org/ns/default/sa/../x"), ca.ErrUnauthenticated, "its subject"},
		{"identity is no longer listed", changed("sub", "spiffe://example.org/ns/prod/sa/web"), ca.ErrDenied, "may not be had by join token"},
		{"identity of another trust domain", changed("sub", "spiffe://example.com/ns/default/sa/web"), ca.ErrDenied, "is not of the trust domain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := b.ask("Bearer " + c.token)
			refuses(t, err, c.kind, c.reason, c.token)
		})
	}

	for refused, kind := range map[error]error{
		ledger.ErrTokenSpent: ca.ErrUnauthenticated, ledger.ErrTokenUnknown: ca.ErrUnauthenticated, ledger.ErrTokenExpired: ca.ErrUnauthenticated,
		ledger.ErrUnavailable: ca.ErrUnavailable, ledger.ErrClosed: ca.ErrUnavailable, errors.New("damaged"): ca.ErrUnavailable,
	} {
		book.err = fmt.Errorf("about the token: %w", refused)
		_, err := b.ask("Bearer " + key.signTyped(t, typ, good))
		refuses(t, err, kind, refused.Error())
		if !errors.Is(err, refused) {
			t.Errorf("%v does not wrap %v", err, refused)
		}
	}
}

func TestAJoinTokenIsNoTokenOfAnIssuerThatHasItsKey(t *testing.T) {
	key, clock := newSigner(t, "k"), newClock()
	j := joinTokens(t, key.key, clock, &redeemable{}, "ns/default/sa/*")
	token, _, err := j.Create(web, time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	server := newKeyServer(t, key)
	c := server.config()
	c.Kind, c.Identity, c.Audiences = authn.KindOIDC, "ci/x", []string{"kedge-join:example.org"}
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{c}, Now: clock.Now}) // without join tokens
	_, err = b.ask("Bearer " + token)
	refuses(t, err, ca.ErrUnauthenticated, "join token, and they are switched off", token)
}

func TestJoinTokensNeedAKeyOfTheirKind(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := authn.JoinOptions{TrustDomain: td, Key: newSigner(t, "").key, Identities: []string{"ns/*/sa/*"}, MaxTTL: time.Hour, Ledger: &redeemable{}}
	for reason, change := range map[string]func(*authn.JoinOptions){
		"not P-256":               func(o *authn.JoinOptions) { o.Key = p384 },
		"is not P-256":            func(o *authn.JoinOptions) { o.Key = rsaKey() },
		"need a trust domain":     func(o *authn.JoinOptions) { o.TrustDomain = spiffeid.TrustDomain{} },
		"a key and a ledger":      func(o *authn.JoinOptions) { o.Key = nil },
		"domain, a key and a led": func(o *authn.JoinOptions) { o.Ledger = nil },
		"less than 1s":            func(o *authn.JoinOptions) { o.MaxTTL = 0 },
		"identity pattern":        func(o *authn.JoinOptions) { o.Identities = []string{"ns//x"} },
	} {
		o := good
		change(&o)
		if _, err := authn.NewJoinTokens(o); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("want an error about %q, got %v", reason, err)
		}
	}
}
