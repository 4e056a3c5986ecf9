package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// ClientCertificates decides whether a certificate that a caller presents proves who it is. Only issuing CAs are anchors, our
// own and those on a list: were it a root, anybody else's CA under the same root could mint callers.
//
// Its methods may be called at once from several goroutines.
type ClientCertificates struct {
	td      spiffeid.TrustDomain
	ledger  *ledger.Ledger
	now     func() time.Time
	issuers atomic.Pointer[[]clientIssuer]
}

// clientIssuer is a CA certificate whose leaves may be callers.
type clientIssuer struct {
	id      ledger.Hash
	cert    *x509.Certificate
	own     bool
	tainted bool
}

// ClientCertificate is what a good certificate proves.
type ClientCertificate struct {
	ID     spiffeid.ID
	Proof  ledger.Proof
	First  *ledger.Proof // where its lineage began; nil when the ledger does not know
	Holder ledger.Holder // who holds it, and will hold its successor
	Number uint64        // of its Issue event; 0: the ledger has none
	Serial ledger.Serial
	Own    bool // this CA issued it
}

// NewClientCertificates makes a verifier that knows no issuing CA yet.
func NewClientCertificates(td spiffeid.TrustDomain, book *ledger.Ledger, now func() time.Time) *ClientCertificates {
	c := &ClientCertificates{td: td, ledger: book, now: now}
	c.issuers.Store(&[]clientIssuer{})
	return c
}

// setAuthorities replaces the issuing CAs that count: own ones that are not removed, and others'.
func (c *ClientCertificates) setAuthorities(own []*authority, others []*x509.Certificate) {
	var all []clientIssuer
	for _, a := range own {
		all = append(all, clientIssuer{id: a.record.ID, cert: a.cert, own: true, tainted: a.record.Tainted})
	}
	for _, cert := range others {
		all = append(all, clientIssuer{id: AuthorityID(cert), cert: cert})
	}
	c.issuers.Store(&all)
}

// issuedBackdate is about how far before its signing a certificate's notBefore lies: a hint for the search in the ledger.
const issuedBackdate = time.Minute

// Verify judges the certificate at this moment; errors are ErrUnauthenticated, or ErrUnavailable when the ledger cannot be read. Only the leaf
// counts: what a caller sends along is not looked at.
func (c *ClientCertificates) Verify(ctx context.Context, chain []*x509.Certificate) (ClientCertificate, error) {
	if len(chain) == 0 {
		return ClientCertificate{}, Unauthenticated(errors.New("no client certificate"))
	}
	leaf := chain[0]
	id, err := c.checkForm(leaf)
	if err != nil {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %x: %w", leaf.SerialNumber, err))
	}
	issuer, err := c.findIssuer(leaf)
	if err != nil {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %x of %s: %w", leaf.SerialNumber, id, err))
	}
	serial := ledger.Serial(leaf.SerialNumber.Bytes())
	proven := ClientCertificate{
		ID: id, Serial: serial, Own: issuer.own,
		Proof:  ledger.Proof{Method: MethodClientCertificate, Issuer: issuer.id.String(), Subject: serial.String(), Time: ledger.At(c.now())},
		Holder: ledger.Holder{Kind: "lineage", ID: serial.String()},
	}
	if !issuer.own {
		return proven, nil
	}
	revoked, err := c.ledger.Revoked(serial)
	if err != nil {
		return ClientCertificate{}, Unavailable(fmt.Errorf("looking for a revocation of client certificate %s: %w", serial, err))
	}
	if revoked {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %s of %s is revoked", serial, id))
	}
	return c.lineage(ctx, leaf, proven)
}

// lineage adds what the ledger knows of a certificate that one of our issuing CAs signed.
func (c *ClientCertificates) lineage(ctx context.Context, leaf *x509.Certificate, proven ClientCertificate) (ClientCertificate, error) {
	lifetime := leaf.NotAfter.Sub(leaf.NotBefore)
	event, err := c.ledger.FindIssue(ctx, proven.Serial, leaf.NotBefore.Add(min(issuedBackdate, lifetime/11)))
	if errors.Is(err, ledger.ErrNotFound) {
		return proven, nil // pruned, or of a log that this one replaced
	}
	if err != nil {
		return ClientCertificate{}, Unavailable(fmt.Errorf("looking client certificate %s up in the ledger: %w", proven.Serial, err))
	}
	issue := event.Body.(*ledger.Issue)
	if issue.Certificate != ledger.Hash(sha256.Sum256(leaf.Raw)) {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %s is not the one that number %d in the ledger records under this serial: "+
			"somebody else signs with the key of an issuing CA", proven.Serial, event.Number))
	}
	proven.Number, proven.Holder, proven.First = event.Number, issue.Holder, issue.FirstProof
	if proven.First == nil && len(issue.Proofs) > 0 {
		proven.First = &issue.Proofs[0]
	}
	return proven, nil
}

// checkForm makes the checks of X509-SVID 5.2 and 4 on a leaf, and of the trust domain and the time.
func (c *ClientCertificates) checkForm(leaf *x509.Certificate) (spiffeid.ID, error) {
	now := c.now()
	switch {
	case now.Before(leaf.NotBefore):
		return spiffeid.ID{}, fmt.Errorf("it is valid only from %s on", leaf.NotBefore.Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return spiffeid.ID{}, fmt.Errorf("it expired at %s", leaf.NotAfter.Format(time.RFC3339))
	case leaf.IsCA:
		return spiffeid.ID{}, errors.New("it is a CA certificate")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, errors.New("its keyUsage is not a leaf's")
	case len(leaf.UnhandledCriticalExtensions) > 0:
		return spiffeid.ID{}, fmt.Errorf("it has the unknown critical extension %s", leaf.UnhandledCriticalExtensions[0])
	case len(leaf.URIs) != 1:
		return spiffeid.ID{}, fmt.Errorf("it has %d URI SANs, and an SVID has exactly one", len(leaf.URIs))
	}
	var clientAuth bool
	for _, usage := range leaf.ExtKeyUsage {
		clientAuth = clientAuth || usage == x509.ExtKeyUsageClientAuth
	}
	if !clientAuth {
		return spiffeid.ID{}, errors.New("its extKeyUsage lacks clientAuth")
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("its URI SAN is not a SPIFFE ID: %w", err)
	}
	if !id.MemberOf(c.td) || id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("its SPIFFE ID %s is not a workload's of the trust domain %s", id, c.td)
	}
	return id, nil
}

// findIssuer finds the issuing CA that signed the leaf itself. When its key is also a tainted authority's the leaf is refused: nobody can tell
// under which certificate it was made.
func (c *ClientCertificates) findIssuer(leaf *x509.Certificate) (*clientIssuer, error) {
	now := c.now()
	issuers := *c.issuers.Load()
	var found *clientIssuer
	why := errors.New("none of the issuing CAs that count signed it")
	for i := range issuers {
		issuer := &issuers[i]
		if !bytes.Equal(issuer.cert.RawSubject, leaf.RawIssuer) && !sharesKey(issuers, issuer) {
			continue
		}
		if leaf.CheckSignatureFrom(issuer.cert) != nil {
			continue
		}
		switch {
		case issuer.tainted:
			return nil, fmt.Errorf("its issuing CA %s is tainted", issuer.id)
		case !bytes.Equal(issuer.cert.RawSubject, leaf.RawIssuer):
		case now.After(issuer.cert.NotAfter) || now.Before(issuer.cert.NotBefore):
			why = fmt.Errorf("its issuing CA %s is not valid now", issuer.id)
		default:
			found = issuer
		}
	}
	if found == nil {
		return nil, why
	}
	return found, nil
}

// sharesKey says whether another issuer has the same key: then a signature must be tried against each.
func sharesKey(issuers []clientIssuer, issuer *clientIssuer) bool {
	for i := range issuers {
		if &issuers[i] != issuer && bytes.Equal(issuers[i].cert.RawSubjectPublicKeyInfo, issuer.cert.RawSubjectPublicKeyInfo) {
			return true
		}
	}
	return false
}
