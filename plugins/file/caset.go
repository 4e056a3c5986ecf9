package file

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/pemfile"
)

// layout names the files of a CA that was made elsewhere.
type layout struct{ cert, key, chain, roots, crl string }

// The two layouts that istiod knows. As with istiod, the second one counts when its certificate is there.
var (
	istioLayout = layout{cert: "ca-cert.pem", key: "ca-key.pem", chain: "cert-chain.pem", roots: "root-cert.pem", crl: "ca-crl.pem"}
	tlsLayout   = layout{cert: "tls.crt", key: "tls.key", roots: "ca.crt"}
)

// caSet is a CA that was made elsewhere, once everything in it belongs together. What the time of day makes of it is another matter: see usable and remarks.
type caSet struct {
	layout layout
	chain  []*x509.Certificate // what signs leaves first, the root not included; empty when the CA is a root itself
	cert   *x509.Certificate   // of the CA
	key    crypto.Signer
	roots  []*x509.Certificate // the one that the CA is, or chains to, first
	crls   []*x509.RevocationList
	crlBad error // why the CRLs are of no use
}

// parseCASet makes a set of files, or says which file is wrong, and why. The files alone decide about that, and no moment.
func parseCASet(dir string, files contents, p passphrase, td spiffeid.TrustDomain) (*caSet, error) {
	s := &caSet{layout: istioLayout}
	if _, there := files[tlsLayout.cert]; there {
		s.layout = tlsLayout
	}
	certs, err := certificatesOf(files, s.layout.cert)
	if err != nil {
		return nil, err
	}
	if len(certs) == 0 {
		return nil, bad(istioLayout.cert, ca.Incomplete, "the set is incomplete: there is neither %s nor %s: mount the whole Secret there (%s, %s, %s and %s, or %s, %s and %s)", istioLayout.cert, tlsLayout.cert,
			istioLayout.cert, istioLayout.key, istioLayout.chain, istioLayout.roots, tlsLayout.cert, tlsLayout.key, tlsLayout.roots)
	}
	s.cert = certs[0]
	if err := checkAuthority(s.cert, td); err != nil {
		return nil, bad(s.layout.cert, ca.Unfit, "%s: %w", s.layout.cert, err)
	}
	if s.roots, err = certificatesOf(files, s.layout.roots); err != nil {
		return nil, err
	}
	for _, root := range s.roots {
		if err := checkTrustAnchor(root, td); err != nil {
			return nil, bad(s.layout.roots, ca.Unfit, "%s: the certificate %q: %w", s.layout.roots, root.Subject, err)
		}
	}
	links := certs[1:]
	if s.layout.chain != "" {
		if len(links) > 0 {
			return nil, bad(s.layout.cert, ca.Mismatched, "%s holds %d certificates: it is the CA's own and no other; what stands above it belongs into %s", s.layout.cert, len(certs), s.layout.chain)
		}
		if links, err = certificatesOf(files, s.layout.chain); err != nil {
			return nil, err
		}
	}
	if err := s.arrange(links); err != nil {
		return nil, err
	}
	if err := s.takeKey(dir, files, p); err != nil {
		return nil, err
	}
	s.crls, s.crlBad = parseCRLs(files, s)
	return s, nil
}

// certificatesOf reads one of the files. It may be missing.
func certificatesOf(files contents, name string) ([]*x509.Certificate, error) {
	certs, err := pemfile.Certificates(files[name])
	if err != nil {
		return nil, bad(name, ca.Unreadable, "%s: %w: write the Secret anew", name, err)
	}
	return distinct(certs), nil
}

// takeKey reads the key, and makes sure that it is the one that was certified.
func (s *caSet) takeKey(dir string, files contents, p passphrase) (err error) {
	text, there := files[s.layout.key]
	if !there {
		return bad(s.layout.key, ca.Incomplete, "the set is incomplete: %s is missing: put the private key of %s there", s.layout.key, s.layout.cert)
	}
	p.text = files[passphraseEntry]
	if s.key, err = decodeAnyKey(filepath.Join(dir, s.layout.key), text, p); err != nil {
		return bad(s.layout.key, ca.Unreadable, "%s: %w", s.layout.key, err)
	}
	if !ca.SameKey(s.key.Public(), s.cert.PublicKey) {
		return bad(s.layout.key, ca.Mismatched, "%s does not belong to %s: they are of two different CAs; put the two there that belong together", s.layout.key, s.layout.cert)
	}
	return nil
}

// arrange makes the chain, and puts the root that it leads to before the others. Every link must belong to it; the CA itself and roots may be among them, as istiod's chain
// files have them.
func (s *caSet) arrange(links []*x509.Certificate) error {
	above := slices.DeleteFunc(slices.Clone(links), func(c *x509.Certificate) bool { return c.Equal(s.cert) || contains(s.roots, c) })
	linksFile := s.layout.chain
	if linksFile == "" {
		linksFile = s.layout.cert
	}
	if selfSigned(s.cert) {
		return s.arrangeRoot(above, linksFile)
	}
	if len(s.roots) == 0 {
		return bad(s.layout.roots, ca.Incomplete, "the set is incomplete: %s is missing or empty: put the root certificates there that workloads trust", s.layout.roots)
	}
	if contains(s.roots, s.cert) {
		return bad(s.layout.roots, ca.Mismatched, "%s is in %s, too, and is not a root (%q issued it): take it out of %s", s.layout.cert, s.layout.roots, s.cert.Issuer, s.layout.roots)
	}
	s.chain = []*x509.Certificate{s.cert}
	for {
		last := s.chain[len(s.chain)-1]
		i := slices.IndexFunc(above, func(c *x509.Certificate) bool { return issued(c, last) })
		if i < 0 {
			break
		}
		s.chain, above = append(s.chain, above[i]), slices.Delete(above, i, i+1)
	}
	last := s.chain[len(s.chain)-1]
	anchor := -1
	for i, root := range s.roots {
		if issued(root, last) && (anchor < 0 || root.NotAfter.After(s.roots[anchor].NotAfter)) { // of a root that was renewed the later one
			anchor = i
		}
	}
	if anchor < 0 {
		return bad(s.layout.cert, ca.Mismatched, "%s does not lead to any root in %s: %q was issued by %q, which is neither there nor in %s (or whose signature or usage does not fit): put what is missing there",
			s.layout.cert, s.layout.roots, last.Subject, last.Issuer, linksFile)
	}
	if len(above) > 0 {
		return bad(linksFile, ca.Mismatched, "%s holds %q, which does not belong to the chain of %s: take it out", linksFile, above[0].Subject, s.layout.cert)
	}
	root := s.roots[anchor]
	s.roots = append([]*x509.Certificate{root}, slices.Delete(slices.Clone(s.roots), anchor, anchor+1)...)
	return s.checkChain(append(slices.Clone(s.chain), root))
}

// arrangeRoot is for a CA that is a root itself, such as the one that istiod makes for itself. istiod leaves the file of roots empty then.
func (s *caSet) arrangeRoot(above []*x509.Certificate, linksFile string) error {
	switch {
	case len(above) > 0:
		return bad(linksFile, ca.Mismatched, "%s holds %q, which does not belong there: %s is a root itself; take it out", linksFile, above[0].Subject, s.layout.cert)
	case len(s.roots) > 0 && !contains(s.roots, s.cert):
		return bad(s.layout.roots, ca.Mismatched, "%s is self-signed and not in %s: workloads do not trust it; put it there, or the CA that is meant into %s", s.layout.cert, s.layout.roots, s.layout.cert)
	case s.cert.MaxPathLen == 0 && s.cert.MaxPathLenZero:
		return bad(s.layout.cert, ca.Unfit, "%s is a root with the path length constraint 0, which allows no issuing CA below it: issue it with 1 or more, or without", s.layout.cert)
	}
	others := slices.DeleteFunc(slices.Clone(s.roots), s.cert.Equal)
	s.roots = append([]*x509.Certificate{s.cert}, others...)
	return nil
}

// checkChain makes sure of path lengths, and that nothing outlives what is above it (I3). path has the root last.
func (s *caSet) checkChain(path []*x509.Certificate) error {
	for below, cert := range path[1:] { // so many CAs are below it; leaves do not count (RFC 5280 4.2.1.9)
		if below++; cert.MaxPathLen >= 0 && (cert.MaxPathLen > 0 || cert.MaxPathLenZero) && below > cert.MaxPathLen {
			return bad(s.fileOf(cert), ca.Unfit, "%s: the certificate %q allows %d CAs below it (path length constraint), and there are %d down to %s: issue it with a larger one",
				s.fileOf(cert), cert.Subject, cert.MaxPathLen, below, s.layout.cert)
		}
		if child := path[below-1]; child.NotAfter.After(cert.NotAfter) {
			return bad(s.fileOf(child), ca.OutlivesIssuer, "%s: the certificate %q would outlive its issuer %q (%s is after %s): issue it with a shorter life, or renew its issuer",
				s.fileOf(child), child.Subject, cert.Subject, child.NotAfter.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339))
		}
	}
	return s.verify(path)
}

// verify has the chain judged as verifiers do, at its first moment: what else they may find wrong, such as a critical extension that nobody knows, or an extKeyUsage that leaves
// out one half of mTLS.
func (s *caSet) verify(path []*x509.Certificate) error {
	roots, intermediates, at := x509.NewCertPool(), x509.NewCertPool(), path[0].NotBefore
	for i, cert := range path[1:] {
		if cert.NotBefore.After(at) {
			at = cert.NotBefore
		}
		if i < len(path)-2 {
			intermediates.AddCert(cert)
		}
	}
	roots.AddCert(path[len(path)-1])
	for _, half := range []struct {
		of    string
		usage x509.ExtKeyUsage
	}{{"servers", x509.ExtKeyUsageServerAuth}, {"clients", x509.ExtKeyUsageClientAuth}} {
		if _, err := s.cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{half.usage}}); err != nil {
			return bad(s.layout.cert, ca.Unfit, "verifiers would refuse what %s signs for %s: %w: issue the CA without what is in the way", s.layout.cert, half.of, err)
		}
	}
	return nil
}

// usable says whether the set can be taken up now. Its other roots do not matter: see trusted.
func (s *caSet) usable(now time.Time) error {
	path := s.chain
	if len(path) == 0 {
		path = []*x509.Certificate{s.cert}
	} else {
		path = append(slices.Clone(path), s.roots[0])
	}
	for _, cert := range path {
		if err := inTime(s.fileOf(cert), cert, now); err != nil {
			return fmt.Errorf("%s: the certificate %q %w", s.fileOf(cert), cert.Subject, err)
		}
	}
	return nil
}

// trusted are the roots that verifiers can use now.
func (s *caSet) trusted(now time.Time) []*x509.Certificate { return validAt(s.roots, now) }

// remarks are what is wrong though the set can be used.
func (s *caSet) remarks(now time.Time) error {
	all := []error{leftOut(s.layout.roots, s.roots, now), s.crlBad}
	for _, crl := range s.crls {
		if !crl.NextUpdate.IsZero() && now.After(crl.NextUpdate) {
			all = append(all, bad(s.layout.crl, ca.Expired, "%s: the CRL of %q expired at %s: put a new one there", s.layout.crl, crl.Issuer, crl.NextUpdate.Format(time.RFC3339)))
		}
	}
	return errors.Join(all...)
}

// fileOf names the file in which a certificate of the chain is.
func (s *caSet) fileOf(cert *x509.Certificate) string {
	switch {
	case cert.Equal(s.cert) || s.layout.chain == "" && !contains(s.roots, cert):
		return s.layout.cert
	case contains(s.roots, cert):
		return s.layout.roots
	}
	return s.layout.chain
}

// parseCRLs reads the CRLs that come with the set. Nothing uses them yet, so a bad one does not stand in the way of the set. Envoy wants one for every CA of a chain, or none.
func parseCRLs(files contents, s *caSet) ([]*x509.RevocationList, error) {
	text := files[s.layout.crl]
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, nil
	}
	crls, err := decodeCRLs(text)
	if err != nil {
		return nil, bad(s.layout.crl, ca.Unreadable, "%s: %w: put the CRLs there as PEM", s.layout.crl, err)
	}
	path := append(slices.Clone(s.chain), s.roots...)
	has := map[string]bool{}
	for _, crl := range crls {
		i := slices.IndexFunc(path, func(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, crl.RawIssuer) })
		if i < 0 {
			return nil, bad(s.layout.crl, ca.Mismatched, "%s: the CRL of %q is of no CA in the set: take it out", s.layout.crl, crl.Issuer)
		}
		good := errors.New("no certificate")
		for _, c := range path { // a root that was renewed has its name twice
			if bytes.Equal(c.RawSubject, crl.RawIssuer) && good != nil {
				good = crl.CheckSignatureFrom(c)
			}
		}
		if good != nil {
			return nil, bad(s.layout.crl, ca.Mismatched, "%s: the CRL of %q is not good: %w (the CA's keyUsage must have cRLSign)", s.layout.crl, crl.Issuer, good)
		}
		has[string(crl.RawIssuer)] = true
	}
	for _, c := range append(slices.Clone(s.chain), s.roots[0]) {
		if !has[string(c.RawSubject)] {
			return nil, bad(s.layout.crl, ca.Incomplete, "%s: there is no CRL of %q: verifiers want one of every CA of a chain, or none at all", s.layout.crl, c.Subject)
		}
	}
	return crls, nil
}
