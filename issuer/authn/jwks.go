package authn

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

// What a JWKS may hold.
const (
	maxKeys       = 100
	minRSABits    = 2048
	maxRSABits    = 8192 // a larger one makes every verification dear
	maxRSAModulus = 1500 // characters of base64url, of which maxRSABits take 1366
	maxRSAExp     = 8    // characters of base64url, of which the 31 bits that crypto/rsa takes need 6
	minRSAE       = 3    //
)

// jwk is what of a JSON Web Key (RFC 7517 4, RFC 7518 6) is read: the public key and what it is for, and no certificates.
type jwk struct {
	Type       string          `json:"kty"`
	ID         string          `json:"kid,omitempty"`
	Use        string          `json:"use,omitempty"`
	Algorithm  string          `json:"alg,omitempty"`
	Operations []string        `json:"key_ops,omitempty"`
	Curve      string          `json:"crv,omitempty"`
	X          string          `json:"x,omitempty"`
	Y          string          `json:"y,omitempty"`
	N          string          `json:"n,omitempty"`
	E          string          `json:"e,omitempty"`
	Secret     json.RawMessage `json:"k,omitempty"`
	Private    json.RawMessage `json:"d,omitempty"`
}

// parseJWKS takes the keys that may be used from a JWKS (RFC 7517 5): at least one. Those that cannot be are passed over, for the reasons given.
func parseJWKS(raw []byte) (keys []jose.JSONWebKey, passedOver []string, err error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, nil, fmt.Errorf("the issuer's JWKS cannot be read: %s", brief(err))
	}
	if len(set.Keys) > maxKeys {
		return nil, nil, fmt.Errorf("the issuer's JWKS has %d keys, more than the %d that are read", len(set.Keys), maxKeys)
	}
	for n, text := range set.Keys {
		key, err := parseJWK(text)
		if err != nil {
			passedOver = append(passedOver, fmt.Sprintf("key %d of %d (kid %.64q): %s", n+1, len(set.Keys), key.KeyID, brief(err)))
			continue
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, passedOver, fmt.Errorf("the issuer's JWKS has no key that can be used, of %d", len(set.Keys))
	}
	return keys, passedOver, nil
}

// parseJWK reads one key. The library gets the members of a public key only: it would parse certificates and private keys as well.
func parseJWK(text []byte) (key jose.JSONWebKey, err error) {
	var k jwk
	if err := json.Unmarshal(text, &k); err != nil {
		return key, err
	}
	key.KeyID = k.ID
	switch {
	case k.Secret != nil || k.Private != nil:
		return key, errors.New("it is a secret or private key, which nobody may be given")
	case k.Use != "" && k.Use != "sig":
		return key, fmt.Errorf("its use is %.40q, not sig", k.Use)
	case k.Operations != nil && !slices.Contains(k.Operations, "verify"):
		return key, fmt.Errorf("it is not for verifying, but for %.60q", k.Operations)
	case len(k.N) > maxRSAModulus:
		return key, fmt.Errorf("it is RSA of more than %d bits", maxRSABits)
	case len(k.E) > maxRSAExp:
		return key, errors.New("it is RSA with an exponent of more than 31 bits")
	}
	k.Operations = nil
	public, err := json.Marshal(k)
	if err != nil {
		return key, err
	}
	var parsed jose.JSONWebKey
	if err := parsed.UnmarshalJSON(public); err != nil {
		return key, err
	}
	if !parsed.Valid() || !parsed.IsPublic() {
		return key, errors.New("it is not a valid public key")
	}
	if pub, ok := parsed.Key.(*rsa.PublicKey); ok {
		bits := pub.N.BitLen()
		switch {
		case bits < minRSABits || bits > maxRSABits:
			return key, fmt.Errorf("it is RSA of %d bits, and %d to %d are allowed", bits, minRSABits, maxRSABits)
		case pub.N.Bit(0) == 0 || pub.E < minRSAE || pub.E > math.MaxInt32 || pub.E%2 == 0:
			return key, errors.New("it is no RSA key: its modulus or its exponent is even, or the exponent too small or too large")
		}
	}
	return parsed, nil
}
