package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Issuers are what is above an issuing CA: first the certificate whose key certifies it, last the self-signed root; often they are one. What every Root
// needs of them is here, wherever its key is: Certify is for a key that a crypto.Signer stands for; one that signs elsewhere is asked for what Fit returns, and
// Chain makes of its answer what is handed out.
type Issuers []*x509.Certificate

const (
	maxCommonName = 64 // characters (RFC 5280 A.1, ub-common-name)
	maxIssuers    = 10
)

// Climb finds the shortest way from a certificate over others to one that is self-signed. They may be in any order, and have strangers among them.
func Climb(cert *x509.Certificate, others []*x509.Certificate) (Issuers, error) {
	if len(others) > 2*maxIssuers {
		return nil, fmt.Errorf("there are more than %d certificates beside that of %s: no chain needs so many", 2*maxIssuers, cert.Subject)
	}
	ways := []Issuers{{cert}}
	for range maxIssuers {
		var longer []Issuers
		for _, way := range ways {
			last := way.Root()
			if signedBy(last, last) {
				return way, nil
			}
			for _, next := range others {
				if !slices.ContainsFunc(way, next.Equal) && signedBy(last, next) {
					longer = append(longer, append(slices.Clone(way), next))
				}
			}
		}
		ways = longer[:min(len(longer), 4*maxIssuers)] // cross-signing makes a few ways; a hostile answer gets no further
	}
	return nil, fmt.Errorf("the certificate of %s is not self-signed, and does not lead to a self-signed root among those beside it", cert.Subject)
}

// signedBy says whether a certificate names parent as its issuer, and parent's key signed it, and might.
func signedBy(cert, parent *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, parent.RawSubject) && cert.CheckSignatureFrom(parent) == nil
}

// Root is the trust anchor.
func (i Issuers) Root() *x509.Certificate { return i[len(i)-1] }

// Chain is what is handed out with leaves: the new certificate of an issuing CA, and what stands between it and the root.
func (i Issuers) Chain(cert *x509.Certificate) []*x509.Certificate {
	return append([]*x509.Certificate{cert}, i[:len(i)-1]...)
}

// Check makes sure that an issuing CA may stand below them now (RFC 5280 4.2.1.3, 4.2.1.9).
func (i Issuers) Check(now time.Time) error {
	for depth, cert := range i {
		var wrong string
		switch {
		case !cert.BasicConstraintsValid || !cert.IsCA:
			wrong = "is not a CA certificate (basicConstraints cA is not true): configure a CA as the root"
		case cert.KeyUsage&x509.KeyUsageCertSign == 0:
			wrong = "may not sign certificates (its keyUsage lacks keyCertSign): issue it with that"
		case cert.MaxPathLen >= 0 && (cert.MaxPathLen > 0 || cert.MaxPathLenZero) && cert.MaxPathLen < depth+1:
			wrong = fmt.Sprintf("has the path length constraint %d, which does not allow an issuing CA %d below it: issue it with more, or configure another root", cert.MaxPathLen, depth+1)
		case now.After(cert.NotAfter):
			wrong = fmt.Sprintf("expired at %s: renew it, or prepare a new root", cert.NotAfter.Format(time.RFC3339))
		case now.Before(cert.NotBefore):
			wrong = fmt.Sprintf("is valid only from %s on, and this machine's clock says %s: set the clock", cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		default:
			continue
		}
		return fmt.Errorf("the certificate of %s %s", cert.Subject, wrong)
	}
	return nil
}

// validity is the time in which all of them are valid.
func (i Issuers) validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = i[0].NotBefore, i[0].NotAfter
	for _, cert := range i[1:] {
		notBefore, notAfter = later(notBefore, cert.NotBefore), earlier(notAfter, cert.NotAfter)
	}
	return notBefore, notAfter
}

// Fit makes sure that a request is one for an issuing CA below them, and cuts its validity to their own, in whole seconds.
func (i Issuers) Fit(request CertifyRequest, now time.Time) (CertifyRequest, error) {
	td, err := spiffeid.TrustDomainFromString(request.TrustDomain)
	if err != nil {
		return request, fmt.Errorf("its trust domain %.80q: %w", request.TrustDomain, err)
	}
	if n := utf8.RuneCountInString(request.CommonName); n == 0 || n > maxCommonName {
		return request, fmt.Errorf("its common name has %d characters, and not 1 to %d (RFC 5280 A.1)", n, maxCommonName)
	}
	if err := CheckAuthorityKey(request.PublicKey); err != nil {
		return request, fmt.Errorf("its public key: %w", err)
	}
	if request.CSR != nil {
		csr, err := x509.ParseCertificateRequest(request.CSR)
		if err != nil {
			return request, fmt.Errorf("its CSR: %w", err)
		}
		if !SameKey(csr.PublicKey, request.PublicKey) {
			return request, errors.New("its CSR is for another public key")
		}
	}
	if err := i.Check(now); err != nil {
		return request, err
	}
	for _, cert := range i {
		if err := checkCAID(cert, td); err != nil {
			return request, fmt.Errorf("the certificate of %s is not for it: %w", cert.Subject, err)
		}
		if cert.Subject.CommonName == request.CommonName {
			return request, fmt.Errorf("it has the own name of %s, which is above it, and verifiers would take it for self-issued (RFC 5280 4.2.1.1): give it another", cert.Subject)
		}
	}
	first, last := i.validity()
	fitting := request
	fitting.NotBefore, fitting.NotAfter = later(request.NotBefore.UTC(), first), earlier(request.NotAfter.UTC().Truncate(time.Second), last)
	if !fitting.NotBefore.Before(fitting.NotAfter) {
		return request, fmt.Errorf("no time is left between %s and %s (what is above it is valid from %s to %s)", request.NotBefore.UTC().Format(time.RFC3339),
			request.NotAfter.UTC().Format(time.RFC3339), first.Format(time.RFC3339), last.Format(time.RFC3339))
	}
	return fitting, nil
}

// Certify has the key of the first of them sign the certificate of an issuing CA, and returns the chain. The signature is verified before it is returned.
func (i Issuers) Certify(key crypto.Signer, request CertifyRequest, now time.Time) ([]*x509.Certificate, error) {
	request, err := i.Fit(request, now)
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(request.TrustDomain)
	if err != nil {
		return nil, err
	}
	template, err := authorityTemplate(request.PublicKey, td)
	if err != nil {
		return nil, err
	}
	template.Subject.CommonName = request.CommonName
	template.MaxPathLenZero = true
	template.NotBefore, template.NotAfter = request.NotBefore, request.NotAfter
	cert, err := signAuthority(template, i[0], request.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return i.Chain(cert), nil
}

// checkIssuing makes sure of everything about the certificate of an issuing CA that a Root returned, before anything is signed with its key: which key,
// what for, whose, how long, under which root, which it returns.
func checkIssuing(chain []*x509.Certificate, roots []*x509.Certificate, request CertifyRequest, now time.Time) (*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("there is no certificate")
	}
	cert, id := chain[0], "spiffe://"+request.TrustDomain
	if err := isKeyOf(request.PublicKey, cert); err != nil {
		return nil, fmt.Errorf("it is for another public key: %w", err)
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return nil, errors.New("it is not a CA's (basicConstraints cA is not true)")
	case cert.MaxPathLen != 0 || !cert.MaxPathLenZero:
		return nil, errors.New("it lacks the path length constraint 0, and could make further CAs (RFC 5280 4.2.1.9)")
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		return nil, fmt.Errorf("its keyUsage is %#x instead of keyCertSign and cRLSign", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0:
		return nil, errors.New("its extKeyUsage would limit what leaves may be for")
	case len(cert.UnhandledCriticalExtensions) != 0:
		return nil, fmt.Errorf("it has the critical extensions %v, which verifiers need not know", cert.UnhandledCriticalExtensions)
	case len(cert.URIs) != 1 || cert.URIs[0].String() != id:
		return nil, fmt.Errorf("its URI SANs are %v instead of %s alone (X509-SVID 3.1)", cert.URIs, id)
	case len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0:
		return nil, errors.New("it has further names")
	case constrained(cert):
		return nil, errors.New("it has name constraints, which nobody asked for")
	case cert.Subject.CommonName != request.CommonName:
		return nil, fmt.Errorf("its common name is %.80q instead of %.80q", cert.Subject.CommonName, request.CommonName)
	case len(cert.SubjectKeyId) == 0:
		return nil, errors.New("it has no subject key identifier (RFC 5280 4.2.1.2)")
	case cert.SerialNumber.Sign() <= 0 || cert.SerialNumber.BitLen() < 64:
		return nil, errors.New("its serial number is not positive, or too short (RFC 5280 4.1.2.2)")
	case cert.NotAfter.After(request.NotAfter):
		return nil, fmt.Errorf("it is valid until %s, longer than the %s that were asked for", cert.NotAfter.Format(time.RFC3339), request.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fmt.Errorf("it is valid from %s to %s, and this machine's clock says %s: this clock or the root's is wrong, set it",
			cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	anchor, err := checkPath(chain, roots, now)
	if err != nil {
		return nil, err
	}
	issuers := append(slices.Clone(chain[1:]), anchor)
	for _, above := range issuers {
		switch {
		case cert.NotBefore.Before(above.NotBefore):
			return nil, fmt.Errorf("it is valid from %s on, before %s above it is (%s): the root's clock is behind, set it",
				cert.NotBefore.Format(time.RFC3339), above.Subject, above.NotBefore.Format(time.RFC3339))
		case bytes.Equal(cert.RawSubject, above.RawSubject):
			return nil, errors.New("it has the name of one of its issuers, and verifiers would take it for self-issued (RFC 5280 4.2.1.1)")
		}
	}
	if by := issuers[0]; !bytes.Equal(cert.AuthorityKeyId, by.SubjectKeyId) && len(by.SubjectKeyId) > 0 {
		return nil, fmt.Errorf("its authority key identifier is not the one of %s (RFC 5280 4.2.1.1)", by.Subject)
	}
	return anchor, nil
}

func constrained(cert *x509.Certificate) bool {
	return cert.PermittedDNSDomainsCritical || len(cert.PermittedDNSDomains)+len(cert.ExcludedDNSDomains)+len(cert.PermittedURIDomains)+len(cert.ExcludedURIDomains)+
		len(cert.PermittedIPRanges)+len(cert.ExcludedIPRanges)+len(cert.PermittedEmailAddresses)+len(cert.ExcludedEmailAddresses) != 0
}
