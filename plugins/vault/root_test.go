package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
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

// signs makes the mount sign what spoil makes of a template that is right.
func (m *fakeMount) signs(t *testing.T, call string, spoil func(template *x509.Certificate, a *authority) (text string)) {
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
		signer := &authority{m.issuer.cert, m.issuer.key}
		answer := spoil(template, signer)
		if answer == "" {
			key := crypto.PublicKey(csr.PublicKey)
			if signer.key != m.issuer.key && signer.cert == m.issuer.cert { // spoil wants another key certified
				key, signer.key = signer.key.Public(), m.issuer.key
			}
			answer = encode(signCert(t, template, publicOnly{key}, signer))
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
	if o.TrustDomain == "" {
		o.TrustDomain = contracttest.TrustDomain
	}
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

func TestACertificateThatIsNotWhatWasAskedForIsRefused(t *testing.T) {
	m := newMount(t)
	r := openRoot(t, RootOptions{Client: m.client(t)})
	for name, c := range map[string]struct {
		spoil func(template *x509.Certificate, a *authority) string
		want  string // in the error; "": it is taken
	}{
		"nothing":              {func(*x509.Certificate, *authority) string { return "" }, ""},
		"another key":          {func(_ *x509.Certificate, a *authority) string { a.key = newKey(t); return "" }, "another public key"},
		"no CA":                {func(c *x509.Certificate, _ *authority) string { c.IsCA, c.MaxPathLenZero = false, false; return "" }, "not a CA's"},
		"no path length":       {func(c *x509.Certificate, _ *authority) string { c.MaxPathLen = -1; return "" }, "path length"},
		"path length 1":        {func(c *x509.Certificate, _ *authority) string { c.MaxPathLen = 1; return "" }, "path length"},
		"no cRLSign":           {func(c *x509.Certificate, _ *authority) string { c.KeyUsage = x509.KeyUsageCertSign; return "" }, "keyUsage"},
		"digitalSignature too": {func(c *x509.Certificate, _ *authority) string { c.KeyUsage |= x509.KeyUsageDigitalSignature; return "" }, "keyUsage"},
		"an extKeyUsage": {func(c *x509.Certificate, _ *authority) string {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			return ""
		}, "extKeyUsage"},
		"a critical extension": {func(c *x509.Certificate, _ *authority) string {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
			return ""
		}, "critical extensions"},
		"no SPIFFE ID": {func(c *x509.Certificate, _ *authority) string { c.URIs = nil; return "" }, "URI SANs"},
		"another trust domain": {func(c *x509.Certificate, _ *authority) string {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}}
			return ""
		}, "URI SANs"},
		"two trust domains": {func(c *x509.Certificate, _ *authority) string {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "other.example"})
			return ""
		}, "URI SANs"},
		"a DNS name":    {func(c *x509.Certificate, _ *authority) string { c.DNSNames = []string{"issuing.example"}; return "" }, "further names"},
		"an IP address": {func(c *x509.Certificate, _ *authority) string { c.IPAddresses = []net.IP{{1, 2, 3, 4}}; return "" }, "further names"},
		"name constraints": {func(c *x509.Certificate, _ *authority) string {
			c.PermittedDNSDomains = []string{"x.example"}
			return ""
		}, "name constraints"},
		"URI constraints": {func(c *x509.Certificate, _ *authority) string {
			c.ExcludedURIDomains = []string{"x.example"}
			return ""
		}, "name constraints"},
		"another name":       {func(c *x509.Certificate, _ *authority) string { c.Subject.CommonName = "other"; return "" }, "common name"},
		"too short a serial": {func(c *x509.Certificate, _ *authority) string { c.SerialNumber = big.NewInt(7); return "" }, "serial number"},
		"a longer life":      {func(c *x509.Certificate, _ *authority) string { c.NotAfter = c.NotAfter.Add(time.Second); return "" }, "longer than"},
		"not yet":            {func(c *x509.Certificate, _ *authority) string { c.NotBefore = time.Now().Add(time.Minute); return "" }, "one of the two clocks"},
		"before its issuer": {func(c *x509.Certificate, _ *authority) string {
			c.NotBefore = time.Now().Add(-2 * time.Hour)
			return ""
		}, "clock is behind"},
		"signed by the root": {func(_ *x509.Certificate, a *authority) string { *a = *m.root; return "" }, "is not signed by"},
		"signed by a namesake": {func(_ *x509.Certificate, a *authority) string {
			*a = *signCert(t, caTemplate("intermediate", 1), newKey(t), nil)
			return ""
		}, "is not signed by"},
		"the issuer itself": {func(*x509.Certificate, *authority) string { return encode(m.issuer) }, "another public key"},
		"two certificates":  {func(*x509.Certificate, *authority) string { return encode(m.issuer, m.root) }, "2 certificates"},
		"no certificate":    {func(*x509.Certificate, *authority) string { return "none" }, "PEM"},
		"a key": {func(*x509.Certificate, *authority) string {
			return "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"
		}, "PEM"},
		"garbage in PEM": {func(*x509.Certificate, *authority) string {
			return "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
		}, "x509"},
	} {
		t.Run(name, func(t *testing.T) {
			m.signs(t, signIntermediate, c.spoil)
			chain, err := r.Certify(t.Context(), newRequest(t))
			if c.want == "" {
				if err != nil || len(chain) != 2 || !chain[1].Equal(m.issuer.cert) {
					t.Fatalf("a chain of %d, %v", len(chain), err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

func TestTheIssuerAndItsNamesAreKeptApart(t *testing.T) {
	m := newMount(t)
	r := openRoot(t, RootOptions{Client: m.client(t)})
	m.signs(t, signIntermediate, func(*x509.Certificate, *authority) string { return "" })
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
	request = newRequest(t)
	request.TrustDomain = "other.example"
	if _, err := r.Certify(t.Context(), request); err == nil || !strings.Contains(err.Error(), "other.example") {
		t.Errorf("another trust domain: %v", err)
	}
}

func TestNothingIsAskedForThatOutlivesItsIssuers(t *testing.T) {
	m := newMount(t)
	end := time.Now().Add(30 * time.Minute).Truncate(time.Second)
	template := caTemplate("intermediate", 1)
	template.NotBefore, template.NotAfter = time.Now().Add(-10*time.Second).Truncate(time.Second), end
	m.issuer = signCert(t, template, newKey(t), m.root)
	m.on("GET pki/issuer/default", data(map[string]any{"certificate": encode(m.issuer), "ca_chain": []string{encode(m.issuer), encode(m.root)}}))
	m.signs(t, signIntermediate, func(c *x509.Certificate, _ *authority) string { c.NotBefore = time.Now(); return "" })
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
	m.signs(t, "PUT pki/root/sign-intermediate", func(c *x509.Certificate, _ *authority) string {
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

func TestAChainOfAnyShapeIsReadInBoundedTime(t *testing.T) {
	m := newMount(t)
	r := openRoot(t, RootOptions{Client: m.client(t)})
	a, b := &authority{caTemplate("a", 5), newKey(t)}, &authority{caTemplate("b", 5), newKey(t)}
	ab, ba := signCert(t, caTemplate("a", 5), a.key, b), signCert(t, caTemplate("b", 5), b.key, a) // each certifies the other
	cross := signCert(t, caTemplate("root", 2), m.root.key, signCert(t, caTemplate("older root", 3), newKey(t), nil))
	expired := caTemplate("expired", 1)
	expired.NotAfter = time.Now().Add(-time.Minute)
	leaf := caTemplate("leaf", 0)
	leaf.IsCA, leaf.MaxPathLenZero = false, false
	var many []*authority
	for i := range 2*maxChain + 1 {
		many = append(many, signCert(t, caTemplate(fmt.Sprint(i), 1), m.issuer.key, m.root))
	}
	for name, c := range map[string]struct {
		own   *authority
		chain []*authority
		want  string // in the error; "": it leads to the root
	}{
		"in order":               {m.issuer, []*authority{m.issuer, m.root}, ""},
		"out of order":           {m.issuer, []*authority{m.root, m.issuer}, ""},
		"with a stranger":        {m.issuer, []*authority{ab, m.issuer, m.root}, ""},
		"cross-signed too":       {m.issuer, []*authority{m.issuer, cross, m.root}, ""},
		"the root alone":         {m.root, nil, ""},
		"without its root":       {m.issuer, []*authority{m.issuer}, "does not lead to a self-signed root"},
		"round in a circle":      {ab, []*authority{ab, ba}, "does not lead to a self-signed root"},
		"more than a chain has":  {m.issuer, many, "more than"},
		"an issuer that expired": {signCert(t, expired, newKey(t), m.root), []*authority{m.root}, "expired at"},
		"an issuer that is none": {signCert(t, leaf, newKey(t), m.root), []*authority{m.root}, "not a CA's"},
		"too far below": {signCert(t, caTemplate("deep", 1), newKey(t), signCert(t, caTemplate("shallow", 1), m.issuer.key, m.root)),
			[]*authority{signCert(t, caTemplate("shallow", 1), m.issuer.key, m.root), m.root}, "path length constraint 1"},
	} {
		t.Run(name, func(t *testing.T) {
			chain, err := r.chain(encode(c.own), []string{encode(c.chain...)})
			if c.want == "" && (err != nil || !chain[len(chain)-1].Equal(m.root.cert) || !chain[0].Equal(c.own.cert)) {
				t.Errorf("%d certificates, %v", len(chain), err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
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
