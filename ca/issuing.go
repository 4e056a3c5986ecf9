package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"kedge/ca/ledger"
)

const (
	tick          = time.Minute     // how often Run looks whether something is due
	retryRenewal  = 5 * time.Second // first wait after a failed renewal, doubled up to …
	maxRetry      = 5 * time.Minute
	renewalLimit  = time.Minute // how long one renewal may take
	removalMargin = time.Hour   // how long after its last leaf expired an issuing CA is kept, for verifiers whose clock is behind
)

// RenewIssuing makes sure that there is an issuing CA in the first half of its life. The new one enters the ledger as
// prepared, proves itself, and becomes active in the same commit in which the old one retires; both stay valid and
// trusted, so that nothing that was issued breaks. When there is nothing to do, it does nothing.
func (c *CA) RenewIssuing(ctx context.Context) error {
	c.change.Lock()
	defer c.change.Unlock()
	now := c.trust.Load()
	if now.active != nil && now.active.key != nil && c.now().Before(now.active.halfLife()) {
		return nil
	}
	next, ref, err := c.makeIssuing(ctx, now)
	if err != nil {
		if ref != "" {
			err = errors.Join(err, c.keys.Delete(context.WithoutCancel(ctx), ref))
		}
		return fmt.Errorf("making a new issuing CA: %w", err)
	}
	if err := c.prepare(ctx, next); err != nil {
		return err
	}
	if err := c.activate(ctx, now, next); err != nil {
		return err
	}
	if err := c.reload(ctx); err != nil {
		return err
	}
	c.log.Info("a new issuing CA signs from now on", "authority", next.record.ID, "not_after", next.cert.NotAfter, "ledger", c.ledger.Head().Number)
	return nil
}

// makeIssuing makes a key, has the root certify it, and lets the new authority prove itself. ref is set once there is a key.
func (c *CA) makeIssuing(ctx context.Context, t *trust) (a *authority, ref string, err error) {
	ref, key, err := c.keys.Create(ctx, c.issuingKey)
	if err != nil {
		return nil, "", fmt.Errorf("making its key: %w", err)
	}
	now := c.now().UTC().Truncate(time.Second)
	request := CertifyRequest{
		PublicKey: key.Public(), TrustDomain: c.td.Name(), CommonName: "Kedge issuing CA " + now.Format("2006-01-02 15:04:05"),
		NotBefore: now.Add(-min(time.Hour, c.issuingLifetime/10)), NotAfter: now.Add(c.issuingLifetime),
	}
	chain, err := c.root.Certify(ctx, request)
	if err != nil {
		return nil, ref, fmt.Errorf("having it certified by the root: %w", err)
	}
	root, err := checkIssuing(chain, t.anchors(), request, c.td)
	if err != nil {
		return nil, ref, err
	}
	cert := chain[0]
	record := ledger.AuthorityRecord{ID: AuthorityID(cert), TrustDomain: c.td.Name(), State: ledger.StatePrepared}
	record.Founded = ledger.Founded{Kind: "x509", Role: ledger.RoleIssuing, Key: keyID(cert), Certificate: cert.Raw, Root: AuthorityID(root),
		KeyRef: ref, Coverage: ledger.Coverage{Kind: "complete"}}
	for _, link := range chain {
		record.Chain = append(record.Chain, link.Raw)
	}
	a, err = loadAuthority(record, certsByID(t))
	if err != nil {
		return nil, ref, err
	}
	if shortest := c.profiles[DefaultProfile].MinTTL(); a.notAfter.Sub(now) < shortest {
		return nil, ref, fmt.Errorf("it would live only until %s, because its root ends then: too short for a certificate of %s. The root must be renewed",
			a.notAfter.Format(time.RFC3339), shortest)
	}
	a.key = key
	if err := c.proveAuthority(a, t.anchors()); err != nil {
		return nil, ref, fmt.Errorf("proving it with a throwaway leaf: %w", err)
	}
	return a, ref, nil
}

// prepare records the new authority: trusted, not signing. A crash right after leaves it so.
func (c *CA) prepare(ctx context.Context, next *authority) error {
	founded := next.record.Founded
	if _, err := c.ledger.Append(ctx, &ledger.Authority{ID: next.record.ID, TrustDomain: c.td.Name(), To: ledger.StatePrepared, Reason: "made to sign", By: "kedge", Record: &founded}); err != nil {
		return fmt.Errorf("recording the new issuing CA: %w", errors.Join(err, c.keys.Delete(context.WithoutCancel(ctx), founded.KeyRef)))
	}
	return nil
}

// activate lets the new authority take over, in the commit in which the old one retires.
func (c *CA) activate(ctx context.Context, t *trust, next *authority) error {
	td, id := c.td.Name(), next.record.ID
	events := []ledger.Body{&ledger.Authority{ID: id, TrustDomain: td, From: ledger.StatePrepared, To: ledger.StateActive, Reason: "proved itself", By: "kedge"}}
	for _, old := range t.issuing {
		if old.record.State == ledger.StateActive {
			events = append(events, &ledger.Authority{ID: old.record.ID, TrustDomain: td, From: ledger.StateActive, To: ledger.StateRetired,
				Reason: "followed by " + id.String(), By: "kedge"})
		}
	}
	if _, err := c.ledger.Append(ctx, events...); err != nil {
		if errors.Is(err, ledger.ErrConflict) {
			err = errors.Join(err, c.reload(ctx)) // an earlier commit that seemed lost did land: take that up
		}
		return fmt.Errorf("activating the new issuing CA: %w", err)
	}
	return nil
}

// Run renews and removes issuing CAs and prunes the ledger until ctx ends. What fails is tried again, sooner than the next tick
// when it is a renewal, and is listed in Problems until it works.
func (c *CA) Run(ctx context.Context) error {
	retry := retryRenewal
	for {
		wait := tick
		if active := c.trust.Load().active; active != nil {
			wait = min(wait, max(active.halfLife().Sub(c.now()), 0)+time.Second)
		}
		if c.problems.has("issuing CA") {
			wait = min(wait, retry)
			retry = min(2*retry, maxRetry)
		} else {
			retry = retryRenewal
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return c.guarded.Save()
		case <-timer.C:
		}
		c.housekeep(ctx)
	}
}

// housekeep does what is due.
func (c *CA) housekeep(ctx context.Context) {
	renewal, cancel := context.WithTimeout(ctx, renewalLimit)
	defer cancel()
	c.note("issuing CA", c.RenewIssuing(renewal))
	c.note("removal of retired issuing CAs", c.removeRetired(ctx))
	report, err := c.ledger.Prune(ctx, c.guarded.Now())
	c.note("pruning the ledger", err)
	if report.Events > 0 {
		c.log.Info("the ledger was pruned", "events", report.Events, "first", report.First)
	}
	c.note("guarded clock", c.guarded.Save())
}

// note logs a problem when it comes and when it goes.
func (c *CA) note(about string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	if !c.problems.set(about, err) {
		return
	}
	if err != nil {
		c.log.Error("something is wrong and is tried again", "about", about, "error", err)
	} else {
		c.log.Info("works again", "about", about)
	}
}

// removeRetired lets go of issuing CAs under which no SVID is left, and destroys their keys. The clock is the guarded one (I8).
func (c *CA) removeRetired(ctx context.Context) error {
	c.change.Lock()
	defer c.change.Unlock()
	holdings, err := c.ledger.Holdings()
	if err != nil {
		return fmt.Errorf("reading the holdings: %w", err)
	}
	last := map[ledger.Hash]time.Time{}
	for _, row := range holdings {
		if end := row.Latest.Time(); end.After(last[row.Chain]) {
			last[row.Chain] = end
		}
	}
	var removed int
	for _, a := range c.trust.Load().issuing {
		done := a.record.State == ledger.StateRetired || (a.record.State == ledger.StatePrepared && c.now().Sub(a.cert.NotBefore) > c.issuingLifetime/2)
		if !done || c.guarded.Now().Before(last[a.hash].Add(removalMargin)) {
			continue
		}
		if _, err := c.ledger.Append(ctx, &ledger.Authority{ID: a.record.ID, TrustDomain: c.td.Name(), From: a.record.State, To: ledger.StateRemoved,
			Reason: "no unexpired certificate is left under it", By: "kedge"}); err != nil {
			return fmt.Errorf("removing the issuing CA %s: %w", a.short(), err)
		}
		removed++
		if err := c.keys.Delete(ctx, a.record.KeyRef); err != nil {
			return fmt.Errorf("destroying the key of the removed issuing CA %s: %w", a.short(), err)
		}
		c.log.Info("an issuing CA was removed and its key destroyed", "authority", a.record.ID)
	}
	if removed == 0 {
		return nil
	}
	return c.reload(ctx)
}

// has says whether about has a problem now.
func (p *problems) has(about string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.said[about] != nil
}

func certsByID(t *trust) map[ledger.Hash]*x509.Certificate {
	byID := map[ledger.Hash]*x509.Certificate{}
	for _, root := range t.roots {
		byID[root.record.ID] = root.cert
	}
	return byID
}

// signer returns the authority that signs now.
func (c *CA) signer() (*authority, error) {
	active := c.trust.Load().active
	if active == nil || active.key == nil {
		return nil, Unavailable(errors.New("there is no issuing CA that can sign"))
	}
	return active, nil
}

// probeSignature signs nothing of meaning with the authority's key, and verifies it.
func probeSignature(a *authority) error {
	digest := sha256.Sum256([]byte("kedge readiness probe"))
	signature, err := a.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return fmt.Errorf("the key of the issuing CA %s does not sign: %w", a.short(), err)
	}
	var good bool
	switch pub := a.cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(pub, digest[:], signature)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) == nil
	}
	if !good {
		return fmt.Errorf("the key of the issuing CA %s signs, but the signature is not good", a.short())
	}
	return nil
}
