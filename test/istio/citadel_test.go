package istio

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/credentialfetcher/plugin"
	"istio.io/istio/security/pkg/nodeagent/caclient/providers/citadel"
	"istio.io/istio/security/pkg/pki/util"
)

// newClient makes the client that is inside every istio-agent, and the options that agents give it.
func newClient(t *testing.T, k *kedge, text []byte) (*citadel.CitadelClient, *security.Options) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, text)
	options := &security.Options{CAEndpoint: k.address, ClusterID: "Kubernetes", TrustDomain: trustDomain,
		WorkloadNamespace: "ns1", ServiceAccount: "sa1",
		CredFetcher: plugin.CreateTokenPlugin(file), ECCSigAlg: string(util.EcdsaSigAlg), SecretTTL: time.Hour,
		SecretRotationGracePeriodRatio: 0.5, SecretRotationGracePeriodRatioJitter: 0.01}
	client, err := citadel.NewCitadelClient(options, &citadel.TLSOptions{RootCert: k.rootFile()})
	if err != nil {
		t.Fatal(err)
	}
	return client, options
}

// newCSR makes one as an agent does.
func newCSR(t *testing.T) []byte {
	t.Helper()
	csr, _, err := util.GenCSR(util.CertOptions{Host: agentID, ECSigAlg: util.EcdsaSigAlg})
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestIstiosClientGetsOneCertificateAnElementAndTheBundleLast(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	client, _ := newClient(t, k, k.issuer.sign(t, token{}))
	defer client.Close()
	_, bundle := k.roots(t)
	for range 3 {
		elements, err := client.CSRSign(newCSR(t), 3600)
		if err != nil {
			t.Fatalf("CSRSign: %v", err)
		}
		if len(elements) < 2 {
			t.Fatalf("cert_chain has %d elements, and the client wants a leaf and a root", len(elements))
		}
		chain, err := decode([]byte(strings.Join(elements[:len(elements)-1], "")))
		if err != nil {
			t.Fatal(err)
		}
		if len(chain) != len(elements)-1 {
			t.Errorf("%d certificates in %d elements: ztunnel reads only the first of each", len(chain), len(elements)-1)
		}
		k.checkSVID(t, chain, agentID)
		if last := elements[len(elements)-1]; last != string(bundle) {
			t.Errorf("the last element is not the bundle, to the byte: agents would push it to Envoy at each renewal\n%q\n%q", last, bundle)
		}
	}
}

func TestIstiosClientSeesTheCodesThatItIsPromised(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	for name, c := range map[string]struct {
		token []byte
		csr   []byte
		code  string
	}{
		"a bad token": {k.issuer.sign(t, token{expired: true}), newCSR(t), "Unauthenticated"},
		"a bad CSR":   {k.issuer.sign(t, token{}), []byte("nonsense"), "InvalidArgument"},
	} {
		t.Run(name, func(t *testing.T) {
			client, _ := newClient(t, k, c.token)
			defer client.Close()
			before := len(k.refusals())
			_, err := client.CSRSign(c.csr, 3600)
			if err == nil || !strings.Contains(err.Error(), "code = "+c.code+" ") {
				t.Errorf("CSRSign: %v, which is not %s", err, c.code)
			}
			// The client returns only after its last try, and the CA logs before it answers.
			if tries := len(k.refusals()) - before; tries != 1 {
				t.Errorf("the client tried %d times: trying again cannot help, and each is a load", tries)
			}
		})
	}
	if records := k.ledger(t); len(records) != 0 {
		t.Errorf("the ledger has %d SVIDs", len(records))
	}
}

func TestIstiosClientTriesAgainWhileTheCAIsAwayAndFindsItWhenItIsBack(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	client, _ := newClient(t, k, k.issuer.sign(t, token{}))
	defer client.Close()
	if _, err := client.CSRSign(newCSR(t), 3600); err != nil {
		t.Fatalf("CSRSign: %v", err)
	}
	k.process.kill()
	if _, err := client.CSRSign(newCSR(t), 3600); err == nil || !strings.Contains(err.Error(), "code = Unavailable ") {
		t.Errorf("CSRSign without a CA: %v", err)
	}
	k.start(t)
	if _, err := client.CSRSign(newCSR(t), 3600); err != nil {
		t.Errorf("CSRSign with the CA back: %v", err)
	}
	if records := k.ledger(t); len(records) != 2 {
		t.Errorf("the ledger has %d SVIDs, and the client got 2", len(records))
	}
}

func TestIstiosClientTriesAgainWhenTheCASaysUnavailable(t *testing.T) {
	t.Parallel()
	late := newIssuer(t, "https://late.example")
	var open atomic.Bool
	keys := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !open.Load() {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		w.Write(late.jwks(t)) // a client that is gone needs no answer
	}))
	defer keys.Close()
	k := startKedge(t, fmt.Sprintf("    - { name: late, kind: kubernetes, issuer: %q, jwksURL: %q }\n", late.url, keys.URL))
	client, _ := newClient(t, k, late.sign(t, token{}))
	defer client.Close()

	if _, err := client.CSRSign(newCSR(t), 3600); err == nil || !strings.Contains(err.Error(), "code = Unavailable ") {
		t.Errorf("CSRSign while the issuer's keys cannot be had: %v", err)
	}
	refusals := k.refusals()
	if len(refusals) < 2 {
		t.Errorf("the client tried %d times", len(refusals))
	}
	for _, r := range refusals {
		if r.Result != "unavailable" || !strings.Contains(r.Reason, "503") {
			t.Errorf("the CA's log says %q, for the reason %q", r.Result, r.Reason)
		}
	}
	open.Store(true)
	eventually(t, "the CA to have the issuer's keys", func() error {
		_, err := client.CSRSign(newCSR(t), 3600)
		return err
	})
	if records := k.ledger(t); len(records) != 1 {
		t.Errorf("the ledger has %d SVIDs, and the client got 1", len(records))
	}
}
