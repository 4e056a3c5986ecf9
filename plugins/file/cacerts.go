package file

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
)

// CACertsOptions says where a CA is that was made elsewhere.
type CACertsOptions struct {
	Dir            string           // with istiod's cacerts, or with tls.crt, tls.key and ca.crt
	PassphraseFile string           // one line, for an encrypted key; empty: the key is not encrypted
	TrustDomain    string           // name without scheme
	PollInterval   time.Duration    // how often the files are looked at; default 3 s
	Now            func() time.Time // default time.Now
	Logger         *slog.Logger     // default: nothing is logged
}

// CACerts is a ca.IssuingRoot over the CA that istiod was given, as it is mounted from its Secret. An intermediate signs leaves itself, as it did for istiod; a CA that
// is a root certifies issuing CAs. A new set takes over while the CA runs; one that is bad is refused as a whole, and the one before goes on.
type CACerts struct {
	dir        string
	files      mounted
	passphrase passphrase
	td         spiffeid.TrustDomain
	now        func() time.Time
	watch      *watch

	mu     sync.RWMutex
	counts *verdict // the set that counts; nil: there was no good one yet
	latest *verdict // on the files as they were last
}

// verdict is what was found in files of a certain content. It stands for as long as they do not change: a key that is encrypted costs 600,000 rounds each time that it is opened.
type verdict struct {
	sum [sha256.Size]byte
	set *caSet
	err error
}

var (
	_ ca.IssuingRoot = (*CACerts)(nil)
	_ ca.Reporter    = (*CACerts)(nil)
)

// OpenCACerts reads the set and begins to watch it. A set that is bad now is no error: Roots says what is wrong with it until there is a good one. Close ends the watch.
func OpenCACerts(o CACertsOptions) (*CACerts, error) {
	if o.Dir == "" {
		return nil, errors.New("the CA of a Secret has no folder: name the one where it is mounted")
	}
	td, err := spiffeid.TrustDomainFromString(o.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("the trust domain %q of the CA in %s: %w", o.TrustDomain, o.Dir, err)
	}
	c := &CACerts{dir: o.Dir, passphrase: passphrase{path: o.PassphraseFile}, td: td, now: o.Now}
	if c.now == nil {
		c.now = time.Now
	}
	c.files = mounted{dir: o.Dir, passphrase: c.passphrase, secrets: []string{istioLayout.key, tlsLayout.key}, names: []string{
		istioLayout.cert, istioLayout.key, istioLayout.chain, istioLayout.roots, istioLayout.crl, tlsLayout.cert, tlsLayout.key, tlsLayout.roots}}
	c.watch = newWatch("the CA in "+o.Dir, c.look, o.PollInterval, o.Logger)
	return c, nil
}

// look reads the files, and takes them up if they are another set, and a good one.
func (c *CACerts) look() (changed bool, err error) {
	files, err := c.files.read()
	defer files.wipe()
	if err != nil {
		return false, c.refused(err)
	}
	v, counts := c.judge(files)
	if counts {
		return false, nil
	}
	if err = v.err; err == nil {
		err = v.set.usable(c.now())
	}
	if err != nil {
		return false, c.refused(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts = v
	return true, nil
}

// judge says what is in the files, and whether that is what counts already. It looks into them only when they have changed.
func (c *CACerts) judge(files contents) (v *verdict, counts bool) {
	sum := files.sum()
	c.mu.RLock()
	latest, taken := c.latest, c.counts
	c.mu.RUnlock()
	switch {
	case taken != nil && taken.sum == sum:
		v = taken
	case latest != nil && latest.sum == sum:
		v = latest
	default:
		v = &verdict{sum: sum}
		v.set, v.err = parseCASet(c.dir, files, c.passphrase, c.td)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.latest = v
	return v, v == taken
}

// refused says which set goes on.
func (c *CACerts) refused(err error) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.counts == nil {
		return fmt.Errorf("the CA in %s cannot be used: %w", c.dir, err)
	}
	return fmt.Errorf("the CA in %s is refused as a whole, and the one before (%q, SHA-256 %x) goes on: %w", c.dir, c.counts.set.cert.Subject, sha256.Sum256(c.counts.set.cert.Raw), err)
}

// current is the set that counts, or why there is none.
func (c *CACerts) current() (*caSet, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.counts != nil {
		return c.counts.set, nil
	}
	if err := c.watch.current(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("the CA in %s was not read yet", c.dir)
}

// Roots returns the trust anchors that are valid now, the one that the CA is or chains to first.
func (c *CACerts) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	set, err := c.current()
	if err != nil {
		return nil, err
	}
	return set.trusted(c.now()), nil
}

// Issuing returns the CA with its key, if it is an intermediate.
func (c *CACerts) Issuing(ctx context.Context) ([]*x509.Certificate, crypto.Signer, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	set, err := c.current()
	if err != nil || len(set.chain) == 0 {
		return nil, nil, err
	}
	return slices.Clone(set.chain), set.key, nil
}

// Certify signs the certificate of an issuing CA, if the CA is a root. Validity is cut to the root's own.
func (c *CACerts) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	chain, err := c.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with the CA in %s: %w", request.CommonName, c.dir, err)
	}
	return chain, nil
}

func (c *CACerts) certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	set, err := c.current()
	if err != nil {
		return nil, err
	}
	if len(set.chain) > 0 {
		return nil, fmt.Errorf("%s is an intermediate, which signs leaves itself", set.layout.cert)
	}
	return ca.Issuers{set.cert}.Certify(set.key, request, c.now())
}

// Changed receives after another set was taken up.
func (c *CACerts) Changed() <-chan struct{} { return c.watch.changed }

// Problem says why the files that are there now are not taken up, or what is wrong in the set though it counts.
func (c *CACerts) Problem() error {
	if err := c.watch.current(); err != nil {
		return err
	}
	set, err := c.current()
	if err != nil {
		return err
	}
	if err := errors.Join(set.usable(c.now()), set.remarks(c.now())); err != nil {
		return fmt.Errorf("the CA in %s: %w", c.dir, err)
	}
	return nil
}

// Close ends the watch.
func (c *CACerts) Close() error { return c.watch.close() }
