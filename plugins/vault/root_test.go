package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/contracttest"
)

// authority is a CA of the test's.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// signCert has by sign a certificate; nil: the template's own key does.
func signCert(t testing.TB, template *x509.Certificate, key crypto.Signer, by *authority) *authority {
	t.Helper()
	if by == nil {
		by = &authority{template, key}
	}
	if template.SerialNumber == nil {
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150))
		if err != nil {
			t.Fatal(err)
		}
		template.SerialNumber = serial.SetBit(serial, 150, 1)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func caTemplate(name string, pathLength int) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, MaxPathLen: pathLength, MaxPathLenZero: pathLength == 0,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour).Truncate(time.Second), NotAfter: time.Now().Add(1000 * time.Hour).Truncate(time.Second)}
}

func encode(authorities ...*authority) string {
	var text strings.Builder
	for _, a := range authorities {
		_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	}
	return text.String()
}

// fakeMount is a PKI engine that signs what a test makes of the request.
type fakeMount struct {
	*fake
	root   *authority
	issuer *authority // may be the root
	order  map[string]any
}

func newMount(t *testing.T) *fakeMount {
	t.Helper()
	m := &fakeMount{fake: newFake(t)}
	m.root = signCert(t, caTemplate("root", 2), newKey(t), nil)
	m.issuer = signCert(t, caTemplate("intermediate", 1), newKey(t), m.root)
	m.on("GET pki/issuer/default", data(map[string]any{"certificate": encode(m.issuer), "ca_chain": []string{encode(m.issuer), encode(m.root)},
		"usage": "crl-signing,issuing-certificates,ocsp-signing,read-only"}))
	return m
}

// signs makes the mount answer what the test says, or else sign what the test makes of a template that is right.
func (m *fakeMount) signs(t *testing.T, call string, change func(template *x509.Certificate) (answer string)) {
	m.on(call, func(w http.ResponseWriter, r *http.Request) {
		m.order = nil
		if err := json.NewDecoder(r.Body).Decode(&m.order); err != nil {
			t.Errorf("the request is no JSON: %v", err)
		}
		text, _ := m.order["csr"].(string)
		block, _ := pem.Decode([]byte(text))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || csr.CheckSignature() != nil {
			t.Errorf("the CSR is not good: %v", err)
			return
		}
		template := caTemplate(fmt.Sprint(m.order["common_name"]), 0)
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
		if at, ok := m.order["not_after"].(string); ok {
			template.NotAfter, _ = time.Parse(time.RFC3339, at)
		}
		template.URIs = []*url.URL{{Scheme: "spiffe", Host: contracttest.TrustDomain}}
		answer := change(template)
		if answer == "" {
			answer = encode(signCert(t, template, publicOnly{csr.PublicKey}, m.issuer))
		}
		data(map[string]any{"certificate": answer, "ca_chain": []string{encode(m.issuer), encode(m.root)}})(w, r)
	})
}

// publicOnly is a key of which only the public half is known.
type publicOnly struct{ pub crypto.PublicKey }

func (p publicOnly) Public() crypto.PublicKey { return p.pub }
func (publicOnly) Sign(_ io.Reader, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	panic("it is not known")
}

func openRoot(t *testing.T, o RootOptions) *Root {
	t.Helper()
	o.PollInterval = time.Hour
	r, err := OpenRoot(o)
	if err != nil {
		t.Fatalf("OpenRoot: %v", err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func newRequest(t *testing.T) ca.CertifyRequest {
	t.Helper()
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return ca.CertifyRequest{PublicKey: key.Public(), CSR: csr, TrustDomain: contracttest.TrustDomain, CommonName: "issuing CA", NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour)}
}

const signIntermediate = "PUT pki/issuer/default/sign-intermediate"

// TestAnAnswerThatIsNotOneCertificateIsRefused: whether the certificate is what was asked for, ca looks at.
func TestAnAnswerThatIsNotOneCertificateIsRefused(t *testing.T) {
	m := newMount(t)
	r := openRoot(t, RootOptions{Client: m.client(t)})
	for name, c := range map[string]struct{ answer, want string }{ // in the error; "": it is taken
		"what was asked for": {"", ""},
		"two certificates":   {encode(m.issuer, m.root), "2 certificates"},
		"no certificate":     {"none", "PEM"},
		"a key":              {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "PEM"},
		"garbage in PEM":     {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "x509"},
	} {
		t.Run(name, func(t *testing.T) {
			m.signs(t, signIntermediate, func(*x509.Certificate) string { return c.answer })
			chain, err := r.Certify(t.Context(), newRequest(t))
			if c.want == "" && (err != nil || len(chain) != 2 || !chain[1].Equal(m.issuer.cert)) {
				t.Fatalf("a chain of %d, %v", len(chain), err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

func TestTheIssuerAndItsNamesAreKeptApart(t *testing.T) {
	m := newMount(t)
	r := openRoot(t, RootOptions{Client: m.client(t)})
	m.signs(t, signIntermediate, func(*x509.Certificate) string { return "" })
	request := newRequest(t)
	request.CommonName = "intermediate"
	if _, err := r.Certify(t.Context(), request); err == nil || !strings.Contains(err.Error(), "self-issued") {
		t.Errorf("an issuing CA with the name of its issuer: %v", err)
	}
	request = newRequest(t)
	request.CSR = newRequest(t).CSR
	if _, err := r.Certify(t.Context(), request); err == nil || !strings.Contains(err.Error(), "for another public key") {
		t.Errorf("a CSR for another key: %v", err)
	}
}

func TestNothingIsAskedForThatOutlivesItsIssuers(t *testing.T) {
	m := newMount(t)
	end := time.Now().Add(30 * time.Minute).Truncate(time.Second)
	template := caTemplate("intermediate", 1)
	template.NotBefore, template.NotAfter = time.Now().Add(-10*time.Second).Truncate(time.Second), end
	m.issuer = signCert(t, template, newKey(t), m.root)
	m.on("GET pki/issuer/default", data(map[string]any{"certificate": encode(m.issuer), "ca_chain": []string{encode(m.issuer), encode(m.root)}}))
	m.signs(t, signIntermediate, func(c *x509.Certificate) string { c.NotBefore = time.Now(); return "" })
	chain, err := openRoot(t, RootOptions{Client: m.client(t)}).Certify(t.Context(), newRequest(t))
	if err != nil || !chain[0].NotAfter.Equal(end) {
		t.Fatalf("%v, %v", chain, err)
	}
	if backdate, _ := m.order["not_before_duration"].(float64); backdate < 1 || backdate > 59 {
		t.Errorf("Vault was asked to backdate by %v s, to before its issuer", m.order["not_before_duration"])
	}
	if length, _ := m.order["max_path_length"].(float64); length != 0 || m.order["use_csr_values"] != false {
		t.Errorf("Vault was asked for the path length %v, use_csr_values %v", m.order["max_path_length"], m.order["use_csr_values"])
	}
}

// TestAMountOfAnOldVaultIsUsed: before Vault 1.11 there were no issuers in the paths.
func TestAMountOfAnOldVaultIsUsed(t *testing.T) {
	m := newMount(t)
	m.on("GET pki/issuer/default", refuse(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n"))
	m.on("GET pki/cert/ca", data(map[string]any{"certificate": encode(m.issuer)}))
	m.on("GET pki/cert/ca_chain", data(map[string]any{"certificate": encode(m.issuer, m.root)}))
	m.signs(t, "PUT pki/root/sign-intermediate", func(c *x509.Certificate) string {
		ttl, _ := m.order["ttl"].(float64)
		c.NotAfter = time.Now().Add(time.Duration(ttl) * time.Second).Truncate(time.Second)
		return ""
	})
	client := m.client(t)
	r := openRoot(t, RootOptions{Client: client})
	chain, err := r.Certify(t.Context(), newRequest(t))
	if err != nil || len(chain) != 2 {
		t.Fatalf("a chain of %d, %v", len(chain), err)
	}
	if _, both := m.order["not_after"]; both {
		t.Error("an old Vault is asked for not_after, which it does not know, or takes for a second end beside ttl")
	}
	// An issuer that the configuration names is none that such a mount could have.
	m.on("GET pki/issuer/mesh", refuse(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n"))
	if _, err := openRoot(t, RootOptions{Client: client, Issuer: "mesh"}).Roots(t.Context()); err == nil {
		t.Error("a mount without issuers has one of that name")
	}
	// An old mount whose issuer is its root may have no chain.
	m.issuer = m.root
	m.on("GET pki/cert/ca", data(map[string]any{"certificate": encode(m.root)}))
	m.on("GET pki/cert/ca_chain", refuse(http.StatusNotFound))
	if chain, err := r.Certify(t.Context(), newRequest(t)); err != nil || len(chain) != 1 {
		t.Errorf("a chain of %d, %v", len(chain), err)
	}
}

// FuzzChain: whatever a server gives for a chain, it is read without a crash, and leads to a self-signed certificate or nowhere.
func FuzzChain(f *testing.F) {
	root := signCert(f, caTemplate("root", 1), newKey(f), nil)
	issuer := signCert(f, caTemplate("issuer", 1), newKey(f), root)
	f.Add(encode(issuer), encode(issuer, root))
	f.Add(encode(root), "")
	f.Add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "x")
	r := &Root{o: RootOptions{Mount: "pki", Issuer: "default", Now: time.Now}}
	f.Fuzz(func(t *testing.T, own, others string) {
		chain, err := r.chain(own, []string{others})
		if (err == nil) == (len(chain) == 0) || err == nil && chain[len(chain)-1].CheckSignatureFrom(chain[len(chain)-1]) != nil {
			t.Errorf("a chain of %d, %v", len(chain), err)
		}
	})
}
