package authn

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
)

// What tells a join token from every other: its type, its issuer and its audience.
const (
	joinType     = "kedge-join+jwt"
	joinIssuer   = "kedge"
	joinAudience = "kedge-join:" // followed by the trust domain
)

// Redeemer knows which join tokens may still be redeemed. *ledger.Ledger is one.
type Redeemer interface {
	Redeemable(id string) error
}

// JoinOptions says what join tokens are signed with and for whom they may be.
type JoinOptions struct {
	TrustDomain spiffeid.TrustDomain
	Key         crypto.Signer    // P-256; it signs nothing else
	Identities  []string         // patterns of the paths that a token may be for
	MaxTTL      time.Duration    //
	Ledger      Redeemer         //
	Now         func() time.Time // default time.Now
}

// JoinTokens makes and verifies join tokens. Its methods may be called at once from several goroutines.
type JoinTokens struct {
	td         spiffeid.TrustDomain
	public     *ecdsa.PublicKey
	kid        string
	signer     jose.Signer
	identities []ca.IdentityPattern
	maxTTL     time.Duration
	ledger     Redeemer
	now        func() time.Time
}

// NewJoinTokens checks the options.
func NewJoinTokens(o JoinOptions) (*JoinTokens, error) {
	if o.TrustDomain.IsZero() || o.Key == nil || o.Ledger == nil {
		return nil, errors.New("join tokens need a trust domain, a key and a ledger")
	}
	if o.MaxTTL < time.Second {
		return nil, fmt.Errorf("the longest life of a join token, %s, is less than 1s", o.MaxTTL)
	}
	j := &JoinTokens{td: o.TrustDomain, maxTTL: o.MaxTTL, ledger: o.Ledger, now: o.Now}
	if j.now == nil {
		j.now = time.Now
	}
	for _, text := range o.Identities {
		pattern, err := ca.ParseIdentityPattern(text)
		if err != nil {
			return nil, err
		}
		j.identities = append(j.identities, pattern)
	}
	public, ok := o.Key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("the key of join tokens is not P-256")
	}
	thumbprint, err := (&jose.JSONWebKey{Key: public}).Thumbprint(crypto.SHA256) // RFC 7638
	if err != nil {
		return nil, fmt.Errorf("naming the key of join tokens: %w", err)
	}
	j.public, j.kid = public, base64.RawURLEncoding.EncodeToString(thumbprint)
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(o.Key), KeyID: j.kid}}
	if j.signer, err = jose.NewSigner(key, (&jose.SignerOptions{}).WithType(joinType)); err != nil {
		return nil, fmt.Errorf("preparing the key of join tokens: %w", err)
	}
	return j, nil
}

// Create makes a token for one identity. It is good for nothing before record, completed with who asked, is in the ledger.
func (j *JoinTokens) Create(id spiffeid.ID, ttl time.Duration, reusable bool) (token string, record ledger.Token, err error) {
	if err := j.allowed(id); err != nil {
		return "", record, err
	}
	if ttl < time.Second || ttl > j.maxTTL {
		return "", record, ca.Invalid(fmt.Errorf("a join token may be valid from 1s to %s, not %s: callers.joinTokens.maxTTL in the configuration sets the limit",
			ca.DurationText(j.maxTTL), ca.DurationText(ttl)))
	}
	var octets [16]byte
	rand.Read(octets[:]) // never fails since Go 1.24
	now := j.now()
	record = ledger.Token{ID: hex.EncodeToString(octets[:]), SPIFFEID: id.String(), Expires: ledger.At(now.Add(ttl)), Reusable: reusable}
	token, err = jwt.Signed(j.signer).Claims(jwt.Claims{
		Issuer: joinIssuer, Audience: jwt.Audience{joinAudience + j.td.Name()}, Subject: record.SPIFFEID, ID: record.ID,
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(record.Expires.Time()),
	}).Serialize()
	if err != nil {
		return "", record, fmt.Errorf("signing the join token: %w", err)
	}
	return token, record, nil
}

// allowed says whether the configuration lists an identity.
func (j *JoinTokens) allowed(id spiffeid.ID) error {
	if !id.MemberOf(j.td) {
		return ca.Denied(fmt.Errorf("%s is not of the trust domain %s", id, j.td))
	}
	for _, pattern := range j.identities {
		if pattern.Matches(id.Path()) {
			return nil
		}
	}
	return ca.Denied(fmt.Errorf("%s may not be had by join token: callers.joinTokens.identities in the configuration lists %v", id, j.identities))
}

// verify checks a token in every respect but whether it is spent meanwhile: that the ledger decides in the commit that spends it.
// skew is for a clock that was set back since; it prolongs nothing.
func (j *JoinTokens) verify(token signedToken, now time.Time, skew time.Duration) (*proven, error) {
	c := token.claims
	fail := func(format string, args ...any) (*proven, error) {
		return nil, ca.Unauthenticated(fmt.Errorf("join token: "+format, args...))
	}
	if token.algorithm != string(jose.ES256) || token.kind != joinType {
		return fail("its algorithm %s or its type %.40q is not a join token's", token.algorithm, token.kind)
	}
	if token.keyID != j.kid {
		return fail("it was signed with another key (%.64q): a token of another CA, or of before this one's key was lost", token.keyID)
	}
	if !token.signedWith(j.public) {
		return fail("its signature is not good")
	}
	if c.Expiry == nil || c.IssuedAt == nil || c.ID == "" {
		return fail("it has no expiry, no time of issue or no id")
	}
	if !now.Before(c.Expiry.Time()) {
		return fail("%.40q expired at %s", c.ID, c.Expiry.Time().UTC().Format(time.RFC3339))
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: joinIssuer, AnyAudience: jwt.Audience{joinAudience + j.td.Name()}, Time: now}, skew); err != nil {
		return fail("%.40q: %w", c.ID, err)
	}
	id, err := spiffeid.FromString(c.Subject)
	if err != nil {
		return fail("%.40q: its subject: %w", c.ID, err)
	}
	if err := j.allowed(id); err != nil {
		return nil, fmt.Errorf("join token %.40q: %w", c.ID, err)
	}
	switch err := j.ledger.Redeemable(c.ID); {
	case errors.Is(err, ledger.ErrTokenSpent), errors.Is(err, ledger.ErrTokenUnknown), errors.Is(err, ledger.ErrTokenExpired):
		return fail("the ledger refuses it: %w", err)
	case err != nil:
		return nil, ca.Unavailable(fmt.Errorf("asking the ledger about join token %s: %w", c.ID, err))
	}
	return &proven{id: id, join: c.ID, until: c.Expiry.Time(), proof: ledger.Proof{Method: ca.MethodJoinToken, Issuer: joinIssuer, Subject: c.ID, Time: ledger.At(now)},
		holder: ledger.Holder{Kind: "install", ID: c.ID}}, nil
}
