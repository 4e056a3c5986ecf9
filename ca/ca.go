package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// Options are what a CA is made of. All fields but OtherIssuers and Anchors are required; ForeignWindow is for roots that others sign under.
type Options struct {
	TrustDomain     spiffeid.TrustDomain
	Ledger          *ledger.Ledger
	Root            Root
	Anchors         Anchors         // trusted besides the root's own; may be nil
	RootCoverage    ledger.Coverage // what the ledger knows of the certificates under the roots of the first start
	ForeignWindow   time.Duration   // how long certificates that others issued under what enters later, or comes with its key, may live on unseen
	Keys            KeyStore
	Profiles        map[string]*Profile // by the name that a caller gives as CertSigner; "default" is there
	IssuingLifetime time.Duration       // of an issuing CA; it is renewed at half of it
	IssuingKey      KeySpec
	OtherIssuers    []*x509.Certificate // issuing CAs of others whose client certificates count
	Clock           Clock
	Guarded         *GuardedClock
	Logger          *slog.Logger
}

// restartLimit is how long a restart waits for the root and the key store. Open makes what is missing, and what it cannot make by then Run does.
const restartLimit = 10 * time.Second

// DefaultProfile is the name of the profile that a caller gets who names none.
const DefaultProfile = "default"

// CA issues SVIDs and keeps its authorities. Its methods may be called at once from several goroutines.
type CA struct {
	td              spiffeid.TrustDomain
	ledger          *ledger.Ledger
	root            Root
	anchors         Anchors
	rootCoverage    ledger.Coverage
	foreignWindow   time.Duration
	keys            KeyStore
	profiles        map[string]*Profile
	issuingLifetime time.Duration
	issuingKey      KeySpec
	otherIssuers    []*x509.Certificate
	now             func() time.Time
	guarded         *GuardedClock
	log             *slog.Logger
	clients         *ClientCertificates

	trust atomic.Pointer[trust] // what is signed with and trusted now

	change    chan struct{} // holds one element while authorities change: see lock
	unsigned  atomic.Bool   // the active key did not sign when it was asked last
	acks      chan struct{} // holds an element for each acknowledgement that is under way in the ledger
	failing   chan struct{} // holds one element since it did not, until Run looks at it
	problems  problems
	destroyed map[ledger.Hash]bool // removed authorities whose keys are gone for certain; used by one goroutine
}

// trust is what the CA signs with and trusts at one moment. It is never changed, only replaced.
type trust struct {
	active  *authority   // signs; nil when there is none that can
	issuing []*authority // all that are not removed, in order of entry
	roots   []*authority
	bundle  *Bundle
	changed chan struct{} // closed when this is no longer the trust
}

// Open takes up the authorities that the ledger has, and makes what is missing: on the first start the root and its
// bundle enter the ledger and an issuing CA is made. It fails rather than begin with something that clients would refuse. On a later start what is
// missing and cannot be made, since the disk is full or the root is away, is a problem: Run tries again, and Ready says no until then.
func Open(ctx context.Context, o Options) (*CA, error) {
	if o.Profiles[DefaultProfile] == nil {
		return nil, fmt.Errorf("there is no profile named %q", DefaultProfile)
	}
	c := &CA{
		td: o.TrustDomain, ledger: o.Ledger, root: o.Root, anchors: o.Anchors, rootCoverage: o.RootCoverage, foreignWindow: o.ForeignWindow,
		keys: o.Keys, profiles: o.Profiles,
		issuingLifetime: o.IssuingLifetime, issuingKey: o.IssuingKey, otherIssuers: o.OtherIssuers,
		now: o.Clock.Wall, guarded: o.Guarded, log: o.Logger,
		problems: problems{said: map[string]error{}}, change: make(chan struct{}, 1), acks: make(chan struct{}, maxAcks), failing: make(chan struct{}, 1), destroyed: map[ledger.Hash]bool{},
	}
	c.clients = NewClientCertificates(o.TrustDomain, o.Ledger, o.Clock.Wall)
	first := o.Ledger.Head().Number == 0
	if !first { // a root or a key store that hangs holds up no door: Run goes on with it
		limited, cancel := context.WithTimeout(ctx, restartLimit)
		defer cancel()
		ctx = limited
	}
	c.Note("guarded clock", c.guarded.Save())
	if _, err := c.takeUpRoots(ctx); errors.Is(err, errRootAway) {
		c.Note(aboutRoot, err)
	} else if err != nil {
		return nil, err
	}
	if err := c.reload(ctx); err != nil {
		return nil, err
	}
	if err := c.RenewIssuing(ctx); err != nil {
		if first {
			return nil, err
		}
		c.Note(aboutIssuing, err)
	}
	return c, nil
}

// lock makes sure that only one change of authorities is under way, and waits for it no longer than ctx.
func (c *CA) lock(ctx context.Context) error {
	select {
	case c.change <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for another change of the authorities: %w", ctx.Err())
	}
}

func (c *CA) unlock() { <-c.change }

// reload makes the trust anew from what the ledger says. Keys that are open stay so.
func (c *CA) reload(ctx context.Context) error {
	records, err := c.ledger.Authorities()
	if err != nil {
		return fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	record, err := c.ledger.CurrentBundle()
	if err != nil {
		return fmt.Errorf("reading the trust bundle from the ledger: %w", err)
	}
	bundle, err := loadBundle(record)
	if err != nil {
		return err
	}
	next := &trust{bundle: bundle, changed: make(chan struct{})}
	before := c.trust.Load()
	anchors := map[ledger.Hash]*x509.Certificate{}
	for _, record := range records { // a root enters the ledger before what chains to it
		if record.State == ledger.StateRemoved {
			continue
		}
		a, err := loadAuthority(record, anchors)
		if err != nil {
			return err
		}
		if record.Role == ledger.RoleRoot {
			anchors[record.ID] = a.cert
			next.roots = append(next.roots, a)
			continue
		}
		next.issuing = append(next.issuing, a)
		if record.State == ledger.StateActive && !record.Tainted {
			if before != nil && before.active != nil && before.active.record.ID == record.ID {
				a.key, a.leaves = before.active.key, before.active.leaves
			}
			next.active = a
		}
	}
	if next.active != nil && next.active.key == nil {
		err := c.openKey(ctx, next.active)
		if err == nil {
			err = proveAuthority(next.active, next.anchors(), c.td, newSerial(c.ledger.Head().Log))
		}
		if err != nil {
			c.log.Error("the active issuing CA cannot sign; a new one is due", "authority", next.active.record.ID, "error", err)
			next.active.key, next.active.leaves = nil, nil
		}
	}
	c.clients.setAuthorities(next.issuing, c.otherIssuers, taintedKeys(records))
	c.trust.Store(next)
	if before != nil {
		close(before.changed)
	}
	return nil
}

// anchors are the certificates of the roots.
func (t *trust) anchors() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(t.roots))
	for i, root := range t.roots {
		certs[i] = root.cert
	}
	return certs
}

// root finds the authority of a root's certificate.
func (t *trust) root(cert *x509.Certificate) *authority {
	i := slices.IndexFunc(t.roots, func(root *authority) bool { return root.cert.Equal(cert) })
	return t.roots[i] // checkPath found it among them
}

// TrustDomain is the one that this CA serves.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// Ledger is what this CA writes to.
func (c *CA) Ledger() *ledger.Ledger { return c.ledger }

// Guarded is the clock for steps that cannot be taken back.
func (c *CA) Guarded() *GuardedClock { return c.guarded }

// Bundle is the trust bundle of now.
func (c *CA) Bundle() *Bundle { return c.trust.Load().bundle }

// Floor is the sequence number of the oldest trust bundle that may still be handed out or pushed. It rises the moment that a bundle which raises it is
// durable, so that it may be ahead of Bundle for a moment. It is answered from memory.
func (c *CA) Floor() uint64 { return c.ledger.Floor() }

// Changed is closed when an authority or the bundle has changed. Ask for it before looking at what may change.
func (c *CA) Changed() <-chan struct{} { return c.trust.Load().changed }

// ClientCertificates verifies certificates that callers present.
func (c *CA) ClientCertificates() *ClientCertificates { return c.clients }

// Now is the CA's wall clock.
func (c *CA) Now() time.Time { return c.now() }

// Ready says whether this CA can issue now: an issuing CA with enough life left, a probe signature with the active key, and a durable write to the ledger.
func (c *CA) Ready(ctx context.Context) error {
	active, _, err := c.trust.Load().signer(c.now(), c.profiles[DefaultProfile].MinTTL())
	if err != nil {
		return err
	}
	if err := probeSignature(active); err != nil {
		c.didNotSign()
		return err
	}
	if err := c.ledger.Probe(ctx); err != nil {
		return fmt.Errorf("writing to the ledger: %w", err)
	}
	return nil
}
