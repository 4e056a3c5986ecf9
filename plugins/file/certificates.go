package file

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
)

// What is asked of certificates that come from elsewhere. ca asks the same again of everything that a Root returns; here it is said which file is wrong.

// checkAuthority makes sure that a certificate may sign others (RFC 5280 4.2.1.3, 4.2.1.9), and is of this trust domain or of none (X509-SVID 3.1).
func checkAuthority(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("it is not a CA certificate (basicConstraints cA is not true): put a CA's there")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("it may not sign certificates (its keyUsage lacks keyCertSign): a CA needs that")
	case len(cert.URIs) > 1 || len(cert.URIs) == 1 && cert.URIs[0].String() != td.IDString():
		return fmt.Errorf("it is for %s, and the configured trust domain is %s: configure the CA's trust domain, or put another CA there", cert.URIs, td)
	}
	if err := ca.CheckAuthorityKey(cert.PublicKey); err != nil {
		return fmt.Errorf("its public key: %w", err)
	}
	return nil
}

// checkTrustAnchor makes sure that verifiers can use a certificate as a root.
func checkTrustAnchor(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	if err := checkAuthority(cert, td); err != nil {
		return err
	}
	if cert.MaxPathLen == 0 && cert.MaxPathLenZero {
		return errors.New("its path length constraint of 0 allows no issuing CA below it: a root needs 1 or more, or none")
	}
	return nil
}

// bad is an error that says which file is no good, and why in a word.
func bad(file string, why ca.Reason, format string, args ...any) error {
	return &ca.FileError{File: filepath.Base(file), Reason: why, Err: fmt.Errorf(format, args...)}
}

// inTime says whether a certificate in a file is valid now. Its text stays the same for as long as it is not.
func inTime(file string, cert *x509.Certificate, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return bad(file, ca.Expired, "expired at %s: put a new one there", cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return bad(file, ca.NotYetValid, "is valid only from %s on: wait until then, or set this machine's clock if it is wrong", cert.NotBefore.Format(time.RFC3339))
	}
	return nil
}

// validAt are those that are valid now, in their order.
func validAt(certs []*x509.Certificate, now time.Time) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(certs), func(cert *x509.Certificate) bool { return inTime("", cert, now) != nil })
}

// leftOut says which of the trust anchors in a file are not valid now. They are no use to a verifier, and no reason to give up the others.
func leftOut(file string, certs []*x509.Certificate, now time.Time) error {
	var all []error
	for _, cert := range certs {
		if err := inTime(file, cert, now); err != nil {
			all = append(all, fmt.Errorf("%s: the certificate %q is left out of the trust bundle: it %w", file, cert.Subject, err))
		}
	}
	return errors.Join(all...)
}

// issued says whether parent's key signed child, and might.
func issued(parent, child *x509.Certificate) bool {
	return bytes.Equal(child.RawIssuer, parent.RawSubject) && child.CheckSignatureFrom(parent) == nil
}

// selfSigned says whether a certificate's own key signed it.
func selfSigned(cert *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil
}

func contains(certs []*x509.Certificate, cert *x509.Certificate) bool {
	return slices.ContainsFunc(certs, cert.Equal)
}

// distinct leaves out what is there a second time.
func distinct(certs []*x509.Certificate) (once []*x509.Certificate) {
	for _, cert := range certs {
		if !contains(once, cert) {
			once = append(once, cert)
		}
	}
	return once
}
