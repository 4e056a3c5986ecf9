package istio

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// issuer signs service account tokens as a Kubernetes API server does.
type issuer struct {
	url  string
	keys map[jose.SignatureAlgorithm]crypto.Signer
}

func newIssuer(t *testing.T, url string) *issuer {
	t.Helper()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{url: url, keys: map[jose.SignatureAlgorithm]crypto.Signer{jose.RS256: rsaKey, jose.ES256: ecKey}}
}

// jwks is what the issuer publishes.
func (i *issuer) jwks(t *testing.T) []byte {
	t.Helper()
	var set jose.JSONWebKeySet
	for algorithm, key := range i.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: string(algorithm), Algorithm: string(algorithm), Use: "sig"})
	}
	text, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// token says what a token is like that differs from a pod's ordinary one.
type token struct {
	namespace, account string                  // default ns1 and sa1
	audience           string                  // default istio-ca
	expired            bool                    //
	algorithm          jose.SignatureAlgorithm // default RS256
}

// podUID of the pod that every token is bound to.
const podUID = "5b4d3d0e-5d0c-4a4e-9a53-6a2a5a3c1f10"

func (i *issuer) sign(t *testing.T, k token) []byte {
	t.Helper()
	for value, fallback := range map[*string]string{&k.namespace: "ns1", &k.account: "sa1", &k.audience: "istio-ca"} {
		if *value == "" {
			*value = fallback
		}
	}
	if k.algorithm == "" {
		k.algorithm = jose.RS256
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: k.algorithm, Key: jose.JSONWebKey{Key: i.keys[k.algorithm], KeyID: string(k.algorithm)}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	issued := time.Now()
	if k.expired {
		issued = issued.Add(-2 * time.Hour)
	}
	text, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": i.url, "aud": []string{k.audience}, "sub": "system:serviceaccount:" + k.namespace + ":" + k.account, "jti": rand.Text(),
		"iat": issued.Unix(), "nbf": issued.Unix(), "exp": issued.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace":      k.namespace,
			"pod":            map[string]string{"name": "pod-1", "uid": podUID},
			"node":           map[string]string{"name": "node-1", "uid": "9a2c0a5e-0c39-4a5b-8f2e-1c2d3e4f5a6b"},
			"serviceaccount": map[string]string{"name": k.account, "uid": "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"},
		},
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return []byte(text)
}
