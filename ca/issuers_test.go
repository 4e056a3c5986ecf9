package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/plugins/memory"
)

// order is what a root signs: a template, for a key, by a CA.
type order struct {
	*x509.Certificate
	pub crypto.PublicKey
	by  *madeCA
}

// faultyRoot is a root over an intermediate that signs what a test makes of what it was asked for.
type faultyRoot struct {
	root, intermediate *madeCA
	spoil              func(o *order)
}

func (r *faultyRoot) Roots(context.Context) ([]*x509.Certificate, error) {
	return []*x509.Certificate{r.root.cert}, nil
}

func (*faultyRoot) Changed() <-chan struct{} { return nil }

func (r *faultyRoot) Certify(_ context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	id, err := ca.SubjectKeyID(request.PublicKey)
	if err != nil {
		return nil, err
	}
	o := &order{&x509.Certificate{SerialNumber: new(big.Int).SetBytes(id), Subject: pkix.Name{CommonName: request.CommonName}, NotBefore: request.NotBefore, NotAfter: request.NotAfter,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true, SubjectKeyId: id,
		URIs: []*url.URL{{Scheme: "spiffe", Host: request.TrustDomain}}}, request.PublicKey, r.intermediate}
	r.spoil(o)
	der, err := x509.CreateCertificate(rand.Reader, o.Certificate, o.by.cert, o.pub, o.by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return ca.Issuers{r.intermediate.cert, r.root.cert}.Chain(cert), err
}

func TestACertificateThatIsNotWhatWasAskedForIsRefused(t *testing.T) {
	f := newFixture(t)
	profile, err := ca.NewProfile(ca.DefaultProfile, f.profile)
	if err != nil {
		t.Fatal(err)
	}
	pathLength := func(length int) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = length, length == 0 }
	}
	root := makeCA(t, f, "root", nil, pathLength(2))
	intermediate := makeCA(t, f, "intermediate", root, pathLength(1))
	elsewhere := &url.URL{Scheme: "spiffe", Host: "other.example"}
	for name, c := range map[string]struct {
		spoil func(o *order)
		want  string // in the error; "": it is taken
	}{
		"nothing":              {func(*order) {}, ""},
		"another key":          {func(o *order) { o.pub = newKey(t).Public() }, "another public key"},
		"no CA":                {func(o *order) { o.IsCA, o.MaxPathLenZero = false, false }, "not a CA's"},
		"no path length":       {func(o *order) { o.MaxPathLen, o.MaxPathLenZero = -1, false }, "path length"},
		"path length 1":        {func(o *order) { o.MaxPathLen, o.MaxPathLenZero = 1, false }, "path length"},
		"no cRLSign":           {func(o *order) { o.KeyUsage = x509.KeyUsageCertSign }, "keyUsage"},
		"digitalSignature too": {func(o *order) { o.KeyUsage |= x509.KeyUsageDigitalSignature }, "keyUsage"},
		"an extKeyUsage":       {func(o *order) { o.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extKeyUsage"},
		"a critical extension": {func(o *order) {
			o.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}, "critical extensions"},
		"no SPIFFE ID":         {func(o *order) { o.URIs = nil }, "URI SANs"},
		"another trust domain": {func(o *order) { o.URIs = []*url.URL{elsewhere} }, "URI SANs"},
		"two trust domains":    {func(o *order) { o.URIs = append(o.URIs, elsewhere) }, "URI SANs"},
		"a DNS name":           {func(o *order) { o.DNSNames = []string{"issuing.example"} }, "further names"},
		"an IP address":        {func(o *order) { o.IPAddresses = []net.IP{{1, 2, 3, 4}} }, "further names"},
		"name constraints":     {func(o *order) { o.PermittedDNSDomains = []string{"x.example"} }, "name constraints"},
		"URI constraints":      {func(o *order) { o.ExcludedURIDomains = []string{"x.example"} }, "name constraints"},
		"another name":         {func(o *order) { o.Subject.CommonName = "other" }, "common name"},
		"too short a serial":   {func(o *order) { o.SerialNumber = big.NewInt(7) }, "serial number"},
		"a longer life":        {func(o *order) { o.NotAfter = o.NotAfter.Add(time.Second) }, "longer than"},
		"not yet":              {func(o *order) { o.NotBefore = time.Now().Add(time.Minute) }, "this clock or the root's is wrong"},
		"before its issuer":    {func(o *order) { o.NotBefore = time.Now().Add(-2 * time.Hour) }, "clock is behind"},
		"signed by the root":   {func(o *order) { o.by = root }, "not in order"},
		"signed by a namesake": {func(o *order) { o.by = makeCA(t, f, "intermediate", nil, pathLength(1)) }, "does not lead to a trust anchor"},
		"another issuer's key id": {func(o *order) {
			by := *intermediate.cert
			by.SubjectKeyId = []byte("another")
			o.by = &madeCA{&by, intermediate.key}
		}, "authority key identifier"},
	} {
		t.Run(name, func(t *testing.T) {
			found, err := ca.Rehearse(t.Context(), ca.Options{TrustDomain: td, Root: &faultyRoot{root, intermediate, c.spoil}, Keys: &memory.KeyStore{}, IssuingKey: ca.P256,
				Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, Clock: f.clock.clock()})
			if c.want == "" && (err != nil || len(found.Chain) != 2) {
				t.Errorf("a chain of %d, %v", len(found.Chain), err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

func TestWhatDoesNotFitBelowItsIssuersIsRefused(t *testing.T) {
	f := newFixture(t)
	now := f.clock.clock().Wall()
	root := makeCA(t, f, "root", nil, func(c *x509.Certificate) { c.URIs = []*url.URL{td.ID().URL()} })
	issuers := ca.Issuers{root.cert}
	for want, change := range map[string]func(r *ca.CertifyRequest){
		"":                   func(*ca.CertifyRequest) {},
		"another public key": func(r *ca.CertifyRequest) { r.CSR = newRequest(t, now).CSR },
		"its CSR":            func(r *ca.CertifyRequest) { r.CSR = []byte("none") },
		"self-issued":        func(r *ca.CertifyRequest) { r.CommonName = "root" },
		"not 1 to 64":        func(r *ca.CertifyRequest) { r.CommonName = "" },
		"other.example":      func(r *ca.CertifyRequest) { r.TrustDomain = "other.example" },
		"its public key":     func(r *ca.CertifyRequest) { r.PublicKey = nil },
		"no time is left":    func(r *ca.CertifyRequest) { r.NotAfter = r.NotBefore },
		"its trust domain":   func(r *ca.CertifyRequest) { r.TrustDomain = "Not A Domain" },
	} {
		request := newRequest(t, now)
		change(&request)
		_, err := issuers.Fit(request, now)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
	request := newRequest(t, now)
	request.NotBefore, request.NotAfter = now.AddDate(-9, 0, 0), now.AddDate(9, 0, 0)
	fitting, err := issuers.Fit(request, now)
	if err != nil || !fitting.NotBefore.Equal(root.cert.NotBefore) || !fitting.NotAfter.Equal(root.cert.NotAfter) {
		t.Errorf("the validity is cut to %s to %s, %v", fitting.NotBefore, fitting.NotAfter, err)
	}
}

func newRequest(t *testing.T, now time.Time) ca.CertifyRequest {
	t.Helper()
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return ca.CertifyRequest{PublicKey: key.Public(), CSR: csr, TrustDomain: td.Name(), CommonName: "issuing CA", NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour)}
}

func TestIssuersOfAnyShapeAreFoundInBoundedTime(t *testing.T) {
	f := newFixture(t)
	now := f.clock.clock().Wall()
	below := func(name string, by *madeCA, length int) *madeCA {
		return makeCA(t, f, name, by, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = length, length == 0 })
	}
	// again certifies a CA's key and name anew.
	again := func(of, by *madeCA) *madeCA {
		template := *of.cert
		template.SubjectKeyId, template.AuthorityKeyId = nil, nil
		der, err := x509.CreateCertificate(rand.Reader, &template, by.cert, of.key.Public(), by.key)
		if err != nil {
			t.Fatal(err)
		}
		return &madeCA{parse(t, der), of.key}
	}
	root := below("root", nil, 2)
	issuer := below("intermediate", root, 1)
	a, b := below("a", nil, 5), below("b", nil, 5)
	ab, ba := again(a, b), again(b, a) // each certifies the other
	cross := again(root, below("older root", nil, 3))
	shallow := below("shallow", root, 1)
	expired := makeCA(t, f, "expired", root, func(c *x509.Certificate) {
		c.NotAfter, c.MaxPathLen, c.MaxPathLenZero = now.Add(-time.Minute), 1, false
	})
	leaf := makeCA(t, f, "leaf", root, func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false })
	var many []*madeCA
	for range 21 {
		many = append(many, again(issuer, root))
	}
	for name, c := range map[string]struct {
		own    *madeCA
		others []*madeCA
		want   string // in the error; "": an issuing CA may stand below it
	}{
		"in order":               {issuer, []*madeCA{issuer, root}, ""},
		"out of order":           {issuer, []*madeCA{root, issuer}, ""},
		"with a stranger":        {issuer, []*madeCA{ab, issuer, root}, ""},
		"cross-signed too":       {issuer, []*madeCA{issuer, cross, root}, ""},
		"the root alone":         {root, nil, ""},
		"without its root":       {issuer, []*madeCA{issuer}, "does not lead to a self-signed root"},
		"round in a circle":      {ab, []*madeCA{ab, ba}, "does not lead to a self-signed root"},
		"more than a chain has":  {issuer, many, "more than"},
		"an issuer that expired": {expired, []*madeCA{root}, "expired at"},
		"an issuer that is none": {leaf, []*madeCA{root}, "not a CA certificate"},
		"too far below":          {below("deep", shallow, 1), []*madeCA{shallow, root}, "path length constraint 1"},
	} {
		t.Run(name, func(t *testing.T) {
			var others []*x509.Certificate
			for _, other := range c.others {
				others = append(others, other.cert)
			}
			issuers, err := ca.Climb(c.own.cert, others)
			if err == nil {
				err = issuers.Check(now)
			}
			if c.want == "" && (err != nil || !issuers.Root().Equal(root.cert) || !issuers[0].Equal(c.own.cert)) {
				t.Errorf("%d certificates, %v", len(issuers), err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}
