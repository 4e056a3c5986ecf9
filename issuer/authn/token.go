package authn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"

	"kedge/ca"
)

// MaxToken is the largest token that is looked at, in octets.
const MaxToken = 16 << 10

// tokenTypes are what the header of a token from outside may say in "typ" (RFC 8725 3.11): nothing, JWT (RFC 7519 5.1), at+jwt
// (RFC 9068 2.1), JOSE (JWT-SVID 2.3). So a join token, a logout token or anything else that an issuer signs is no proof of identity.
var tokenTypes = []string{"", "jwt", "at+jwt", "jose"}

// signedToken is a JWT that was read, and of which nothing is verified yet. Reading JSON costs as much as verifying an RSA signature, so the claims are
// read once.
type signedToken struct {
	jws
	claims struct {
		jwt.Claims
		Kubernetes json.RawMessage `json:"kubernetes.io"`
	}
}

// readToken reads a token; an error has no part of it that matters.
func readToken(text string) (t signedToken, err error) {
	if t.jws, err = readJWS(text); err != nil {
		return t, err
	}
	if err := json.Unmarshal(t.payload, &t.claims); err != nil {
		return t, fmt.Errorf("its claims cannot be read: %s", brief(err))
	}
	return t, nil
}

// token verifies the one bearer token of a call with the keys of the one issuer that it names.
func (a *Authenticator) token(ctx context.Context, values []string, aside func() func(context.Context) error) (*proven, error) {
	fail := func(format string, args ...any) (*proven, error) {
		return nil, ca.Unauthenticated(fmt.Errorf("token: "+format, args...))
	}
	text, err := bearer(values)
	if err != nil {
		return fail("%w", err)
	}
	token, err := readToken(text)
	if err != nil {
		return fail("%w", err)
	}
	if token.kind == joinType || token.claims.Issuer == joinIssuer {
		if a.join == nil {
			return fail("it is a join token, and they are switched off")
		}
		return a.join.verify(token, a.now(), a.skew)
	}
	if !slices.Contains(tokenTypes, token.kind) {
		return fail("its type %.40q is not that of a token that proves who somebody is", token.kind)
	}
	i := a.issuers[token.claims.Issuer]
	if i == nil {
		return fail("its issuer %.200q is not one of those that are configured", token.claims.Issuer)
	}
	return i.verify(ctx, token, a.now(), aside)
}

// bearer takes the token from the one authorization header of a call (RFC 6750 2.1).
func bearer(values []string) (string, error) {
	if len(values) != 1 {
		return "", fmt.Errorf("there are %d authorization headers, and exactly one counts", len(values))
	}
	scheme, text, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "bearer") || text == "" {
		return "", errors.New("the authorization header is not of the form 'Bearer TOKEN'")
	}
	if len(text) > MaxToken {
		return "", fmt.Errorf("it has %d octets, more than the %d that are looked at", len(text), MaxToken)
	}
	return strings.Trim(text, " \t\r\n"), nil // a client that reads it from a file may send the end of the line
}

// brief keeps a library's words about hostile input short, so that they carry no large part of it into the log.
func brief(err error) string {
	const most = 100
	text := err.Error()
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// verify checks the signature with the issuer's keys, and then every claim that counts (RFC 7519 4.1).
func (i *issuer) verify(ctx context.Context, token signedToken, now time.Time, aside func() func(context.Context) error) (*proven, error) {
	fail := func(format string, args ...any) (*proven, error) {
		return nil, ca.Unauthenticated(fmt.Errorf("token of issuer %q: "+format, append([]any{i.name}, args...)...))
	}
	c := token.claims
	if len(i.algorithms) > 0 && !slices.Contains(i.algorithms, token.algorithm) {
		return fail("its algorithm %s is not one of %v, which are configured", token.algorithm, i.algorithms)
	}
	keys, err := i.keys.find(ctx, token.keyID, token.algorithm, aside)
	if err != nil {
		return nil, fmt.Errorf("token of issuer %q: %w", i.name, err)
	}
	if !slices.ContainsFunc(keys, func(key jose.JSONWebKey) bool { return token.signedWith(key.Key) }) {
		return fail("its signature is not good (key id %.64q, %s)", token.keyID, token.algorithm)
	}
	if c.Expiry == nil {
		return fail("it has no expiry: a token that is good for ever is no proof; have the issuer set exp")
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: i.issuer, AnyAudience: i.audiences, Time: now}, i.skew); err != nil {
		switch {
		case errors.Is(err, jwt.ErrExpired):
			return fail("it expired at %s", c.Expiry.Time().UTC().Format(time.RFC3339))
		case errors.Is(err, jwt.ErrNotValidYet):
			return fail("it is valid only from %s on; the clock here says %s", c.NotBefore.Time().UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		case errors.Is(err, jwt.ErrIssuedInTheFuture):
			return fail("it was issued at %s, in the future: the clock here says %s", c.IssuedAt.Time().UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		case errors.Is(err, jwt.ErrInvalidAudience):
			return fail("its audience %.200s is none of %q", fmt.Sprintf("%q", []string(c.Audience)), i.audiences)
		}
		return fail("%w", err)
	}
	p, err := i.identify(token, now)
	if err != nil {
		return fail("%w", err)
	}
	p.until = c.Expiry.Time().Add(i.skew)
	if c.IssuedAt != nil {
		p.issuedAt = c.IssuedAt.Time()
	}
	return p, nil
}
