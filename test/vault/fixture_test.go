//go:build e2e

package vault_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/contracttest"
	plugin "kedge/plugins/vault"
	"kedge/test/process"
	"kedge/test/vault"
)

// fixture is a server with the policy of docs/vault.md, and an AppRole that has it.
type fixture struct {
	*vault.Server
	t *testing.T

	roleID, secretFile string
	client             *plugin.Client // logged in as that role
	log                *lockedBuffer
	mounts             int
	pki, transit       string // the latest mounts
	line               *line  // to the server, once a test wants one
	exported           string // the root of the latest exportRoot, with its key, in PEM
}

// eachServer runs a test against each server.
func eachServer(t *testing.T, test func(t *testing.T, f *fixture)) {
	onServers(t, []vault.Kind{vault.Vault, vault.OpenBao}, test)
}

// atOnce runs a test that mostly waits against each server, beside others.
func atOnce(t *testing.T, name string, test func(t *testing.T, f *fixture)) {
	for _, kind := range []vault.Kind{vault.Vault, vault.OpenBao} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			onServers(t, []vault.Kind{kind}, test)
		})
	}
}

// onServers runs a test against these servers. When it is over, it makes sure that no log line held a token.
func onServers(t *testing.T, kinds []vault.Kind, test func(t *testing.T, f *fixture)) {
	for _, kind := range kinds {
		t.Run(string(kind), func(t *testing.T) {
			f := &fixture{Server: vault.Start(t, kind), t: t, log: &lockedBuffer{}}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the plugin logged:\n%s", f.log)
				}
				f.holdsNoSecret(t, f.log.String())
			})
			f.Write(t, "sys/auth/approle", map[string]any{"type": "approle"})
			f.writePolicy(t, "pki", "transit")
			f.writeRole(t, map[string]any{"token_policies": "kedge", "token_ttl": "1h"})
			f.roleID, _ = f.Read(t, "auth/approle/role/kedge/role-id")["role_id"].(string)
			f.secretFile = filepath.Join(t.TempDir(), "secret-id")
			f.newSecret(t)
			f.client = f.login(t)
			test(t, f)
		})
	}
}

func (f *fixture) writeRole(t *testing.T, role map[string]any) {
	t.Helper()
	f.Write(t, "auth/approle/role/kedge", role)
}

func (f *fixture) newSecret(t *testing.T) {
	t.Helper()
	secret, _ := f.Write(t, "auth/approle/role/kedge/secret-id", nil)["secret_id"].(string)
	process.Write(t, f.secretFile, secret+"\n")
}

// writePolicy writes the policy that docs/vault.md tells admins to write, for these mounts.
func (f *fixture) writePolicy(t *testing.T, pki, transit string) {
	t.Helper()
	page, err := os.ReadFile("../../docs/vault.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```hcl\n(.*?)```").FindSubmatch(page)
	if blocks == nil {
		t.Fatal("docs/vault.md has no policy")
	}
	policy := strings.NewReplacer(`"pki/`, `"`+pki+`/`, `"transit/`, `"`+transit+`/`).Replace(string(blocks[1]))
	f.Write(t, "sys/policies/acl/kedge", map[string]any{"policy": policy})
}

func (f *fixture) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// options are those of the AppRole.
func (f *fixture) options() plugin.ClientOptions {
	return plugin.ClientOptions{Address: f.Address, CAFile: f.CAFile, Logger: f.logger(), Timeout: process.Patience,
		Login: plugin.Login{AppRole: &plugin.AppRoleLogin{RoleID: f.roleID, SecretID: plugin.Secret{File: f.secretFile}}}}
}

func (f *fixture) login(t *testing.T) *plugin.Client {
	t.Helper()
	return f.open(t, f.options())
}

func (f *fixture) open(t *testing.T, o plugin.ClientOptions) *plugin.Client {
	t.Helper()
	client, err := plugin.OpenClient(o)
	if err != nil {
		t.Fatalf("OpenClient: %v", err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// root opens a root that looks at its mount four times a second.
func (f *fixture) root(t *testing.T, o plugin.RootOptions) *plugin.Root {
	t.Helper()
	if o.Client == nil {
		o.Client = f.client
	}
	o.PollInterval, o.Logger = time.Second/4, f.logger()
	root, err := plugin.OpenRoot(o)
	if err != nil {
		t.Fatalf("OpenRoot: %v", err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func (f *fixture) keys(t *testing.T, o plugin.KeyStoreOptions) *plugin.KeyStore {
	t.Helper()
	if o.Client == nil {
		o.Client = f.client
	}
	if o.SignTimeout == 0 {
		o.SignTimeout = process.Patience
	}
	o.PollInterval, o.Logger = time.Second/4, f.logger()
	keys, err := plugin.OpenKeyStore(o)
	if err != nil {
		t.Fatalf("OpenKeyStore: %v", err)
	}
	t.Cleanup(func() { keys.Close() })
	return keys
}

// mountTransit mounts an empty Transit engine.
func (f *fixture) mountTransit(t *testing.T) string {
	t.Helper()
	f.mounts++
	f.transit = fmt.Sprintf("transit-%d", f.mounts)
	f.Write(t, "sys/mounts/"+f.transit, map[string]any{"type": "transit"})
	f.writePolicy(t, f.pki, f.transit)
	return f.transit
}

// mountRoot mounts a PKI engine with a self-signed issuer, as docs/vault.md does.
func (f *fixture) mountRoot(t *testing.T) string {
	t.Helper()
	f.mounts++
	f.pki = fmt.Sprintf("pki-%d", f.mounts)
	f.mountPKI(t, f.pki)
	f.generateRoot(t, f.pki, "root of "+f.pki, 1)
	f.writePolicy(t, f.pki, f.transit)
	return f.pki
}

// exportRoot mounts one whose key is known, so that it can be put back.
func (f *fixture) exportRoot(t *testing.T) {
	t.Helper()
	f.mounts++
	f.pki = fmt.Sprintf("pki-%d", f.mounts)
	f.mountPKI(t, f.pki)
	made := f.Write(t, f.pki+"/root/generate/exported", map[string]any{"common_name": "root of " + f.pki, "key_type": "ec", "key_bits": 256, "ttl": "9000h", "max_path_length": 1})
	f.exported = fmt.Sprint(made["private_key"], "\n", made["certificate"])
	f.writePolicy(t, f.pki, f.transit)
}

// mountIntermediate mounts one whose issuer stands below a root of another mount.
func (f *fixture) mountIntermediate(t *testing.T) string {
	t.Helper()
	f.mounts++
	f.pki = fmt.Sprintf("pki-%d", f.mounts)
	above := f.pki + "-above"
	f.mountPKI(t, above)
	f.mountPKI(t, f.pki)
	root := f.generateRoot(t, above, "root of "+above, 2)
	csr := f.Write(t, f.pki+"/intermediate/generate/internal", map[string]any{"common_name": "intermediate of " + f.pki, "key_type": "ec", "key_bits": 256})["csr"]
	signed := f.Write(t, above+"/root/sign-intermediate", map[string]any{"csr": csr, "common_name": "intermediate of " + f.pki, "ttl": "8000h", "max_path_length": 1})
	f.Write(t, f.pki+"/intermediate/set-signed", map[string]any{"certificate": fmt.Sprint(signed["certificate"], "\n", root)})
	f.writePolicy(t, f.pki, f.transit)
	return f.pki
}

func (f *fixture) mountPKI(t *testing.T, mount string) {
	t.Helper()
	f.Write(t, "sys/mounts/"+mount, map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "87600h"}})
}

// generateRoot makes a root in a mount, and returns its certificate in PEM.
func (f *fixture) generateRoot(t *testing.T, mount, name string, pathLength int) string {
	t.Helper()
	made := f.Write(t, mount+"/root/generate/internal", map[string]any{"common_name": name, "key_type": "ec", "key_bits": 256, "ttl": "9000h", "max_path_length": pathLength})
	certificate, _ := made["certificate"].(string)
	return certificate
}

// holdsNoSecret makes sure that a text has no token of either server in it, nor the secret id.
func (f *fixture) holdsNoSecret(t *testing.T, text string) {
	t.Helper()
	secret, err := os.ReadFile(f.secretFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range append(regexp.MustCompile(`\b(hv)?[sb]\.[A-Za-z0-9_-]{24,}`).FindAllString(text, -1), regexp.MustCompile(regexp.QuoteMeta(strings.TrimSpace(string(secret)))).FindAllString(text, -1)...) {
		t.Errorf("a secret stands in a log or an error: %.8s…", token)
	}
}

// failsWith makes sure that err says each of these, and no secret.
func (f *fixture) failsWith(t *testing.T, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, where one that says %q should be", says)
	}
	for _, want := range says {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	f.holdsNoSecret(t, err.Error())
}

// newRequest is one for the certificate of an issuing CA that lives an hour.
func newRequest(t *testing.T) ca.CertifyRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return ca.CertifyRequest{PublicKey: key.Public(), CSR: csr, TrustDomain: contracttest.TrustDomain, CommonName: "issuing CA", NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour)}
}

func certify(t *testing.T, root *plugin.Root) error {
	ctx, cancel := context.WithTimeout(t.Context(), process.Patience)
	defer cancel()
	_, err := root.Certify(ctx, newRequest(t))
	return err
}

func sign(key crypto.Signer) error {
	digest := sha256.Sum256([]byte("a certificate"))
	_, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

func create(t *testing.T, keys *plugin.KeyStore) (string, crypto.Signer) {
	t.Helper()
	ref, key, err := keys.Create(t.Context(), ca.P256)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	return ref, key
}

// nameOf is the name of the Transit key.
func nameOf(ref string) string {
	name, _, _ := strings.Cut(ref, ":")
	return name
}

// lockedBuffer is a log that many goroutines write.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
