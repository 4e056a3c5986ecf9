package file

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
)

// RootOptions says where a root is kept, and what it is like if it has to be made.
type RootOptions struct {
	Dir            string           // made if need be, mode 0700; one process at a time
	TrustDomain    string           // name without scheme
	KeySpec        ca.KeySpec       // of a new root's key; default P-256
	Lifetime       time.Duration    // of a new root; default 10 years of 365 days
	PassphraseFile string           // one line; encrypts the key. Empty: it is written in clear
	Now            func() time.Time // default time.Now
	Logger         *slog.Logger     // default: nothing is logged
}

// Root is a ca.Root whose key and certificate are files. Its key is in memory only while OpenRoot compares it with the
// certificate and while Certify signs.
type Root struct {
	dir         string
	trustDomain spiffeid.TrustDomain
	passphrase  passphrase
	now         func() time.Time
	cert        *x509.Certificate
	keyName     string // the key's file, for as long as it is a new one
	created     bool
}

var _ ca.PortableRoot = (*Root)(nil)

// OpenRoot reads the root from its folder, or makes one when there never was any. It returns only once all of it is on disk.
func OpenRoot(o RootOptions) (*Root, error) {
	r := &Root{dir: o.Dir, passphrase: passphrase{path: o.PassphraseFile}, now: o.Now}
	if r.now == nil {
		r.now = time.Now
	}
	if o.Dir == "" {
		return nil, errors.New("the root has no folder: name one")
	}
	var err error
	if r.trustDomain, err = spiffeid.TrustDomainFromString(o.TrustDomain); err != nil {
		return nil, fmt.Errorf("the trust domain %q of the root in %s: %w", o.TrustDomain, o.Dir, err)
	}
	if err := prepareFolder(o.Dir); err != nil {
		return nil, err
	}
	state, err := r.look()
	if err != nil {
		return nil, err
	}
	r.created = state.newKey || !state.certificate
	r.keyName = keyFile
	if r.created {
		r.keyName = newKeyFile
	}
	if state.certificate {
		err = r.load()
	} else if err = r.create(o); err != nil {
		err = fmt.Errorf("making a root in %s: %w", o.Dir, err)
	}
	if err != nil {
		return nil, err
	}
	if !state.certificate && o.Logger != nil {
		o.Logger.Info("made a root certificate", "file", r.path(certificateFile), "subject", r.cert.Subject.String(),
			"sha256", fmt.Sprintf("%x", sha256.Sum256(r.cert.Raw)), "not_after", r.cert.NotAfter, "key_encrypted", o.PassphraseFile != "")
	}
	return r, nil
}

// Created says whether this root was made here and no ledger had it yet for certain when it was opened: whoever records it now knows every
// certificate that will ever be under it.
func (r *Root) Created() bool { return r.created }

// CertificateFile is the path of the root certificate in PEM: what clients of a new CA are given to trust.
func (r *Root) CertificateFile() string { return r.path(certificateFile) }

func (r *Root) path(name string) string { return filepath.Join(r.dir, name) }

// Certify reads the root's key, signs the certificate of an issuing CA with it, and drops it. Validity is cut to the root's own.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	chain, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with the root in %s: %w", request.CommonName, r.dir, err)
	}
	return chain, nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	key, err := r.key()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil { // an encrypted key takes a while to open
		return nil, err
	}
	return ca.Issuers{r.cert}.Certify(key, request, r.now())
}

// Roots returns the one root.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	return []*x509.Certificate{r.cert}, nil
}

// Changed returns nil: the root stays what it is.
func (r *Root) Changed() <-chan struct{} { return nil }
