package authn

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

// algorithms are the signatures that count: asymmetric ones only, so that nobody can sign with a public key as the secret (HS256), or
// not at all ("none"; RFC 8725 3.1).
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// jws is a JWS in compact serialization (RFC 7515 7.1) that was read, and of which nothing is verified yet. The library would read its header three
// times, and encode its payload again.
type jws struct {
	algorithm string // "alg", one of algorithms
	keyID     string // "kid"
	kind      string // "typ" in lower case, without application/ (RFC 7515 4.1.9)
	payload   []byte
	signed    string // what the signature is over: the header and the payload as they came (RFC 7515 5.2)
	signature []byte
}

// readJWS refuses what never leads to a good token, before the payload is looked at. A key that the token brings along is not even parsed.
func readJWS(text string) (j jws, err error) {
	parts := strings.SplitN(text, ".", 4)
	if len(parts) != 3 || !isBase64URL(text) {
		return j, errors.New("it is not three parts of base64url with dots between them, as a signed JWT is")
	}
	header, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		return j, errors.New("its header is not base64url")
	}
	if err := j.readHeader(header); err != nil {
		return j, err
	}
	if j.payload, err = base64.RawURLEncoding.DecodeString(parts[1]); err != nil {
		return j, errors.New("its payload cannot be read as base64url")
	}
	if j.signature, err = base64.RawURLEncoding.DecodeString(parts[2]); err != nil {
		return j, errors.New("its signature cannot be read as base64url")
	}
	j.signed = text[:len(parts[0])+1+len(parts[1])]
	return j, nil
}

// isBase64URL says whether a text has no other characters than base64url has (RFC 4648 5), and dots. The decoder alone would pass over line breaks.
func isBase64URL(text string) bool {
	for i := range len(text) {
		c := text[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

// readHeader reads the header (RFC 7515 4.1). Members that mean nothing here are read too, so that none of them is there twice.
func (j *jws) readHeader(raw []byte) (err error) {
	var members map[string]any
	if err := json.Unmarshal(raw, &members); err != nil {
		return fmt.Errorf("its header cannot be read: %s", brief(err))
	}
	text := func(name string) (value string) {
		if member := members[name]; member != nil {
			var isText bool
			if value, isText = member.(string); !isText {
				err = fmt.Errorf("its header cannot be read: %q is not a text", name)
			}
		}
		return value
	}
	j.algorithm, j.keyID, j.kind, _ = text("alg"), text("kid"), strings.TrimPrefix(strings.ToLower(text("typ")), "application/"), text("nonce")
	has := func(name string) bool { _, ok := members[name]; return ok }
	switch {
	case err != nil:
		return err
	case !slices.Contains(algorithms, jose.SignatureAlgorithm(j.algorithm)):
		return fmt.Errorf("its algorithm is %.40q, and only asymmetric signatures count: %v", j.algorithm, algorithms)
	case has("crit"):
		return errors.New("its header has critical parameters (crit), and none is known here")
	case has("b64"):
		return errors.New("its header says how its payload is encoded (b64), which only a critical parameter may (RFC 7797 6)")
	case has("jwk") || has("x5c"):
		return errors.New("it brings its own key (jwk or x5c), and only keys had from the issuer count")
	}
	return nil
}

// signedWith says whether the key's owner signed the header and the payload with the algorithm that the header names (RFC 7518 3.1, RFC 8037 3.1).
// A key of another kind, or on another curve, than the algorithm takes has signed nothing.
func (j jws) signedWith(key crypto.PublicKey) bool {
	if !fits(key, j.algorithm) {
		return false
	}
	if pub, ok := key.(ed25519.PublicKey); ok {
		return ed25519.Verify(pub, []byte(j.signed), j.signature)
	}
	hash := crypto.SHA256
	switch j.algorithm[2:] {
	case "384":
		hash = crypto.SHA384
	case "512":
		hash = crypto.SHA512
	}
	digester := hash.New()
	digester.Write([]byte(j.signed))
	digest := digester.Sum(nil)
	switch pub := key.(type) {
	case *rsa.PublicKey:
		if strings.HasPrefix(j.algorithm, "PS") {
			return rsa.VerifyPSS(pub, hash, digest, j.signature, nil) == nil
		}
		return rsa.VerifyPKCS1v15(pub, hash, digest, j.signature) == nil
	case *ecdsa.PublicKey:
		size := (pub.Curve.Params().BitSize + 7) / 8 // octets of either number (RFC 7518 3.4)
		return len(j.signature) == 2*size &&
			ecdsa.Verify(pub, digest, new(big.Int).SetBytes(j.signature[:size]), new(big.Int).SetBytes(j.signature[size:]))
	}
	return false
}

// fits says whether a key can make signatures of an algorithm (RFC 7518 3.1).
func fits(key crypto.PublicKey, algorithm string) bool {
	switch pub := key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return algorithm == string(jose.ES256)
		case elliptic.P384():
			return algorithm == string(jose.ES384)
		case elliptic.P521():
			return algorithm == string(jose.ES512)
		}
	case ed25519.PublicKey:
		return algorithm == string(jose.EdDSA)
	}
	return false
}
