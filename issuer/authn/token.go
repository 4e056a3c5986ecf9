package authn

import (
	"context"
	"encoding/base64"
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

// algorithms are the signatures that count: asymmetric ones only, so that nobody can sign with a public key as the secret (HS256), or
// not at all ("none"; RFC 8725 3.1).
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// tokenTypes are what the header of a token from outside may say in "typ" (RFC 8725 3.11): nothing, JWT (RFC 7519 5.1), at+jwt
// (RFC 9068 2.1), JOSE (JWT-SVID 2.3). So a join token, a logout token or anything else that an issuer signs is no proof of identity.
var tokenTypes = []string{"", "jwt", "at+jwt", "jose"}

// tokenHeader is what of a JWS header (RFC 7515 4.1) is looked at before anything is verified.
type tokenHeader struct {
	Algorithm    string          `json:"alg"`
	KeyID        string          `json:"kid"`
	Type         string          `json:"typ"`
	Critical     json.RawMessage `json:"crit"`
	Key          json.RawMessage `json:"jwk"`
	Certificates json.RawMessage `json:"x5c"`
}

// signedToken is a JWT that was read, and of which nothing is verified yet. Reading JSON costs as much as verifying an RSA signature, so the claims are
// read once.
type signedToken struct {
	header  tokenHeader
	jws     *jose.JSONWebSignature
	payload []byte
	claims  struct {
		jwt.Claims
		Kubernetes json.RawMessage `json:"kubernetes.io"`
	}
}

// readToken reads a token; an error has no part of it that matters.
func readToken(text string) (t signedToken, err error) {
	if t.header, err = readHeader(text); err != nil {
		return t, err
	}
	if t.jws, err = jose.ParseSignedCompact(text, algorithms); err != nil {
		return t, fmt.Errorf("it cannot be read as a signed JWT: %s", brief(err))
	}
	t.payload = t.jws.UnsafePayloadWithoutVerification()
	if err := json.Unmarshal(t.payload, &t.claims); err != nil {
		return t, fmt.Errorf("its claims cannot be read: %s", brief(err))
	}
	return t, nil
}

// signedWith says whether the key's owner signed the token, and so its claims.
func (t signedToken) signedWith(key any) bool {
	_, err := t.jws.Verify(key)
	return err == nil
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
	if token.header.Type == joinType || token.claims.Issuer == joinIssuer {
		if a.join == nil {
			return fail("it is a join token, and they are switched off")
		}
		return a.join.verify(token, a.now(), a.skew)
	}
	if !slices.Contains(tokenTypes, token.header.Type) {
		return fail("its type %.40q is not that of a token that proves who somebody is", token.header.Type)
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

// readHeader reads the header of a JWS in compact serialization (RFC 7515 7.1) and refuses what never leads to a good token. A key that
// the token brings along is not even parsed.
func readHeader(text string) (h tokenHeader, err error) {
	first, _, _ := strings.Cut(text, ".")
	if strings.Count(text, ".") != 2 || strings.IndexFunc(text, notBase64URL) >= 0 {
		return h, errors.New("it is not three parts of base64url with dots between them, as a signed JWT is")
	}
	raw, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		return h, errors.New("its header is not base64url")
	}
	if err := json.Unmarshal(raw, &h); err != nil {
		return h, fmt.Errorf("its header cannot be read: %s", brief(err))
	}
	h.Type = strings.TrimPrefix(strings.ToLower(h.Type), "application/") // RFC 7515 4.1.9
	switch {
	case !slices.Contains(algorithms, jose.SignatureAlgorithm(h.Algorithm)):
		return h, fmt.Errorf("its algorithm is %.40q, and only asymmetric signatures count: %v", h.Algorithm, algorithms)
	case h.Critical != nil:
		return h, errors.New("its header has critical parameters (crit), and none is known here")
	case h.Key != nil || h.Certificates != nil:
		return h, errors.New("it brings its own key (jwk or x5c), and only keys had from the issuer count")
	}
	return h, nil
}

func notBase64URL(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
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
	header, c := token.header, token.claims
	if len(i.algorithms) > 0 && !slices.Contains(i.algorithms, header.Algorithm) {
		return fail("its algorithm %s is not one of %v, which are configured", header.Algorithm, i.algorithms)
	}
	keys, err := i.keys.find(ctx, header.KeyID, header.Algorithm, aside)
	if err != nil {
		return nil, fmt.Errorf("token of issuer %q: %w", i.name, err)
	}
	if !slices.ContainsFunc(keys, func(key jose.JSONWebKey) bool { return token.signedWith(key.Key) }) {
		return fail("its signature is not good (key id %.64q, %s)", header.KeyID, header.Algorithm)
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
	if c.IssuedAt != nil {
		p.issuedAt = c.IssuedAt.Time()
	}
	return p, nil
}
