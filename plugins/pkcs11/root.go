package pkcs11

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
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
	AllowExportable bool             // see Acceptable
	Now             func() time.Time // default time.Now
}

// Root is a ca.Root whose key is in a token. It is found by the public key of its certificate, wherever on the token it is.
type Root struct {
	o       RootOptions
	changed chan struct{} // holds one element after the certificates came late

	mu      sync.Mutex
	issuers ca.Issuers // of the key in the token, and above; nil until the file was good
	problem error      // of the file when it was read last
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
func (r *Root) certificates() (ca.Issuers, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.issuers != nil {
		return r.issuers, nil
	}
	issuers, err := readIssuers(r.o.CertificateFile)
	late := r.problem != nil
	if r.problem = err; err != nil {
		mend := "correct the file"
		if errors.Is(err, fs.ErrNotExist) {
			mend = "put the file there that 'kedge ceremony' wrote"
		}
		r.problem = fmt.Errorf("the certificate of the root in a token: %w: %s; it is read again by itself", err, mend)
		return nil, r.problem
	}
	if r.issuers = issuers; late {
		r.changed <- struct{}{} // the only time
	}
	return issuers, nil
}

func readIssuers(path string) (ca.Issuers, error) {
	certs, err := pemfile.ReadCertificates(path)
	if err != nil {
		return nil, err
	}
	issuers, err := ca.Climb(certs[0], certs[1:])
	if err == nil && len(issuers) != len(certs) {
		err = fmt.Errorf("it has %d certificates, and from the first, of %s, to its root there are %d: take the others out", len(certs), certs[0].Subject, len(issuers))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return issuers, nil
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
	issuers, err := r.certificates()
	if err != nil {
		return nil, err
	}
	signer, key, err := r.o.Token.Find(ctx, issuers[0].PublicKey)
	if err != nil {
		return nil, fmt.Errorf("the key of %q: %w", issuers[0].Subject, err)
	}
	if err := Acceptable(key, r.o.AllowExportable); err != nil {
		return nil, err
	}
	return issuers.Certify(signer, request, r.o.Now())
}

// Roots returns the trust anchor.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	issuers, err := r.certificates()
	if err != nil {
		return nil, err
	}
	return []*x509.Certificate{issuers.Root()}, nil
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
