package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"kedge/ca/ledger"
)

// reservedSegment is the first path segment of the SPIFFE IDs that are nobody's: they are never granted.
const reservedSegment = "kedge"

// proveAuthority signs a throwaway leaf with the authority's key, exactly as a real one would be, and makes the checks on it
// that a client makes: the chain, the rules of X509-SVID, and the lints of RFC 5280. Only an authority that passed may sign.
// The leaf's one second of validity is the first of its whole chain, which lies in the past; its SPIFFE ID is never granted; its key is dropped.
func proveAuthority(a *authority, roots []*x509.Certificate, td spiffeid.TrustDomain, serial ledger.Serial) error {
	id, err := spiffeid.FromSegments(td, reservedSegment, "throwaway")
	if err != nil {
		return fmt.Errorf("the throwaway leaf's SPIFFE ID: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("the throwaway leaf's key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("the throwaway leaf's key: %w", err)
	}
	der, err := a.leaves.sign(leaf{serial: serial, uri: id.String(), pub: key.Public(), spki: spki,
		notBefore: a.begins, notAfter: a.begins})
	if err != nil {
		return fmt.Errorf("the key cannot sign: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("the throwaway leaf cannot be parsed: %w", err)
	}
	if err := verifyAsClient(cert, a, roots, key, id); err != nil {
		return fmt.Errorf("a client would refuse what it signs: %w", err)
	}
	return Lint(der)
}

// verifyAsClient does what crypto/tls and go-spiffe do with a peer's certificate.
func verifyAsClient(leaf *x509.Certificate, a *authority, roots []*x509.Certificate, key crypto.Signer, id spiffeid.ID) error {
	chain := append([]*x509.Certificate{leaf}, a.chain...)
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	for _, link := range a.chain {
		intermediates.AddCert(link)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, CurrentTime: leaf.NotBefore,
			KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			return err
		}
	}
	var ders []byte
	for _, cert := range chain {
		ders = append(ders, cert.Raw...)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	svid, err := x509svid.ParseRaw(ders, pkcs8) // the strict parser: X509-SVID 4.1, 4.3, 5.2
	if err != nil {
		return err
	}
	if svid.ID != id {
		return fmt.Errorf("its SPIFFE ID is %s, not %s", svid.ID, id)
	}
	_, _, err = x509svid.Verify(chain, x509bundle.FromX509Authorities(id.TrustDomain(), roots), x509svid.WithTime(leaf.NotBefore))
	return err
}

// Lint runs zlint's lints of RFC 5280 over a certificate. Those of the Web PKI's baseline requirements are not for a mesh.
func Lint(der []byte) error {
	cert, err := zx509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("the linter cannot parse what it signs: %w", err)
	}
	return lintOf(func(lints lint.Registry) *zlint.ResultSet { return zlint.LintCertificateEx(cert, lints) })
}

// LintCRL does so with a CRL.
func LintCRL(der []byte) error {
	list, err := zx509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("the linter cannot parse the CRL: %w", err)
	}
	return lintOf(func(lints lint.Registry) *zlint.ResultSet { return zlint.LintRevocationListEx(list, lints) })
}

func lintOf(run func(lint.Registry) *zlint.ResultSet) error {
	lints, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280, lint.RFC5480}})
	if err != nil {
		return fmt.Errorf("choosing the lints: %w", err)
	}
	var found []string
	for name, result := range run(lints).Results {
		if result.Status >= lint.Error {
			found = append(found, strings.TrimSpace(name+" "+result.Details))
		}
	}
	if len(found) > 0 {
		sort.Strings(found)
		return errors.New("lint: " + strings.Join(found, "; "))
	}
	return nil
}
