package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// candidacy is what an issuing CA is measured by before it signs. A renewal, the taking up of one that comes with its root, and a rehearsal all go this way.
type candidacy struct {
	td       spiffeid.TrustDomain
	anchors  []*x509.Certificate // what is trusted
	now      time.Time
	shortest time.Duration                        // certificate that it has to have time for
	may      func(anchor *x509.Certificate) error // says whether one under this anchor may sign now (I2)
	log      ledger.LogID                         // for the serial of what it signs on trial
}

// candidacy is that of a new issuing CA for this CA.
func (c *CA) candidacy(t *trust) candidacy {
	return candidacy{td: c.td, anchors: t.anchors(), now: c.now(), shortest: c.profiles[DefaultProfile].MinTTL(), log: c.ledger.Head().Log,
		may: func(anchor *x509.Certificate) error { return c.mayActivate(t.root(anchor)) }}
}

// certify has the root certify a key, whose name in its store is ref, and lets the issuing CA prove itself.
func (c candidacy) certify(ctx context.Context, root Root, ref string, key crypto.Signer, name string, lifetime time.Duration) (*authority, error) {
	now := c.now.UTC().Truncate(time.Second)
	request := CertifyRequest{PublicKey: key.Public(), TrustDomain: c.td.Name(), CommonName: name + now.Format(" 2006-01-02 15:04:05"),
		NotBefore: now.Add(-min(time.Hour, lifetime/10)), NotAfter: now.Add(lifetime)}
	var err error
	request.CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: request.CommonName}}, key)
	if err != nil {
		return nil, fmt.Errorf("signing the request for its certificate: %w", err)
	}
	chain, err := root.Certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("having it certified by the root: %w", err)
	}
	anchor, err := checkIssuing(chain, c.anchors, request, c.now)
	if err != nil {
		return nil, fmt.Errorf("what the root returned is not what it was asked for, and is not used: %w", err)
	}
	return c.prove(foundIssuing(c.td, chain, anchor, ref, ledger.Coverage{Kind: "complete"}), anchor, key)
}

// prove lets an issuing CA sign a throwaway leaf, if it may sign at all. Its record is the ledger's, or the one that is to enter it.
func (c candidacy) prove(record ledger.AuthorityRecord, anchor *x509.Certificate, key crypto.Signer) (*authority, error) {
	if err := c.may(anchor); err != nil {
		return nil, err
	}
	roots := map[ledger.Hash]*x509.Certificate{}
	for _, root := range c.anchors { // of a root that was renewed with its key the ledger may name the one before
		roots[AuthorityID(root)] = root
	}
	a, err := loadAuthority(record, roots)
	if err != nil {
		return nil, err
	}
	if a.notAfter.Sub(c.now) < c.shortest {
		return nil, fmt.Errorf("it would live only until %s, because something in its chain or its root ends then: too short for a certificate of %s. That must be renewed",
			a.notAfter.Format(time.RFC3339), c.shortest)
	}
	if err := a.use(key); err != nil {
		return nil, err
	}
	if err := proveAuthority(a, c.anchors, c.td, newSerial(c.log)); err != nil {
		return nil, fmt.Errorf("proving it with a throwaway leaf: %w", err)
	}
	return a, nil
}

// foundIssuing is the record of an issuing CA that is to enter the ledger. One that comes with its root has no ref.
func foundIssuing(td spiffeid.TrustDomain, chain []*x509.Certificate, anchor *x509.Certificate, ref string, coverage ledger.Coverage) ledger.AuthorityRecord {
	record := ledger.AuthorityRecord{ID: AuthorityID(chain[0]), TrustDomain: td.Name()}
	record.Founded = ledger.Founded{Kind: "x509", Role: ledger.RoleIssuing, Key: keyID(chain[0]), Certificate: chain[0].Raw, Root: AuthorityID(anchor), KeyRef: ref, Coverage: coverage}
	for _, link := range chain {
		record.Chain = append(record.Chain, link.Raw)
	}
	return record
}
