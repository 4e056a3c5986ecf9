package file

import (
	"context"
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
	"kedge/ca/pemfile"
)

// AnchorsOptions says which file has further trust anchors.
type AnchorsOptions struct {
	File         string           // PEM; an empty one has none
	TrustDomain  string           // name without scheme
	PollInterval time.Duration    // how often it is looked at; default 3 s
	Now          func() time.Time // default time.Now
	Logger       *slog.Logger     // default: nothing is logged
}

// Anchors are ca.Anchors in a file. A file with anything in it that cannot be a trust anchor is refused as a whole, and what it had before goes on.
type Anchors struct {
	path  string
	td    spiffeid.TrustDomain
	now   func() time.Time
	watch *watch

	mu   sync.RWMutex
	read bool // the file was good once
	sum  [sha256.Size]byte
	all  []*x509.Certificate
}

var (
	_ ca.Anchors  = (*Anchors)(nil)
	_ ca.Reporter = (*Anchors)(nil)
)

// OpenAnchors reads the file and begins to watch it. One that is bad now is no error: Anchors says what is wrong with it until it is good. Close ends the watch.
func OpenAnchors(o AnchorsOptions) (*Anchors, error) {
	if o.File == "" {
		return nil, errors.New("the trust anchors have no file: name one")
	}
	td, err := spiffeid.TrustDomainFromString(o.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("the trust domain %q of the trust anchors in %s: %w", o.TrustDomain, o.File, err)
	}
	a := &Anchors{path: o.File, td: td, now: o.Now}
	if a.now == nil {
		a.now = time.Now
	}
	a.watch = newWatch("the trust anchors in "+o.File, a.look, o.PollInterval, o.Logger)
	return a, nil
}

// parseAnchors reads the text of a file of trust anchors.
func parseAnchors(path string, text []byte, td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
	certs, err := pemfile.Certificates(text)
	if err != nil {
		return nil, bad(path, ca.Unreadable, "%w", err)
	}
	for _, cert := range certs {
		if err := checkTrustAnchor(cert, td); err != nil {
			return nil, bad(path, ca.Unfit, "the certificate %q: %w", cert.Subject, err)
		}
	}
	return distinct(certs), nil
}

// CheckAnchorsFile says whether OpenAnchors can use the file.
func CheckAnchorsFile(path string, td spiffeid.TrustDomain) error {
	text, err := read(path, 0, "")
	if err != nil {
		return err
	}
	if _, err := parseAnchors(path, text, td); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (a *Anchors) look() (changed bool, err error) {
	text, err := read(a.path, 0, "")
	if err != nil {
		return false, a.refused(err)
	}
	sum := sha256.Sum256(text)
	a.mu.RLock()
	same := a.read && a.sum == sum
	a.mu.RUnlock()
	if same {
		return false, nil
	}
	certs, err := parseAnchors(a.path, text, a.td)
	if err != nil {
		return false, a.refused(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.read, a.sum, a.all = true, sum, certs
	return true, nil
}

func (a *Anchors) refused(err error) error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if !a.read {
		return fmt.Errorf("the trust anchors in %s cannot be used: %w", a.path, err)
	}
	return fmt.Errorf("the trust anchors in %s are refused as a whole, and the %d of before go on: %w", a.path, len(a.all), err)
}

// Anchors returns those that are valid now.
func (a *Anchors) Anchors(ctx context.Context) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	if !a.read {
		return nil, a.watch.current()
	}
	return slices.Clone(validAt(a.all, a.now())), nil
}

// Changed receives after the file was taken up anew.
func (a *Anchors) Changed() <-chan struct{} { return a.watch.changed }

// Problem says why the file is not taken up, or which of its certificates are not valid now.
func (a *Anchors) Problem() error {
	if err := a.watch.current(); err != nil {
		return err
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	return leftOut(a.path, a.all, a.now())
}

// Close ends the watch.
func (a *Anchors) Close() error { return a.watch.close() }
