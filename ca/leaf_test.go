package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"kedge/ca/ledger"
)

// template is the leaf as x509.CreateCertificate is told of it.
func (l leaf) template(t testing.TB) *x509.Certificate {
	t.Helper()
	uri, err := url.Parse(l.uri)
	if err != nil {
		t.Fatal(err)
	}
	usage := x509.KeyUsageDigitalSignature
	if isRSA(l.pub) {
		usage |= x509.KeyUsageKeyEncipherment
	}
	return &x509.Certificate{SerialNumber: new(big.Int).SetBytes(l.serial), NotBefore: l.notBefore, NotAfter: l.notAfter, KeyUsage: usage,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true, URIs: []*url.URL{uri}}
}

func leafFor(t testing.TB, pub crypto.PublicKey) leaf {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	return leaf{serial: newSerial(ledger.LogID{1, 2, 3}), uri: "spiffe://example.org/ns/default/sa/web", pub: pub, spki: spki, notBefore: now.Add(-time.Minute), notAfter: now.Add(time.Hour)}
}

// issuingKeys are of the kinds that issuing CAs have, with a certificate each.
func issuingKeys(t testing.TB) map[string]signingCA {
	t.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]signingCA{}
	for name, key := range map[string]crypto.Signer{"P-256": newECKey(t), "P-384": p384, "RSA-2048": rsa2048} {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuing " + name, Organization: []string{"Kedge"}},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(100, 0, 0), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = signingCA{cert, key}
	}
	return all
}

func TestLeavesAreWhatTheStandardLibraryWouldMakeOfThem(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa3072, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for by, issuer := range issuingKeys(t) {
		leaves, err := newLeafMaker(issuer.cert, issuer.key)
		if err != nil {
			t.Fatal(err)
		}
		for name, pub := range map[string]crypto.PublicKey{"P-256": newECKey(t).Public(), "P-384": p384.Public(), "P-521": p521.Public(), "RSA-3072": rsa3072.Public(), "Ed25519": edwards} {
			for _, change := range []func(*leaf){
				func(*leaf) {},
				func(l *leaf) { l.notAfter = time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC) },
				func(l *leaf) { l.notAfter = time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC) },
				func(l *leaf) { l.uri = "spiffe://example.org/" + strings.Repeat("a", 2000) },
				func(l *leaf) { l.serial = ledger.Serial{0x7f, 0xff} },
			} {
				l := leafFor(t, pub)
				change(&l)
				der, err := leaves.sign(l)
				if err != nil {
					t.Fatalf("%s by %s: %v", name, by, err)
				}
				got, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatalf("%s by %s: %v", name, by, err)
				}
				if err := got.CheckSignatureFrom(issuer.cert); err != nil {
					t.Errorf("%s by %s: %v", name, by, err)
				}
				want, err := x509.CreateCertificate(rand.Reader, l.template(t), issuer.cert, pub, issuer.key)
				if err != nil {
					t.Fatal(err)
				}
				parsed, err := x509.ParseCertificate(want)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got.RawTBSCertificate, parsed.RawTBSCertificate) || got.SignatureAlgorithm != parsed.SignatureAlgorithm {
					t.Errorf("%s by %s:\n%x\nwhere the standard library writes\n%x", name, by, got.RawTBSCertificate, parsed.RawTBSCertificate)
				}
			}
		}
	}
}

// elsewhere is a key that is not in this process, as an HSM's. It signs another digest than it was given when it is bad.
type elsewhere struct {
	crypto.Signer
	bad bool
}

func (e elsewhere) Sign(random io.Reader, digest []byte, options crypto.SignerOpts) ([]byte, error) {
	if e.bad {
		digest = make([]byte, len(digest))
	}
	return e.Signer.Sign(random, digest, options)
}

func TestASignatureFromElsewhereIsVerified(t *testing.T) {
	for by, issuer := range issuingKeys(t) {
		for _, bad := range []bool{false, true} {
			leaves, err := newLeafMaker(issuer.cert, elsewhere{issuer.key, bad})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := leaves.sign(leafFor(t, newECKey(t).Public())); (err != nil) != bad {
				t.Errorf("%s, bad %t: %v", by, bad, err)
			}
		}
	}
}

// BenchmarkALeaf is what a leaf costs, and what the standard library would take for it, which verifies its own signature.
func BenchmarkALeaf(b *testing.B) {
	for _, by := range []string{"P-256", "RSA-2048"} {
		issuer := issuingKeys(b)[by]
		l := leafFor(b, newECKey(b).Public())
		leaves, err := newLeafMaker(issuer.cert, issuer.key)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(by, func(b *testing.B) {
			for b.Loop() {
				if _, err := leaves.sign(l); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(by+", x509.CreateCertificate", func(b *testing.B) {
			for b.Loop() {
				if _, err := x509.CreateCertificate(rand.Reader, l.template(b), issuer.cert, l.pub, issuer.key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
