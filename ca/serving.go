package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"time"

	"kedge/ca/ledger"
)

// IssueServing makes a certificate for this CA's own TLS servers: DNS names and IPs, serverAuth only, no SPIFFE ID, so that it
// authenticates nobody as a workload. It is recorded like every other.
func (c *CA) IssueServing(ctx context.Context, pub crypto.PublicKey, names []string, ttl time.Duration) (*Issued, error) {
	t, now := c.trust.Load(), c.now().UTC().Truncate(time.Second)
	a, _, err := t.signer(now, time.Second)
	if err != nil {
		return nil, err
	}
	serial := newSerial(c.ledger.Head().Log)
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), NotBefore: now.Add(-min(time.Minute, ttl/10).Truncate(time.Second)), NotAfter: earlier(now.Add(ttl), a.notAfter),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	if template.NotBefore.Before(a.cert.NotBefore) {
		template.NotBefore = a.cert.NotBefore
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
	if err != nil {
		return nil, Unavailable(fmt.Errorf("signing the serving certificate: %w", err))
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("the serving certificate's key: %w", err)
	}
	s := &Signed{prepared: &Prepared{trust: t, authority: a}, serial: serial, der: der, notBefore: template.NotBefore, notAfter: template.NotAfter}
	event := s.event(ledger.DeliverySelf, "")
	event.Names, event.Key = names, sha256.Sum256(spki)
	event.Proofs = []ledger.Proof{{Method: "self", Time: ledger.At(now)}}
	event.Holder = ledger.Holder{Kind: "self", ID: c.ledger.Head().Log.String()}
	first, err := c.appendIssue(ctx, event, nil, t)
	if err != nil {
		return nil, err
	}
	return s.issued(first), nil
}
