//go:build e2e

package vault_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	plugin "kedge/plugins/vault"
	"kedge/test/process"
	"kedge/test/vault"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
}

// method is a way to log in, made ready in the server: its login, and how its secret is spoiled and made good again.
type method struct {
	name        string
	login       plugin.Login
	spoil, mend func(t *testing.T)
	refusal     string // what the error says then
	prefix      string // of the leases of its tokens
	shortenRole func(t *testing.T, ttl, maximum string)
	readsAgain  bool // the same token comes again, unless somebody writes another
	log         *lockedBuffer
}

// methods makes each method of logging in ready.
func (f *fixture) methods(t *testing.T) []method {
	t.Helper()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		process.Write(t, path, text)
		return path
	}
	rewrite := func(path, text string) func(*testing.T) {
		return func(t *testing.T) { process.Write(t, path, text) }
	}

	// AppRole.
	approle := method{name: "AppRole", prefix: "auth/approle", login: f.options().Login, refusal: "the login by AppRole at auth/approle/login",
		spoil: rewrite(f.secretFile, "00000000-0000-0000-0000-000000000000\n"), mend: f.newSecret,
		shortenRole: func(t *testing.T, ttl, maximum string) {
			f.writeRole(t, map[string]any{"token_policies": "kedge", "token_ttl": ttl, "token_max_ttl": maximum})
		}}

	// Kubernetes, whose API server is a stand-in that reviews tokens.
	cluster := newCluster(t)
	f.Write(t, "sys/auth/kubernetes", map[string]any{"type": "kubernetes"})
	f.Write(t, "auth/kubernetes/config", map[string]any{"kubernetes_host": cluster.server.URL, "kubernetes_ca_cert": cluster.ca, "disable_local_ca_jwt": true, "token_reviewer_jwt": cluster.reviewer})
	tokenFile := file("service-account-token", "")
	kubernetes := method{name: "Kubernetes", prefix: "auth/kubernetes", refusal: "the login by Kubernetes at auth/kubernetes/login",
		login: plugin.Login{Kubernetes: &plugin.KubernetesLogin{Role: "kedge", TokenFile: tokenFile}},
		spoil: func(t *testing.T) { process.Write(t, tokenFile, cluster.token(t, "stranger")) },
		mend:  func(t *testing.T) { process.Write(t, tokenFile, cluster.token(t, "kedge")) },
		shortenRole: func(t *testing.T, ttl, maximum string) {
			f.Write(t, "auth/kubernetes/role/kedge", map[string]any{"bound_service_account_names": "kedge", "bound_service_account_namespaces": "kedge",
				"token_policies": "kedge", "token_ttl": ttl, "token_max_ttl": maximum})
		}}
	kubernetes.mend(t)
	kubernetes.shortenRole(t, "1h", "24h")

	// A client certificate.
	issuer, issuerKey := vault.Certificate(t, caTemplate("the CA of clients"), nil, nil)
	f.Write(t, "sys/auth/cert", map[string]any{"type": "cert"})
	certFile, keyFile := file("client.pem", ""), file("client-key.pem", "")
	present := func(name string) func(t *testing.T) {
		return func(t *testing.T) {
			cert, key := vault.Certificate(t, &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, issuer, issuerKey)
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			process.Write(t, certFile, vault.PEM("CERTIFICATE", cert.Raw))
			process.Write(t, keyFile, vault.PEM("PRIVATE KEY", der))
		}
	}
	certificate := method{name: "certificate", prefix: "auth/cert", refusal: "the login by certificate at auth/cert/login",
		login: plugin.Login{Certificate: &plugin.CertificateLogin{Role: "kedge", CertFile: certFile, KeyFile: keyFile}},
		spoil: present("a stranger"), mend: present("kedge"),
		shortenRole: func(t *testing.T, ttl, maximum string) {
			f.Write(t, "auth/cert/certs/kedge", map[string]any{"certificate": vault.PEM("CERTIFICATE", issuer.Raw), "allowed_common_names": "kedge",
				"token_policies": "kedge", "token_ttl": ttl, "token_max_ttl": maximum})
		}}
	certificate.mend(t)
	certificate.shortenRole(t, "1h", "24h")

	// A token in a file.
	sink := file("token", "")
	options := map[string]any{"policies": []string{"kedge"}, "ttl": "1h"}
	token := method{name: "token", refusal: "the token of " + sink, readsAgain: true, login: plugin.Login{Token: &plugin.Secret{File: sink}},
		spoil: rewrite(sink, "hvs.000000000000000000000000\n"),
		mend: func(t *testing.T) {
			made, _ := f.Write(t, "auth/token/create", options)["client_token"].(string)
			process.Write(t, sink, made+"\n")
		},
		shortenRole: func(t *testing.T, ttl, maximum string) {
			options = map[string]any{"policies": []string{"kedge"}, "ttl": ttl, "explicit_max_ttl": maximum}
		}}
	token.mend(t)
	return []method{approle, kubernetes, certificate, token}
}

// eachMethod runs a test for each way to log in to each server.
func eachMethod(t *testing.T, test func(t *testing.T, f *fixture, m method, o plugin.ClientOptions)) {
	eachServer(t, func(t *testing.T, f *fixture) {
		f.mountTransit(t)
		for _, m := range f.methods(t) {
			t.Run(m.name, func(t *testing.T) {
				o := f.options()
				o.Login = m.login
				m.log = &lockedBuffer{}
				o.Logger = slog.New(slog.NewTextHandler(m.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
				t.Cleanup(func() {
					if t.Failed() {
						t.Logf("the login logged:\n%s", m.log)
					}
					f.holdsNoSecret(t, m.log.String())
				})
				test(t, f, m, o)
			})
		}
	})
}

func TestALoginThatFailsIsAProblemUntilItWorks(t *testing.T) {
	eachMethod(t, func(t *testing.T, f *fixture, m method, o plugin.ClientOptions) {
		m.spoil(t)
		client := f.open(t, o)
		if m.readsAgain {
			problem(t, client, "put a good one there")
		} else {
			problem(t, client, m.refusal)
		}
		f.holdsNoSecret(t, client.Problem().Error())
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.transit, Client: client})
		_, _, err := keys.Create(t.Context(), "P-256")
		f.failsWith(t, err, "logging in to Vault")
		m.mend(t)
		noProblem(t, client)
		create(t, keys)
	})
}

func TestATokenThatIsRevokedIsReplaced(t *testing.T) {
	eachMethod(t, func(t *testing.T, f *fixture, m method, o plugin.ClientOptions) {
		client := f.open(t, o)
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.transit, Client: client})
		_, key := create(t, keys)
		if m.readsAgain {
			old := strings.TrimSpace(read(t, m.login.Token.File))
			m.mend(t) // as an agent does, before it
			f.Write(t, "auth/token/revoke", map[string]any{"token": old})
		} else {
			f.Write(t, "sys/leases/revoke-prefix/"+m.prefix, nil)
		}
		// Some calls at once, none of which fails.
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if err := sign(key); err != nil {
					t.Errorf("signing after the token was revoked: %v", err)
				}
			})
		}
		all.Wait()
	})
}

// TestATokenIsRenewedAndThenReplaced: it lives for some seconds and may be renewed for some more, and calls go on for longer than that.
func TestATokenIsRenewedAndThenReplaced(t *testing.T) {
	eachMethod(t, func(t *testing.T, f *fixture, m method, o plugin.ClientOptions) {
		t.Parallel()
		if m.readsAgain {
			m.shortenRole(t, "20s", "27s")
			m.mend(t)
		} else {
			m.shortenRole(t, "3s", "8s")
		}
		client := f.open(t, o)
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.transit, Client: client})
		_, key := create(t, keys)
		said := func(what string, times int) func() error {
			return func() error {
				if err := sign(key); err != nil && !m.readsAgain {
					t.Fatalf("signing while the token is renewed or replaced: %v", err)
				}
				if got := strings.Count(m.log.String(), what); got < times {
					return fmt.Errorf("%d times", got)
				}
				return nil
			}
		}
		process.Eventually(t, "renewals", said("renewed the token for Vault", 1))
		if m.readsAgain {
			process.Eventually(t, "a line in the log", said("cannot be lengthened", 1))
			m.shortenRole(t, "1h", "24h")
			m.mend(t)
			noProblem(t, client)
			if err := sign(key); err != nil {
				t.Errorf("signing with the token that somebody put into the file: %v", err)
			}
			return
		}
		m.mend(t) // another secret id, another service account token, another certificate: all come into use without a word
		process.Eventually(t, "two more logins", said("logged in to Vault", 3))
	})
}

// TestTheEnvironmentOfVaultsToolsChangesNothing: each of these would send Kedge elsewhere, or make it trust what it should not.
func TestTheEnvironmentOfVaultsToolsChangesNothing(t *testing.T) {
	for name, value := range map[string]string{"VAULT_ADDR": "http://127.0.0.1:1", "VAULT_AGENT_ADDR": "http://127.0.0.1:1", "VAULT_TOKEN": "hvs.111111111111111111111111", "VAULT_NAMESPACE": "elsewhere",
		"VAULT_HEADERS": `{"X-Other":"header"}`, "VAULT_WRAP_TTL": "60s", "VAULT_HTTP_PROXY": "http://127.0.0.1:1", "VAULT_PROXY_ADDR": "http://127.0.0.1:1", "VAULT_SKIP_VERIFY": "true",
		"VAULT_TLS_SERVER_NAME": "elsewhere.example.org", "VAULT_CLIENT_TIMEOUT": "1ms", "VAULT_RATE_LIMIT": "0.0001", "VAULT_SRV_LOOKUP": "true"} {
		t.Setenv(name, value)
	}
	eachServer(t, func(t *testing.T, f *fixture) {
		root, keys := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)}), f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		_, key := create(t, keys)
		if err := errors.Join(sign(key), certify(t, root)); err != nil {
			t.Error(err)
		}
		if !strings.Contains(f.log.String(), "VAULT_SKIP_VERIFY") {
			t.Error("the log does not say which variables are not used")
		}
		o := f.options()
		o.CAFile = ""
		problem(t, f.open(t, o), "its certificate is not trusted under the system's roots")
	})
}

// TestANamespaceIsWhereEverythingHappens: login, root and keys. OpenBao has namespaces; Vault has them in its Enterprise edition only, and the open core that runs here has none.
func TestANamespaceIsWhereEverythingHappens(t *testing.T) {
	onServers(t, []vault.Kind{vault.OpenBao}, func(t *testing.T, f *fixture) {
		f.Write(t, "sys/namespaces/mesh", nil)
		for path, body := range map[string]map[string]any{"mesh/sys/auth/approle": {"type": "approle"}, "mesh/sys/mounts/transit": {"type": "transit"},
			"mesh/sys/mounts/pki": {"type": "pki", "config": map[string]any{"max_lease_ttl": "87600h"}}} {
			f.Write(t, path, body)
		}
		f.Write(t, "mesh/sys/policies/acl/kedge", map[string]any{"policy": `path "transit/*" { capabilities = ["create", "read", "update", "delete"] }
			path "pki/issuer/*" { capabilities = ["read", "update"] }`})
		f.generateRoot(t, "mesh/pki", "a root in a namespace", 1)
		f.Write(t, "mesh/auth/approle/role/kedge", map[string]any{"token_policies": "kedge", "token_ttl": "1h"})
		o := f.options()
		o.Namespace = "mesh/"
		o.Login.AppRole.RoleID, _ = f.Read(t, "mesh/auth/approle/role/kedge/role-id")["role_id"].(string)
		secret, _ := f.Write(t, "mesh/auth/approle/role/kedge/secret-id", nil)["secret_id"].(string)
		process.Write(t, f.secretFile, secret)
		client := f.open(t, o)
		keys, root := f.keys(t, plugin.KeyStoreOptions{Client: client}), f.root(t, plugin.RootOptions{Client: client})
		ref, key := create(t, keys)
		if err := errors.Join(sign(key), certify(t, root), root.Check(t.Context()), keys.Check(t.Context())); err != nil {
			t.Error(err)
		}
		if roots, err := root.Roots(t.Context()); err != nil || roots[0].Subject.CommonName != "a root in a namespace" {
			t.Errorf("the root is %v, %v", roots, err)
		}
		f.Read(t, "mesh/transit/keys/"+nameOf(ref))
		f.Delete(t, "mesh/sys/mounts/transit")
		f.Delete(t, "mesh/sys/mounts/pki")
		f.failsWith(t, sign(key), "nothing is mounted there in the namespace mesh")
		f.failsWith(t, certify(t, root), "nothing is mounted there in the namespace mesh")
	})
}

// cluster stands in for a Kubernetes API server: it reviews tokens that it has signed.
type cluster struct {
	server *httptest.Server
	ca     string
	key    *ecdsa.PrivateKey

	reviewer string // the token of who may have others reviewed
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{key: key}
	c.reviewer = c.token(t, "reviewer")
	c.server = httptest.NewTLSServer(http.HandlerFunc(c.review))
	c.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.server.Certificate().Raw}))
	t.Cleanup(c.server.Close)
	return c
}

// token is that of a service account in the namespace kedge.
func (c *cluster) token(t *testing.T, account string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: c.key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := json.Marshal(map[string]any{"iss": "https://kubernetes.default.svc", "aud": []string{"https://kubernetes.default.svc"}, "sub": "system:serviceaccount:kedge:" + account,
		"iat": time.Now().Unix(), "nbf": time.Now().Add(-time.Minute).Unix(), "exp": time.Now().Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{"namespace": "kedge", "serviceaccount": map[string]any{"name": account, "uid": "uid-of-" + account}}})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (c *cluster) review(w http.ResponseWriter, r *http.Request) {
	var review struct {
		Spec struct {
			Token string `json:"token"`
		} `json:"spec"`
	}
	if r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || r.Header.Get("Authorization") != "Bearer "+c.reviewer || json.NewDecoder(r.Body).Decode(&review) != nil {
		http.Error(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":403}`, http.StatusForbidden)
		return
	}
	status := map[string]any{"authenticated": false, "error": "the signature is wrong"}
	if signed, err := jose.ParseSignedCompact(review.Spec.Token, []jose.SignatureAlgorithm{jose.ES256}); err == nil {
		if claims, err := signed.Verify(c.key.Public()); err == nil {
			var who struct {
				Subject string `json:"sub"`
			}
			_ = json.Unmarshal(claims, &who)
			status = map[string]any{"authenticated": true, "user": map[string]any{"username": who.Subject, "uid": "uid-of-" + who.Subject[strings.LastIndex(who.Subject, ":")+1:],
				"groups": []string{"system:serviceaccounts", "system:serviceaccounts:kedge"}}, "audiences": []string{"https://kubernetes.default.svc"}}
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status})
}
