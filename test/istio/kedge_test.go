package istio

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// trustDomain of the CA under test.
const trustDomain = "cluster.local"

// kedge is a CA under test, over all its restarts.
type kedge struct {
	dir        string
	configFile string
	address    string // of the CSR API
	operations string // of health and metrics
	issuer     *issuer
	process    *process // the latest start
}

// startKedge starts a CA that believes its issuer's tokens, and waits until it is ready. Further lines of its configuration are further token issuers, and then whole sections.
func startKedge(t *testing.T, further ...string) *kedge {
	t.Helper()
	k := newKedge(t, further...)
	k.start(t)
	return k
}

// newKedge makes what startKedge starts.
func newKedge(t *testing.T, further ...string) *kedge {
	t.Helper()
	dir := t.TempDir()
	k := &kedge{
		dir:        dir,
		configFile: filepath.Join(dir, "kedge.yaml"),
		address:    fmt.Sprintf("127.0.0.1:%d", freePort(t)),
		operations: fmt.Sprintf("127.0.0.1:%d", freePort(t)),
		issuer:     newIssuer(t, "https://kubernetes.default.svc"),
	}
	write(t, filepath.Join(dir, "jwks.json"), k.issuer.jwks(t))
	write(t, k.configFile, fmt.Appendf(nil, `trustDomain: %s
dataDir: ./data
csr: { listen: "%s" }
operations: { listen: "%s" }
log: { level: debug }
profiles: { default: { minTTL: 2s, maxTTL: 24h } }
callers:
  tokenIssuers:
    - { name: main, kind: kubernetes, issuer: "%s", audiences: [istio-ca], jwksFile: jwks.json }
%s`, trustDomain, k.address, k.operations, k.issuer.url, strings.Join(further, "")))
	return k
}

// start runs the CA and waits until it is ready.
func (k *kedge) start(t *testing.T) {
	t.Helper()
	k.process = start(t, "kedge", k.dir, nil, kedgeBin, "serve", "--config", k.configFile)
	eventually(t, "the CA to be ready", func() error {
		if err := k.process.running(); err != nil {
			t.Fatal(err)
		}
		response, err := http.Get("http://" + k.operations + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz says %s", response.Status)
		}
		return nil
	})
}

// metrics scrapes the CA.
func (k *kedge) metrics(t *testing.T) string {
	t.Helper()
	response, err := http.Get("http://" + k.operations + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("/metrics: %s, %v", response.Status, err)
	}
	return string(text)
}

// rootFile is what clients are given to trust.
func (k *kedge) rootFile() string { return filepath.Join(k.dir, "data", "root-cert.pem") }

func (k *kedge) roots(t *testing.T) (*x509.CertPool, []byte) {
	t.Helper()
	text, err := os.ReadFile(k.rootFile())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		t.Fatalf("%s holds no certificate", k.rootFile())
	}
	return pool, text
}

// record is an issue event of the ledger, as "kedge ledger list --json" prints it.
type record struct {
	Number uint64 `json:"number"`
	Issue  struct {
		Serial     string    `json:"serial"`
		SPIFFEID   string    `json:"spiffe_id"`
		NotBefore  time.Time `json:"not_before"`
		NotAfter   time.Time `json:"not_after"`
		Proofs     []proof   `json:"proofs"`
		FirstProof *proof    `json:"first_proof"`
		Holder     struct {
			Kind string `json:"kind"`
			ID   string `json:"id"`
		} `json:"holder"`
		Replaces  uint64 `json:"replaces"`
		RequestID string `json:"request_id"`
		ClusterID string `json:"cluster_id"`
	} `json:"issue"`
}

type proof struct {
	Method  string `json:"method"`
	Issuer  string `json:"issuer"`
	Subject string `json:"subject"`
}

// ledger returns the SVIDs that were recorded, the oldest first. The CA must be running.
func (k *kedge) ledger(t *testing.T) []record {
	t.Helper()
	var records []record
	out := run(t, kedgeBin, "ledger", "list", "--json", "--type", "issue", "--oldest-first", "--limit", "0", "--config", k.configFile)
	for decoder := json.NewDecoder(bytes.NewReader(out)); decoder.More(); {
		var r record
		if err := decoder.Decode(&r); err != nil {
			t.Fatalf("kedge ledger list printed something else than events: %v\n%s", err, out)
		}
		if r.Issue.SPIFFEID != "" { // the CA's own serving certificate has none
			records = append(records, r)
		}
	}
	return records
}

// recordOf returns the ledger's record of a certificate.
func (k *kedge) recordOf(t *testing.T, cert *x509.Certificate) record {
	t.Helper()
	serial := fmt.Sprintf("%x", cert.SerialNumber.Bytes())
	for _, r := range k.ledger(t) {
		if r.Issue.Serial == serial {
			return r
		}
	}
	t.Fatalf("the ledger has no certificate with the serial %s, which a client holds", serial)
	return record{}
}

// refusal is what the CA logs of a call that it refused.
type refusal struct {
	Message   string `json:"msg"`
	RequestID string `json:"request_id"`
	Result    string `json:"result"`
	Reason    string `json:"reason"`
}

// refusals returns every call that was refused since the latest start.
func (k *kedge) refusals() []refusal {
	var all []refusal
	for line := range bytes.Lines(k.process.log()) {
		var r refusal
		if json.Unmarshal(line, &r) == nil && r.Message == "certificate refused" { // lines for people are no JSON
			all = append(all, r)
		}
	}
	return all
}

// checkLedger makes sure that the ledger's hash chain holds and its holdings equal a recount.
func (k *kedge) checkLedger(t *testing.T) {
	t.Helper()
	run(t, kedgeBin, "ledger", "verify", "--config", k.configFile)
}

// checkSVID makes sure of all that a verifier checks of an SVID and its chain, here and with openssl.
func (k *kedge) checkSVID(t *testing.T, chain []*x509.Certificate, id string) {
	t.Helper()
	roots, _ := k.roots(t)
	leaf, intermediates := chain[0], x509.NewCertPool()
	for _, link := range chain[1:] {
		intermediates.AddCert(link)
	}
	for name, usage := range map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("the SVID does not verify as a %s's: %v", name, err)
		}
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id {
		t.Errorf("the URI SANs are %v instead of %s alone", leaf.URIs, id)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "leaf.pem"), encode(leaf))
	write(t, filepath.Join(dir, "chain.pem"), encode(chain[1:]...))
	out := run(t, "openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", k.rootFile(), "-untrusted", filepath.Join(dir, "chain.pem"),
		filepath.Join(dir, "leaf.pem"))
	if !strings.HasSuffix(strings.TrimSpace(string(out)), ": OK") {
		t.Errorf("openssl verify says %s", out)
	}
}

func encode(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, cert := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return text
}

// decode reads all certificates of a PEM text.
func decode(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(bytes.TrimSpace(text)) > 0 {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("not a PEM certificate: %.60q", text)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs, text = append(certs, cert), rest
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("no certificate")
	}
	return certs, nil
}
