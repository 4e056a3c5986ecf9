package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// The kinds of workload keys.
const (
	keyP256 = "P-256"
	keyRSA  = "RSA-2048"
)

var keyKinds = []string{keyP256, keyRSA}

const (
	trustDomain = "cluster.local"
	issuerName  = "https://kubernetes.default.svc.cluster.local"
	keyID       = "cluster-key-1"

	accounts = 1000 // different service accounts
	rsaKeys  = 32   // an RSA key takes too long to make for one a CSR; the CSRs of a key differ in their names
)

// crowd is everybody who asks: service accounts of a cluster, each call with a token of its own and a CSR of its own.
type crowd struct {
	jwks   []byte
	tokens []string
	csrs   map[string][]string // by the kind of key

	used mark
}

// mark says how much of the crowd the servers of a round have seen.
type mark struct{ tokens, csrs int }

// request is what a call brings.
type request struct {
	csr   string
	token string // "": the client certificate proves who asks
}

// newCrowd makes what a server sees of it in one round, in which calls are made in one measurement.
func newCrowd(calls int) (*crowd, error) {
	c := &crowd{csrs: map[string][]string{}}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	if c.jwks, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: keyID, Algorithm: string(jose.RS256), Use: "sig"}}}); err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: keyID}}, nil)
	if err != nil {
		return nil, err
	}
	// A round has calls with tokens, with client certificates, and, half as many, on new connections; for each kind of key; all with a tenth more to warm up.
	measurement := calls + calls/10
	now := time.Now()
	if c.tokens, err = each(len(keyKinds)*(measurement+measurement/2)+inFlight, func(i int) (string, error) { return token(signer, i, now) }); err != nil {
		return nil, err
	}
	rsaPool, err := each(min(rsaKeys, calls/100+1), func(int) (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) })
	if err != nil {
		return nil, err
	}
	for _, kind := range keyKinds {
		c.csrs[kind], err = each(len(keyKinds)*(2*measurement+measurement/2)+inFlight, func(i int) (string, error) {
			if kind == keyRSA {
				return newCSR(rsaPool[i%len(rsaPool)], i)
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return "", err
			}
			return newCSR(key, i)
		})
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

// each makes n things on all cores.
func each[T any](n int, produce func(i int) (T, error)) ([]T, error) {
	made, errs := make([]T, n), make([]error, runtime.NumCPU())
	var running sync.WaitGroup
	for worker := range errs {
		running.Go(func() {
			for i := worker; i < n && errs[worker] == nil; i += len(errs) {
				made[i], errs[worker] = produce(i)
			}
		})
	}
	running.Wait()
	return made, errors.Join(errs...)
}

func accountOf(i int) (namespace, account string) {
	i %= accounts
	return fmt.Sprintf("team-%d", i/50), fmt.Sprintf("service-%d", i%50)
}

func spiffeID(i int) string {
	namespace, account := accountOf(i)
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, namespace, account)
}

// token is a bound service account token as the kubelet projects it, of the pod i.
func token(signer jose.Signer, i int, now time.Time) (string, error) {
	namespace, account := accountOf(i)
	object := func(name string) map[string]string { return map[string]string{"name": name, "uid": uid(i)} }
	return jwt.Signed(signer).Claims(map[string]any{
		"iss": issuerName, "sub": "system:serviceaccount:" + namespace + ":" + account, "aud": []string{"istio-ca"}, "jti": uid(i + 1),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(6 * time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": namespace, "node": object(fmt.Sprintf("node-%d", i%100)), "pod": object(fmt.Sprintf("%s-%08x", account, i)), "serviceaccount": object(account),
		},
	}).Serialize()
}

// uid looks like a UUID.
func uid(i int) string { return fmt.Sprintf("%08x-4b5c-4d6e-8f70-%012x", i, i) }

// newCSR is what an istio-agent sends: one critical URI SAN, and a subject with an empty organization.
func newCSR(key crypto.Signer, i int) (string, error) {
	id, err := url.Parse(spiffeID(i) + fmt.Sprintf("-%d", i))
	if err != nil {
		return "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{Organization: []string{""}}, URIs: []*url.URL{id}}, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// take returns n requests of which the servers have seen nothing since the mark was zero. With tokens they bring one, too.
func (c *crowd) take(kind string, n int, tokens bool) ([]request, error) {
	from := c.used
	c.used.csrs += n
	if tokens {
		c.used.tokens += n
	}
	if c.used.csrs > len(c.csrs[kind]) || c.used.tokens > len(c.tokens) {
		return nil, fmt.Errorf("there are %d CSRs of the kind %s and %d tokens, fewer than the %d and %d that it takes", len(c.csrs[kind]), kind, len(c.tokens), c.used.csrs, c.used.tokens)
	}
	requests := make([]request, n)
	for i := range requests {
		requests[i].csr = c.csrs[kind][from.csrs+i]
		if tokens {
			requests[i].token = c.tokens[from.tokens+i]
		}
	}
	return requests, nil
}

// cycle goes through all tokens and all CSRs with P-256 keys, over and over: for measurements that no crowd would last for.
func (c *crowd) cycle() func() request {
	i := 0
	return func() request {
		i++
		return request{csr: c.csrs[keyP256][i%len(c.csrs[keyP256])], token: c.tokens[i%len(c.tokens)]}
	}
}
