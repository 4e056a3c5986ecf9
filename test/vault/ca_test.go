//go:build e2e

package vault_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/contracttest"
	"kedge/ca/ledger"
	"kedge/plugins/file"
	plugin "kedge/plugins/vault"
	"kedge/test/process"
	"kedge/test/vault"
)

var td = spiffeid.RequireTrustDomainFromString(contracttest.TrustDomain)

// openCA opens a CA over a real ledger.
func (f *fixture) openCA(t *testing.T, dir string, root ca.Root, keys ca.KeyStore) (*ca.CA, func()) {
	t.Helper()
	clock := ca.SystemClock()
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: "0.1.0", Now: clock.Wall, Retention: time.Hour, Logger: f.logger()})
	if err != nil {
		t.Fatal(err)
	}
	closed := sync.OnceFunc(func() { book.Close() })
	t.Cleanup(closed)
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), clock, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	if err != nil {
		t.Fatal(err)
	}
	made, err := ca.Open(t.Context(), ca.Options{TrustDomain: td, Ledger: book, Root: root, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys,
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256, Clock: clock, Guarded: guarded, Logger: f.logger()})
	if err != nil {
		t.Fatalf("opening the CA: %v", err)
	}
	return made, closed
}

// issue gets an SVID, and verifies it as a client does.
func issue(t *testing.T, c *ca.CA) error {
	t.Helper()
	request := newRequest(t)
	now := time.Now()
	proof := ledger.Proof{Method: ca.MethodKubernetes, Issuer: "test", Subject: "web", Time: ledger.At(now)}
	caller := ca.Caller{ID: spiffeid.RequireFromPath(td, "/ns/default/sa/web"), Proofs: []ledger.Proof{proof}, First: &proof, Holder: ledger.Holder{Kind: "pod", ID: "uid"}, Peer: "192.0.2.1:4711"}
	issued, err := c.Issue(t.Context(), caller, ca.Request{CSR: []byte(vault.PEM("CERTIFICATE REQUEST", request.CSR)), TTL: time.Hour, Delivery: ledger.DeliveryResponse, RequestID: "test"})
	if err != nil {
		return err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(issued.Bundle.PEM))
	for _, link := range issued.Chain[1:] {
		between.AppendCertsFromPEM([]byte(link))
	}
	leaf, err := x509.ParseCertificate(issued.DER)
	if err == nil {
		_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}})
	}
	if err != nil {
		t.Errorf("a client would refuse the SVID: %v", err)
	}
	return err
}

// TestACAGoesOnWithWhatItHolds: the root, the keys, or both are in Vault, which is sealed while callers come. What needs no Vault is served, what needs it says so, and
// all of it mends.
func TestACAGoesOnWithWhatItHolds(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		for name, in := range map[string]struct{ root, keys bool }{"root": {true, false}, "keys": {false, true}, "root and keys": {true, true}} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				var root ca.Root
				var keys ca.KeyStore
				var err error
				if root, err = file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: td.Name()}); err != nil {
					t.Fatal(err)
				}
				if keys, err = file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")}); err != nil {
					t.Fatal(err)
				}
				if in.root {
					root = f.root(t, plugin.RootOptions{Mount: f.mountIntermediate(t)})
				}
				if in.keys {
					keys = f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
				}
				c, closeLedger := f.openCA(t, dir, root, keys)
				if err := c.RenewIssuing(t.Context()); err != nil {
					t.Fatalf("making an issuing CA: %v", err)
				}
				var served, failed atomic.Int64
				ctx, stop := context.WithCancel(t.Context())
				var callers sync.WaitGroup
				for range 4 {
					callers.Go(func() {
						for ctx.Err() == nil {
							if err := issue(t, c); err == nil {
								served.Add(1)
							} else if errors.Is(err, ca.ErrUnavailable) {
								failed.Add(1)
							} else {
								t.Errorf("a caller is refused with something else than Unavailable: %v", err)
								return
							}
						}
					})
				}
				defer callers.Wait()
				defer stop()
				more := func(what string, count *atomic.Int64) {
					t.Helper()
					before := count.Load()
					process.Eventually(t, "callers to be "+what, func() error {
						if got := count.Load() - before; got < 20 {
							return fmt.Errorf("%d", got)
						}
						return nil
					})
				}
				more("served", &served)
				f.Seal(t)
				if in.keys {
					more("refused", &failed)
					process.Eventually(t, "readiness to say why", func() error {
						if err := c.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "unseal it with") {
							return fmt.Errorf("it says %w", err)
						}
						return nil
					})
				} else {
					more("served", &served)
					if err := c.Ready(t.Context()); err != nil {
						t.Errorf("a CA that issues is not ready: %v", err)
					}
					if failed.Load() != 0 {
						t.Errorf("%d callers were refused though Kedge has the key", failed.Load())
					}
				}
				f.Unseal(t)
				more("served", &served)
				process.Eventually(t, "readiness", func() error { return c.Ready(t.Context()) })
				stop()
				callers.Wait()

				// A restart while Vault is sealed serves what it can, and takes the rest up.
				closeLedger()
				f.Seal(t)
				c, _ = f.openCA(t, dir, root, keys)
				err = issue(t, c)
				if in.keys != (err != nil) || err != nil && !errors.Is(err, ca.ErrUnavailable) {
					t.Errorf("issuing after a restart while Vault is sealed: %v", err)
				}
				f.Unseal(t)
				process.Eventually(t, "the issuing CA to be taken up", func() error { return c.RenewIssuing(t.Context()) })
				if err := issue(t, c); err != nil {
					t.Errorf("issuing after Vault was unsealed: %v", err)
				}
			})
		}
	})
}
