package pkcs11

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"kedge/ca"
	"kedge/ca/pemfile"
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
	changed chan struct{} // holds one element after the certificates came late

	mu      sync.Mutex
	chain   *rootChain // nil until the file was good
	problem error      // of the file when it was read last
}

// rootChain is what the file of the certificates has.
type rootChain struct {
	cert    *x509.Certificate   // of the key in the token
	above   []*x509.Certificate // what is handed out after an issuing CA's certificate; empty when cert is the root
	anchors []*x509.Certificate // the root
}

var (
	_ ca.Root     = (*Root)(nil)
	_ ca.Reporter = (*Root)(nil)
)

// OpenRoot reads the certificates. A file that is not there or bad is no error: Roots says what is wrong with it, and reads it again until it is good. The token is asked for nothing: one
// that is away keeps nobody from starting.
func OpenRoot(o RootOptions) (*Root, error) {
	if o.Token == nil {
		return nil, errNoToken
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	r := &Root{o: o, changed: make(chan struct{}, 1)}
	_, _ = r.certificates() // what is wrong is a problem from now on
	return r, nil
}

// certificates are those of the file when it was good first.
func (r *Root) certificates() (*rootChain, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.chain != nil {
		return r.chain, nil
	}
	chain, err := readRoot(r.o.CertificateFile)
	late := r.problem != nil
	if r.problem = err; err != nil {
		mend := "correct the file"
		if errors.Is(err, fs.ErrNotExist) {
			mend = "put the file there that 'kedge ceremony' wrote"
		}
		r.problem = fmt.Errorf("the certificate of the root in a token: %w: %s; it is read again by itself", err, mend)
		return nil, r.problem
	}
	if r.chain = chain; late {
		r.changed <- struct{}{} // the only time
	}
	return chain, nil
}

func readRoot(path string) (*rootChain, error) {
	certs, err := pemfile.ReadCertificates(path)
	if err != nil {
		return nil, err
	}
	last := certs[len(certs)-1]
	if last.CheckSignatureFrom(last) != nil {
		return nil, fmt.Errorf("%s ends with %q, which is not self-signed: put the root last", path, last.Subject)
	}
	for i, cert := range certs[:len(certs)-1] {
		if err := cert.CheckSignatureFrom(certs[i+1]); err != nil {
			return nil, fmt.Errorf("%s has %q before %q, which did not sign it: %w", path, cert.Subject, certs[i+1].Subject, err)
		}
	}
	chain := &rootChain{cert: certs[0], anchors: certs[len(certs)-1:]}
	if len(certs) > 1 {
		chain.above = certs[:len(certs)-1]
	}
	return chain, nil
}

// Certify has the token sign the certificate of an issuing CA. Validity is cut to the root's own, and to that of everything above it.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	chain, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with the root in a token: %w", request.CommonName, err)
	}
	return chain, nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if request.TrustDomain != r.o.TrustDomain {
		return nil, fmt.Errorf("it is for the trust domain %.80q, and this root is for %s", request.TrustDomain, r.o.TrustDomain)
	}
	chain, err := r.certificates()
	if err != nil {
		return nil, err
	}
	for _, cert := range slices.Concat(chain.above, chain.anchors) {
		if request.NotAfter.After(cert.NotAfter) {
			request.NotAfter = cert.NotAfter
		}
	}
	signer, key, err := r.o.Token.Find(ctx, chain.cert.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("the key of %q: %w", chain.cert.Subject, err)
	}
	if err := Acceptable(key, r.o.AllowExportable); err != nil {
		return nil, err
	}
	cert, err := ca.SignIssuing(chain.cert, signer, request, r.o.Now())
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{cert}, chain.above...), nil
}

// Roots returns the trust anchor.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	chain, err := r.certificates()
	if err != nil {
		return nil, err
	}
	return slices.Clone(chain.anchors), nil
}

// Changed receives once when the certificates were not there at first and are now: after that the root stays what it is.
func (r *Root) Changed() <-chan struct{} { return r.changed }

// Problem says what is wrong with the file, or why the token cannot be used now.
func (r *Root) Problem() error {
	r.mu.Lock()
	problem := r.problem
	r.mu.Unlock()
	if problem != nil {
		return problem
	}
	return r.o.Token.Problem()
}

// Acceptable says whether a key may be an authority's by what its token says of it. One that can be exported, or that was once elsewhere, may have a copy: then the error says so, unless
// that is allowed. What a token does not say it is not asked for: NSS never says that a key was made on it, but that it was never extractable.
func Acceptable(k hsm.Key, allowExportable bool) error {
	if k.AlwaysAuthenticate == hsm.Yes {
		return fmt.Errorf("the token wants the PIN for each signature of the %s (CKA_ALWAYS_AUTHENTICATE): make one that does not ('kedge key create')", k)
	}
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
