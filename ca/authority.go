package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// authority is a CA certificate of the ledger, parsed, with its key when it signs.
type authority struct {
	record   ledger.AuthorityRecord
	cert     *x509.Certificate
	chain    []*x509.Certificate // handed out with a leaf: own certificate first, root not included; empty for a root
	chainPEM []string            // one PEM an element
	hash     ledger.Hash         // of the chain
	begins   time.Time           // the latest notBefore in the chain and its root, which may be younger when it was renewed with its key
	notAfter time.Time           // the earliest end in the chain and its root: nothing signed here may outlive it (I3)
	key      crypto.Signer       // of the active issuing CA only
	leaves   *leafMaker          // with that key
}

// loadAuthority parses a record. For an issuing CA, roots must hold its root.
func loadAuthority(record ledger.AuthorityRecord, roots map[ledger.Hash]*x509.Certificate) (*authority, error) {
	cert, err := x509.ParseCertificate(record.Certificate)
	if err != nil {
		return nil, fmt.Errorf("authority %s in the ledger: %w", record.ID, err)
	}
	a := &authority{record: record, cert: cert, begins: cert.NotBefore, notAfter: cert.NotAfter}
	if record.Role == ledger.RoleRoot {
		return a, nil
	}
	for _, der := range record.Chain {
		link, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("chain of authority %s in the ledger: %w", record.ID, err)
		}
		a.chain = append(a.chain, link)
		a.chainPEM = append(a.chainPEM, encodePEM(der))
		a.begins, a.notAfter = later(a.begins, link.NotBefore), earlier(a.notAfter, link.NotAfter)
	}
	root, ok := roots[record.Root]
	if !ok {
		return nil, fmt.Errorf("authority %s in the ledger chains to the root %s, which the ledger does not have", record.ID, record.Root)
	}
	a.begins, a.notAfter = later(a.begins, root.NotBefore), earlier(a.notAfter, root.NotAfter)
	a.hash = ledger.ChainHash(record.Chain)
	return a, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// openKey fetches the authority's key, from the key store or with what the root brings, and makes sure that it is the one that was certified.
func (c *CA) openKey(ctx context.Context, a *authority) error {
	if a.record.KeyRef == "" {
		return c.openBrought(ctx, a)
	}
	key, err := c.keys.Open(ctx, a.record.KeyRef)
	if err != nil {
		return fmt.Errorf("opening the key %q of the issuing CA %s: %w", a.record.KeyRef, a.short(), err)
	}
	if err := isKeyOf(key.Public(), a.cert); err != nil {
		return fmt.Errorf("the key %q of the issuing CA %s: %w", a.record.KeyRef, a.short(), err)
	}
	return a.use(key)
}

// use lets the authority sign with its key.
func (a *authority) use(key crypto.Signer) (err error) {
	a.key = key
	a.leaves, err = newLeafMaker(a.cert, key)
	return err
}

// short names the authority in logs and errors: the first eight octets of its id.
func (a *authority) short() string { return a.record.ID.String()[:16] }

// halfLife is when a successor is due: half of the certificate's life.
func (a *authority) halfLife() time.Time {
	return a.cert.NotBefore.Add(a.notAfter.Sub(a.cert.NotBefore) / 2)
}

// SameKey says whether two public keys are the same one.
func SameKey(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

func isKeyOf(pub crypto.PublicKey, cert *x509.Certificate) error {
	if !SameKey(pub, cert.PublicKey) {
		return fmt.Errorf("the public key (%T) is not the one in the certificate of %s", pub, cert.Subject)
	}
	return nil
}

// checkRoot makes sure that a root may be trusted by this CA's verifiers (RFC 5280 4.2.1.9, X509-SVID 3.2, 4.1–4.3).
func checkRoot(root *x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	switch {
	case !root.BasicConstraintsValid || !root.IsCA:
		return errors.New("it is not a CA certificate (basicConstraints cA is not true)")
	case root.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its keyUsage does not allow keyCertSign")
	case root.MaxPathLen == 0 && root.MaxPathLenZero:
		return errors.New("its path length constraint of 0 allows no issuing CA below it")
	case now.After(root.NotAfter):
		return fmt.Errorf("it expired at %s", root.NotAfter.Format(time.RFC3339))
	case now.Before(root.NotBefore):
		return fmt.Errorf("it is valid only from %s on, and this machine's clock says %s", root.NotBefore.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	return checkCAID(root, td)
}

// checkCAID allows a CA certificate no URI SAN, or the trust domain's own ID (X509-SVID 3.1).
func checkCAID(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	if len(cert.URIs) == 0 {
		return nil
	}
	if len(cert.URIs) > 1 || cert.URIs[0].String() != td.IDString() {
		return fmt.Errorf("its URI SAN is %v: a CA of the trust domain %s has %s or none", cert.URIs, td, td.IDString())
	}
	return nil
}

// checkPath makes sure that a chain leads to one of the roots, in order and with nothing that does not belong to it, and that nothing in it outlives what is above it (I3). It
// returns the root; when a root was renewed with its key, the one that ends last.
func checkPath(chain, roots []*x509.Certificate, at time.Time) (*x509.Certificate, error) {
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	for _, link := range chain[1:] {
		intermediates.AddCert(link)
	}
	paths, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, fmt.Errorf("its chain does not lead to a trust anchor of the root (if the issuer was exchanged meanwhile, the next try works): %w", err)
	}
	err = errors.New("its chain is not in order, or holds certificates that do not belong to it")
	var best *x509.Certificate
	for _, path := range paths {
		if !sameChain(path[:len(path)-1], chain) {
			continue
		}
		root := path[len(path)-1]
		if outlived := outlives(path); outlived != nil {
			err = outlived
		} else if best == nil || root.NotAfter.After(best.NotAfter) {
			best = root
		}
	}
	if best == nil {
		return nil, err
	}
	return best, nil
}

// outlives says which certificate of a path ends after its issuer.
func outlives(path []*x509.Certificate) error {
	for i, issuer := range path[1:] {
		if path[i].NotAfter.After(issuer.NotAfter) {
			return fmt.Errorf("its chain has a certificate (%s) that outlives its issuer (%s)",
				path[i].NotAfter.Format(time.RFC3339), issuer.NotAfter.Format(time.RFC3339))
		}
	}
	return nil
}

func sameChain(a, b []*x509.Certificate) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}

// AuthorityID names an authority by its certificate.
func AuthorityID(cert *x509.Certificate) ledger.Hash { return sha256.Sum256(cert.Raw) }

// keyID names a key by its SubjectPublicKeyInfo.
func keyID(cert *x509.Certificate) ledger.Hash { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }
