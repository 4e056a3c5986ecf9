package vault

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"sync"
	"time"

	"kedge/ca"
)

const defaultIssuer = "default"

// RootOptions say which issuer certifies.
type RootOptions struct {
	Client       *Client
	Mount        string           // of the PKI engine; default "pki"
	Issuer       string           // its name or id in the mount; default "default", which is whichever the mount has made its default
	PollInterval time.Duration    // how often the mount is asked for its roots, a tenth more or less; default 1 min
	Now          func() time.Time // default time.Now
	Logger       *slog.Logger     // default: nothing is logged
}

// Root is a ca.Root over an issuer of a PKI engine. The root is the self-signed certificate at the end of the issuer's chain; when the issuer is an
// intermediate, it and what stands above it are part of every chain that is handed out.
type Root struct {
	o     RootOptions
	watch *watch

	mu   sync.Mutex
	seen *x509.Certificate // the root that the watch compares with
}

var (
	_ ca.Root = (*Root)(nil)

	issuerName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$`)
)

// OpenRoot checks the options and begins to watch the mount's roots. It asks Vault nothing: see Check. Close ends the watch.
func OpenRoot(o RootOptions) (*Root, error) {
	if o.Client == nil {
		return nil, errors.New("the root in Vault has no login: open a Client first")
	}
	var err error
	if o.Mount, err = checkMount("the PKI engine", o.Mount, "pki"); err != nil {
		return nil, err
	}
	if o.Issuer == "" {
		o.Issuer = defaultIssuer
	}
	if !issuerName.MatchString(o.Issuer) {
		return nil, fmt.Errorf("the issuer %.80q is no name or id of one: 'vault list -detailed %s/issuers' shows them", o.Issuer, o.Mount)
	}
	r := &Root{o: o}
	if r.o.Now == nil {
		r.o.Now = time.Now
	}
	if r.o.Logger == nil {
		r.o.Logger = slog.New(slog.DiscardHandler)
	}
	if r.watch, err = startWatch(o.PollInterval, r.look); err != nil {
		return nil, fmt.Errorf("the root in Vault: %w", err)
	}
	return r, nil
}

// Close ends the watch.
func (r *Root) Close() error { return r.watch.close() }

// Changed receives after the mount's roots have changed.
func (r *Root) Changed() <-chan struct{} { return r.watch.changed }

// Problem says why the roots could not be read when they were last looked at, or else what is wrong with the login, and what to do; nil when all is well.
func (r *Root) Problem() error { return cmp.Or(r.watch.problem(), r.o.Client.Problem()) }

// String names the issuer for people.
func (r *Root) String() string { return fmt.Sprintf("the issuer %s of %s", r.o.Issuer, r.o.Mount) }

// Check asks Vault whether this root can certify now, without certifying: the issuer, its chain, and the permission.
func (r *Root) Check(ctx context.Context) error {
	i, err := r.issuer(ctx)
	if err != nil {
		return err
	}
	return r.o.Client.checkPermissions(ctx, map[string]string{i.path: http.MethodPut})
}

// Roots asks Vault for the root that the issuer chains to.
func (r *Root) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	i, err := r.issuer(ctx)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil { // what changes between this and the first look of the watch is a change
		r.seen = i.Root()
	}
	return []*x509.Certificate{i.Root()}, nil
}

// look is what the watch does. It says whether the roots have changed.
func (r *Root) look(ctx context.Context) (bool, error) {
	i, err := r.issuer(ctx)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.seen
	r.seen = i.Root()
	if before == nil || before.Equal(r.seen) {
		return false, nil
	}
	r.o.Logger.Warn("the root in Vault has changed", "mount", r.o.Mount, "issuer", r.o.Issuer, "subject", r.seen.Subject.String(), "not_after", r.seen.NotAfter)
	return true, nil
}

// Certify has Vault sign the request's CSR. Validity is cut to what the whole chain above allows.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	chain, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with %s in Vault: %w", request.CommonName, r, err)
	}
	return chain, nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	i, err := r.issuer(ctx)
	if err != nil {
		return nil, err
	}
	if request, err = i.Fit(request, r.o.Now()); err != nil {
		return nil, err
	}
	cert, err := r.sign(ctx, i, request)
	if err != nil {
		return nil, err
	}
	return i.Chain(cert), nil
}
