package pkcs11

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"kedge/ca"
	"kedge/hsm"
)

// RootOptions says which key on which token is a root's.
type RootOptions struct {
	Token           *hsm.Token
	CertificateFile string           // PEM: the key's certificate; when that is not a root itself, then what stands between it and the root, and the root last
	TrustDomain     string           // name without scheme
	AllowExportable bool             // see Acceptable
	Now             func() time.Time // default time.Now
}

// Root is a ca.Root whose key is in a token. It is found by the public key of its certificate, wherever on the token it is.
type Root struct {
	o       RootOptions
	cert    *x509.Certificate
	above   []*x509.Certificate // what is handed out after an issuing CA's certificate; empty when cert is the root
	anchors []*x509.Certificate
}

var (
	_ ca.Root     = (*Root)(nil)
	_ ca.Reporter = (*Root)(nil)
)

// OpenRoot reads the certificates. It asks the token for nothing: one that is away keeps nobody from starting.
func OpenRoot(o RootOptions) (*Root, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	certs, err := readCertificates(o.CertificateFile)
	if err != nil {
		return nil, fmt.Errorf("the certificate of the root in a token: %w", err)
	}
	last := certs[len(certs)-1]
	if last.CheckSignatureFrom(last) != nil {
		return nil, fmt.Errorf("the certificate of the root in a token: %s ends with %q, which is not self-signed: put the root last", o.CertificateFile, last.Subject)
	}
	for i, cert := range certs[:len(certs)-1] {
		if err := cert.CheckSignatureFrom(certs[i+1]); err != nil {
			return nil, fmt.Errorf("the certificate of the root in a token: %s has %q before %q, which did not sign it: %w", o.CertificateFile, cert.Subject, certs[i+1].Subject, err)
		}
	}
	r := &Root{o: o, cert: certs[0], anchors: certs[len(certs)-1:]}
	if len(certs) > 1 {
		r.above = certs[:len(certs)-1]
	}
	return r, nil
}

// Certify has the token sign the certificate of an issuing CA. Validity is cut to the root's own, and to that of everything above it.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	cert, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with the root in a token: %w", request.CommonName, err)
	}
	return append([]*x509.Certificate{cert}, r.above...), nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) (*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if request.TrustDomain != r.o.TrustDomain {
		return nil, fmt.Errorf("it is for the trust domain %.80q, and this root is for %s", request.TrustDomain, r.o.TrustDomain)
	}
	for _, cert := range append(slices.Clone(r.above), r.anchors...) {
		if request.NotAfter.After(cert.NotAfter) {
			request.NotAfter = cert.NotAfter
		}
	}
	signer, key, err := r.o.Token.Find(ctx, r.cert.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("the key of %q: %w", r.cert.Subject, err)
	}
	if err := Acceptable(key, r.o.AllowExportable); err != nil {
		return nil, err
	}
	return ca.SignIssuing(r.cert, signer, request, r.o.Now())
}

// Roots returns the trust anchor.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	return slices.Clone(r.anchors), nil
}

// Changed returns nil: the root stays what it is.
func (r *Root) Changed() <-chan struct{} { return nil }

// Problem says why the token cannot be used now.
func (r *Root) Problem() error { return r.o.Token.Problem() }

// maxFile is how many octets a file of certificates may have.
const maxFile = 1 << 20

func readCertificates(path string) (all []*x509.Certificate, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a file of at most %d octets", path, maxFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s has a PEM block %.40q: only certificates belong there", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		all = append(all, cert)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no certificate in PEM", path)
	}
	return all, nil
}

// Acceptable says whether a key may be an authority's by what its token says of it. One that can be exported, or that was once elsewhere, may have a copy: then the error says so, unless
// that is allowed. What a token does not say it is not asked for: NSS never says that a key was made on it, but that it was never extractable.
func Acceptable(k hsm.Key, allowExportable bool) error {
	if allowExportable {
		return nil
	}
	mend := "make one on the token ('kedge key create'), or set pkcs11.allowExportableKeys"
	switch {
	case k.Extractable == hsm.Yes:
		return fmt.Errorf("the token says that the %s can be exported (CKA_EXTRACTABLE): %s", k, mend)
	case k.Sensitive == hsm.No:
		return fmt.Errorf("the token says that the %s can be read (CKA_SENSITIVE is false): %s", k, mend)
	case k.NeverExtractable == hsm.No:
		return fmt.Errorf("the token says that the %s could once be exported, or came from elsewhere (CKA_NEVER_EXTRACTABLE is false): %s", k, mend)
	case k.Local == hsm.No && k.NeverExtractable != hsm.Yes:
		return fmt.Errorf("the token says that the %s was not made on it (CKA_LOCAL is false): %s", k, mend)
	}
	return nil
}

var errNoToken = errors.New("there is no token")
