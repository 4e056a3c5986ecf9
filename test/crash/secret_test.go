package crash

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/test/process"
)

// secret is what istiod was given: a root, and intermediates under it.
type secret struct {
	dir   string
	root  *x509.Certificate
	under func(name string, end time.Time) (certificate, key string) // PEM
}

func newSecret(t *testing.T) *secret {
	t.Helper()
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	template := func(name string, end time.Time) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{Organization: []string{"Istio"}, CommonName: name}, NotBefore: time.Now().Add(-2 * time.Hour),
			NotAfter: end, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	}
	sign := func(c, by *x509.Certificate, pub any) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, c, by, pub, key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	own := template("Root", time.Now().AddDate(1, 0, 0))
	s := &secret{dir: t.TempDir(), root: sign(own, own, key.Public())}
	s.under = func(name string, end time.Time) (certificate, private string) {
		below, err := ca.GenerateKey(ca.P256)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(below)
		if err != nil {
			t.Fatal(err)
		}
		return certificatePEM(sign(template(name, end), s.root, below.Public())), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	return s
}

func certificatePEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// set are the files of an intermediate.
func (s *secret) set(certificate, key string) map[string]string {
	return map[string]string{"ca-cert.pem": certificate, "ca-key.pem": key, "cert-chain.pem": certificate, "root-cert.pem": certificatePEM(s.root)}
}

// TestABadSecretIsNamedByLogMetricReadinessAndDoctorWhileTheOldOneSigns: a set that is incomplete, mismatched, expired or would outlive its issuer.
func TestABadSecretIsNamedByLogMetricReadinessAndDoctorWhileTheOldOneSigns(t *testing.T) {
	t.Parallel()
	year := time.Now().AddDate(0, 6, 0)
	s := newSecret(t)
	first, key := s.under("First", year)
	other, otherKey := s.under("Other", year)
	old, oldKey := s.under("Old", time.Now().Add(-time.Hour))
	long, longKey := s.under("Long", s.root.NotAfter.Add(time.Hour))
	keyless := s.set(other, otherKey)
	delete(keyless, "ca-key.pem")
	process.Mount(t, s.dir, s.set(first, key))
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, fmt.Sprintf("root: {kind: cacerts, cacerts: {dir: %q}}\n", s.dir))
	k.Start(t)
	caller, csr := k.Dial(t, nil), process.NewKey(t).CSR
	issuer := func() string {
		issued, err := caller.Issue(t.Context(), csr, cluster.Token(t, "default", "web"), 0)
		if err != nil {
			t.Fatal(err)
		}
		return issued.Leaf.Issuer.CommonName
	}
	problems := func() (samples map[string]float64) {
		samples = k.Metrics(t)
		maps.DeleteFunc(samples, func(name string, _ float64) bool { return !strings.HasPrefix(name, "kedge_problem{") })
		return samples
	}
	for _, test := range []struct {
		files              map[string]string
		file, reason, says string
	}{
		{keyless, "ca-key.pem", "incomplete", "the set is incomplete: ca-key.pem is missing"},
		{s.set(other, key), "ca-key.pem", "mismatched", "ca-key.pem does not belong to ca-cert.pem"},
		{s.set(old, oldKey), "ca-cert.pem", "expired", `ca-cert.pem: the certificate "CN=Old,O=Istio" expired at `},
		{s.set(long, longKey), "ca-cert.pem", "outlives-issuer", `ca-cert.pem: the certificate "CN=Long,O=Istio" would outlive its issuer`},
	} {
		process.Mount(t, s.dir, test.files)
		sample := fmt.Sprintf(`kedge_problem{about="root",file=%q,reason=%q}`, test.file, test.reason)
		process.Eventually(t, sample, func() error {
			if samples := problems(); len(samples) != 1 || samples[sample] != 1 {
				return fmt.Errorf("the metric is %v", samples)
			}
			return nil
		})
		if code, body := k.Get(t, "/readyz"); code != http.StatusOK || !strings.Contains(body, "\nproblem: root: the CA in "+s.dir+" is refused as a whole") || !strings.Contains(body, test.says) {
			t.Errorf("/readyz: %d %s", code, body)
		}
		if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, test.says) {
			t.Errorf("doctor: %d %s", r.Code, r.Stdout)
		}
		if !strings.Contains(k.Log(), strings.ReplaceAll(test.says, `"`, `\"`)) {
			t.Errorf("the log does not say %q:\n%s", test.says, k.Log())
		}
		if name := issuer(); name != "First" {
			t.Errorf("%q signs while %s", name, test.says)
		}
	}
	process.Mount(t, s.dir, s.set(other, otherKey))
	process.Eventually(t, "the problem to be gone", func() error {
		if samples := problems(); len(samples) > 0 {
			return fmt.Errorf("there is %v", samples)
		}
		return nil
	})
	if n := k.Metrics(t)["kedge_problems"]; n != 0 {
		t.Errorf("kedge_problems is %v", n)
	}
	process.Eventually(t, "the good set to sign", func() error {
		if name := issuer(); name != "Other" {
			return fmt.Errorf("%q signs", name)
		}
		return nil
	})
	if !strings.Contains(k.Log(), "files are good again") || strings.Contains(k.Log(), "PRIVATE KEY") {
		t.Errorf("the log:\n%s", k.Log())
	}
}
