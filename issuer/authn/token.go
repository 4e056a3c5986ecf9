package authn

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"kedge/ca"
)

// MaxToken is the largest token that is looked at, in octets.
const MaxToken = 16 << 10

// algorithms are the signatures that count: asymmetric ones only, so that nobody can sign with a public key as the secret (HS256), or not at all ("none").
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// token verifies the one bearer token of a call with the keys of the one issuer that it names.
func (a *Authenticator) token(ctx context.Context, values []string) (*proven, error) {
	fail := func(format string, args ...any) (*proven, error) {
		return nil, ca.Unauthenticated(fmt.Errorf("token: "+format, args...))
	}
	if len(values) != 1 {
		return fail("there are %d authorization headers, and exactly one counts", len(values))
	}
	scheme, text, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "bearer") || text == "" {
		return fail("the authorization header is not of the form 'Bearer TOKEN'")
	}
	if len(text) > MaxToken {
		return fail("it has %d octets, more than the %d that are looked at", len(text), MaxToken)
	}
	parsed, err := jwt.ParseSigned(strings.TrimSpace(text), algorithms)
	if err != nil {
		return fail("it cannot be read as a signed JWT: %s", scrub(err))
	}
	var unverified struct {
		Issuer string `json:"iss"`
	}
	if err := parsed.UnsafeClaimsWithoutVerification(&unverified); err != nil {
		return fail("its claims cannot be read: %s", scrub(err))
	}
	header := parsed.Headers[0] // ParseSigned refuses any other number than one
	isJoin := header.ExtraHeaders[jose.HeaderType] == joinType
	if isJoin || unverified.Issuer == joinIssuer {
		if a.join == nil {
			return fail("it is a join token, and they are switched off")
		}
		return a.join.verify(parsed, a.now(), a.skew)
	}
	i := a.issuers[unverified.Issuer]
	if i == nil {
		return fail("its issuer %.200q is not configured", unverified.Issuer)
	}
	return i.verify(ctx, parsed, a.now())
}

// scrub keeps a library's words about a token from carrying a part of it.
func scrub(err error) string {
	text := err.Error()
	if len(text) > 200 {
		text = text[:200]
	}
	return text
}

// claims are those that Kedge reads of tokens from outside.
type claims struct {
	jwt.Claims
	Kubernetes *struct {
		Namespace      string `json:"namespace"`
		ServiceAccount *named `json:"serviceaccount"`
		Pod            *named `json:"pod"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// verify checks the signature with the issuer's keys, and then every claim that counts (RFC 7519 4.1).
func (i *issuer) verify(ctx context.Context, token *jwt.JSONWebToken, now time.Time) (*proven, error) {
	header := token.Headers[0]
	keys, err := i.keys.find(ctx, header.KeyID, header.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("token of issuer %q: %w", i.name, err)
	}
	fail := func(format string, args ...any) (*proven, error) {
		return nil, ca.Unauthenticated(fmt.Errorf("token of issuer %q: "+format, append([]any{i.name}, args...)...))
	}
	if i.algorithms != nil && !slices.Contains(i.algorithms, header.Algorithm) {
		return fail("its algorithm %s is not one of %v", header.Algorithm, i.algorithms)
	}
	var raw map[string]json.RawMessage
	var c claims
	verified := false
	for _, key := range keys {
		if token.Claims(key, &c, &raw) == nil {
			verified = true
			break
		}
	}
	if !verified {
		return fail("its signature is not good (key id %.64q, %s)", header.KeyID, header.Algorithm)
	}
	if c.Expiry == nil {
		return fail("it has no expiry")
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: i.issuer, AnyAudience: i.audiences, Time: now}, i.skew); err != nil {
		switch {
		case errors.Is(err, jwt.ErrExpired):
			return fail("it expired at %s", c.Expiry.Time().UTC().Format(time.RFC3339))
		case errors.Is(err, jwt.ErrInvalidAudience):
			return fail("its audience %.200q is none of %q", []string(c.Audience), i.audiences)
		}
		return fail("%w", err)
	}
	p, err := i.identify(&c, raw)
	if err != nil {
		return nil, err
	}
	if c.IssuedAt != nil {
		p.issuedAt = c.IssuedAt.Time()
	}
	return p, nil
}
