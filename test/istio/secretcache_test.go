package istio

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/nodeagent/cache"
)

func TestIstiosSecretCacheHoldsASecretForEnvoyAndRenewsIt(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	client, options := newClient(t, k, k.issuer.sign(t, token{}))
	options.SecretTTL = 8 * time.Second
	secrets, err := cache.NewSecretManagerClient(client, options)
	if err != nil {
		t.Fatal(err)
	}
	defer secrets.Close() // and the client
	updates := make(chan string, 16)
	secrets.RegisterSecretHandler(func(name string) { updates <- name })
	_, bundle := k.roots(t)

	var before *security.SecretItem
	for renewal := range 3 {
		item, err := secrets.GenerateSecret(security.WorkloadKeyCertResourceName)
		if err != nil {
			t.Fatalf("GenerateSecret(default): %v", err)
		}
		pair, err := tls.X509KeyPair(item.CertificateChain, item.PrivateKey)
		if err != nil {
			t.Fatalf("what Envoy would get is no pair: %v", err)
		}
		leaf, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		if !item.ExpireTime.Equal(leaf.NotAfter) {
			t.Errorf("the cache takes the certificate to expire at %s, and it does at %s", item.ExpireTime, leaf.NotAfter)
		}
		if r := k.recordOf(t, leaf); r.Issue.SPIFFEID != agentID {
			t.Errorf("the ledger has it for %s", r.Issue.SPIFFEID)
		}
		if before != nil && bytes.Equal(before.CertificateChain, item.CertificateChain) {
			t.Error("the cache renewed and has the same certificate")
		}
		before = item

		roots, err := secrets.GenerateSecret(security.RootCertReqResourceName)
		if err != nil {
			t.Fatalf("GenerateSecret(ROOTCA): %v", err)
		}
		if !bytes.Equal(bytes.TrimSpace(roots.RootCert), bytes.TrimSpace(bundle)) {
			t.Errorf("ROOTCA is not the bundle:\n%s\n%s", roots.RootCert, bundle)
		}

		// The first certificate brings roots that the cache did not have. Later ones must bring the same bytes, or Envoy gets a push each time.
		var got []string
		for due := false; !due; {
			select {
			case name := <-updates:
				got = append(got, name)
				due = name == security.WorkloadKeyCertResourceName
			case <-time.After(patience):
				t.Fatalf("the cache did not ask for a renewal; it told of %q", got)
			}
		}
		want := 1
		if renewal == 0 {
			want = 2
		}
		if len(got) != want {
			t.Errorf("renewal %d: the cache told of %q", renewal, got)
		}
	}
	k.checkSuccession(t)
}
