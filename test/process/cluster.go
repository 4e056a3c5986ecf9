package process

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Cluster is a Kubernetes cluster as far as a CA can see: the issuer of its service account tokens.
type Cluster struct {
	Issuer string // the "iss"
	JWKS   string // its keys as a JWKS
	signer jose.Signer
}

// NewCluster makes a cluster's RS256 key.
func NewCluster(t testing.TB) *Cluster {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	const kid = "cluster-key-1"
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: kid, Algorithm: string(jose.RS256), Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return &Cluster{Issuer: "https://kubernetes.default.svc.cluster.local", JWKS: string(jwks), signer: signer}
}

// Configuration writes the cluster's keys into dir and returns what makes a CA accept its tokens.
func (c *Cluster) Configuration(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "cluster.jwks")
	Write(t, path, c.JWKS)
	return fmt.Sprintf("callers: {tokenIssuers: [{name: cluster-1, kind: kubernetes, issuer: %q, jwksFile: %q}]}\n", c.Issuer, path)
}

// Token is a bound service account token, as the kubelet projects it for an istio-agent.
func (c *Cluster) Token(t testing.TB, namespace, account string) string {
	t.Helper()
	return c.ShortToken(t, namespace, account, time.Hour)
}

// ShortToken is a Token that expires after a time.
func (c *Cluster) ShortToken(t testing.TB, namespace, account string, life time.Duration) string {
	t.Helper()
	now := time.Now()
	object := func(name string) map[string]string {
		return map[string]string{"name": name, "uid": fmt.Sprintf("%s-%s-uid", name, account)}
	}
	token, err := jwt.Signed(c.signer).Claims(jwt.Claims{
		Issuer: c.Issuer, Subject: "system:serviceaccount:" + namespace + ":" + account, Audience: jwt.Audience{"istio-ca"},
		IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(life)),
	}).Claims(map[string]any{"kubernetes.io": map[string]any{
		"namespace": namespace, "serviceaccount": object(account), "pod": object(account + "-pod"), "node": object("node-1"),
	}}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}
