package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// brought makes an authority of the issuing CA that the root brings, and lets it prove itself. It is nil when the root brings none. Others sign, or signed,
// with its key: what they issued lives on unseen.
func (c *CA) brought(ctx context.Context, t *trust) (*authority, error) {
	root, ok := c.root.(IssuingRoot)
	if !ok {
		return nil, nil
	}
	chain, key, err := root.Issuing(ctx)
	if err != nil || len(chain) == 0 {
		return nil, err
	}
	if active := t.active; active != nil && active.key != nil && active.cert.Equal(chain[0]) && sameChain(active.chain, chain) {
		return active, nil
	}
	anchor, err := checkBrought(chain, key, t.anchors(), c.td, c.now())
	if err != nil {
		return nil, err
	}
	record, err := c.recordOf(chain, anchor)
	if err != nil {
		return nil, err
	}
	return c.candidacy(t).prove(record, anchor, key)
}

// recordOf finds the issuing CA in the ledger, or makes the record that is to enter.
func (c *CA) recordOf(chain []*x509.Certificate, anchor *x509.Certificate) (record ledger.AuthorityRecord, err error) {
	id := AuthorityID(chain[0])
	records, err := c.ledger.Authorities()
	if err != nil {
		return record, fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	for _, there := range records {
		if there.ID != id {
			continue
		}
		if there.Tainted {
			return record, fmt.Errorf("the issuing CA %s is tainted: it never signs again; give the root another one", id)
		}
		if there.Role != ledger.RoleIssuing || there.KeyRef != "" {
			return record, fmt.Errorf("the authority %s is in the ledger already, as another kind: give the root an issuing CA of its own", id)
		}
		if !slices.EqualFunc(there.Chain, chain, func(der []byte, cert *x509.Certificate) bool { return bytes.Equal(der, cert.Raw) }) {
			return record, fmt.Errorf("the issuing CA %s is in the ledger with another chain: a certificate has one for good; give the root another issuing CA", id)
		}
		return there, nil
	}
	return foundIssuing(c.td, chain, anchor, "", c.foreign()), nil
}

// openBrought takes the key of an issuing CA from the root that brings it.
func (c *CA) openBrought(ctx context.Context, a *authority) error {
	root, ok := c.root.(IssuingRoot)
	if !ok {
		return fmt.Errorf("the issuing CA %s came with its root, and the configured root brings none: put the root back that belongs to this data folder", a.short())
	}
	chain, key, err := root.Issuing(ctx)
	if err != nil {
		return fmt.Errorf("opening the key of the issuing CA %s, which comes with the root: %w", a.short(), err)
	}
	if len(chain) == 0 || !chain[0].Equal(a.cert) {
		return fmt.Errorf("the issuing CA %s is not the one that the root brings now", a.short())
	}
	if err := isKeyOf(key.Public(), a.cert); err != nil {
		return fmt.Errorf("the key of the issuing CA %s, which comes with the root: %w", a.short(), err)
	}
	return a.use(key)
}

// checkBrought makes sure of an issuing CA that is not made here: its key, its usage, its trust domain, its time, and that it and every link outlive nothing above them. It
// returns the trust anchor.
func checkBrought(chain []*x509.Certificate, key crypto.Signer, roots []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) (*x509.Certificate, error) {
	cert := chain[0]
	if err := isKeyOf(key.Public(), cert); err != nil {
		return nil, err
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return nil, errors.New("its certificate is not a CA's (basicConstraints cA is not true)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("its keyUsage does not allow keyCertSign")
	case now.After(cert.NotAfter):
		return nil, fmt.Errorf("it expired at %s", cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return nil, fmt.Errorf("it is valid only from %s on, and this machine's clock says %s", cert.NotBefore.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	if err := checkCAID(cert, td); err != nil {
		return nil, err
	}
	return checkPath(chain, roots, now)
}
