package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"kedge/ca/ledger"
)

const (
	tick          = time.Minute     // how often Run looks whether something is due
	retryRenewal  = 5 * time.Second // first wait after a failed renewal, doubled up to …
	maxRetry      = 5 * time.Minute
	urgentRetry   = 30 * time.Second // … or up to this while nothing can be signed
	renewalLimit  = time.Minute      // how long one renewal may take
	removalMargin = time.Hour        // how long after its last leaf expired an issuing CA is kept, for verifiers whose clock is behind
)

// RenewIssuing makes sure that there is an issuing CA in the first half of its life whose key is there, or the one that the root brings. The new one proves itself, enters
// the ledger as prepared, and becomes active in the same commit in which the old one retires; both stay valid and trusted, so that nothing that was
// issued breaks. When there is nothing to do, it does nothing.
func (c *CA) RenewIssuing(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	now := c.trust.Load()
	if now.active != nil && now.active.key == nil { // its key store may be back
		if err := c.reload(ctx); err != nil {
			return err
		}
		now = c.trust.Load()
	}
	brought, err := c.brought(ctx, now)
	if err != nil {
		return fmt.Errorf("taking up the issuing CA that the root brings: %w", err)
	}
	if brought != nil {
		return c.replaceIssuing(ctx, now, brought)
	}
	// An active one whose life has not begun was made while the clock was ahead. One that is not covered from its first day on came with a
	// restore: the CA that was lost may still sign with its key.
	if t := c.now(); now.active != nil && now.active.key != nil && now.active.record.Coverage.Complete() &&
		t.Before(now.active.halfLife()) && !t.Before(now.active.cert.NotBefore) && !c.isLost(ctx, now.active) {
		return nil
	}
	next, ref, err := c.makeIssuing(ctx, now)
	if err != nil {
		if ref != "" {
			err = errors.Join(err, c.keys.Delete(context.WithoutCancel(ctx), ref))
		}
		return fmt.Errorf("making a new issuing CA: %w", err)
	}
	return c.replaceIssuing(ctx, now, next)
}

// didNotSign has Run look at the key of the active issuing CA at once, and then every few seconds until it signs again.
func (c *CA) didNotSign() {
	if !c.unsigned.CompareAndSwap(false, true) {
		return
	}
	select {
	case c.failing <- struct{}{}:
	default: // Run has not come to the last one yet
	}
}

// isLost says that the key of the active issuing CA does not sign, which is a problem until it does, and that its store does not have it any more: waiting would mend nothing.
func (c *CA) isLost(ctx context.Context, active *authority) bool {
	if !c.unsigned.Swap(false) {
		return false
	}
	err := probeSignature(active)
	c.Note("signing", err)
	if err == nil {
		return false
	}
	c.unsigned.Store(true)
	if active.record.KeyRef == "" { // it came with the root
		return false
	}
	_, err = c.keys.Open(ctx, active.record.KeyRef)
	return errors.Is(err, fs.ErrNotExist)
}

// replaceIssuing lets a new issuing CA take over.
func (c *CA) replaceIssuing(ctx context.Context, now *trust, next *authority) error {
	if now.active != nil && now.active.record.ID == next.record.ID && now.active.key != nil {
		return nil
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
	if _, _, err := c.trust.Load().signer(c.now(), 0); err != nil {
		return fmt.Errorf("taking up the new issuing CA %s: %w", next.short(), err)
	}
	c.log.Info("a new issuing CA signs from now on", "authority", next.record.ID, "not_after", next.cert.NotAfter, "ledger", c.ledger.Head().Number)
	return nil
}

// makeIssuing makes a key, has the root certify it, and lets the new authority prove itself. ref is set once there is a key.
func (c *CA) makeIssuing(ctx context.Context, t *trust) (a *authority, ref string, err error) {
	if err := c.mayCertify(ctx, t); err != nil {
		return nil, "", err
	}
	ref, key, err := c.keys.Create(ctx, c.issuingKey)
	if err != nil {
		return nil, "", fmt.Errorf("making its key: %w", err)
	}
	a, err = c.candidacy(t).certify(ctx, c.root, ref, key, "Kedge issuing CA", c.issuingLifetime)
	return a, ref, err
}

// prepare records the new authority: trusted, not signing. A crash right after leaves it so.
func (c *CA) prepare(ctx context.Context, next *authority) error {
	event := &ledger.Authority{ID: next.record.ID, TrustDomain: c.td.Name(), From: next.record.State, To: ledger.StatePrepared, Reason: "made to sign", By: "kedge"}
	switch next.record.State {
	case ledger.StatePrepared, ledger.StateActive, ledger.StateRetired: // one that the root brings again
		return nil
	case ledger.StateRemoved:
	default:
		founded := next.record.Founded
		event.Record = &founded
	}
	if _, err := c.ledger.Append(ctx, event); err != nil {
		err = fmt.Errorf("recording the new issuing CA: %w", err)
		if ref := next.record.KeyRef; ref != "" {
			err = errors.Join(err, c.keys.Delete(context.WithoutCancel(ctx), ref))
		}
		return err
	}
	next.record.State = ledger.StatePrepared
	return nil
}

// activate lets the new authority take over, in the commit in which the old one retires.
func (c *CA) activate(ctx context.Context, t *trust, next *authority) error {
	td, id := c.td.Name(), next.record.ID
	var events []ledger.Body
	if next.record.State != ledger.StateActive {
		events = append(events, &ledger.Authority{ID: id, TrustDomain: td, From: next.record.State, To: ledger.StateActive, Reason: "proved itself", By: "kedge"})
	}
	for _, root := range t.roots {
		if root.record.ID == next.record.Root && root.record.State == ledger.StatePrepared {
			events = append(events, &ledger.Authority{ID: root.record.ID, TrustDomain: td, From: ledger.StatePrepared, To: ledger.StateActive,
				Reason: "an issuing CA under it signs, and every holder has it", By: "kedge"})
		}
	}
	for _, old := range t.issuing {
		if old.record.State == ledger.StateActive && old.record.ID != id {
			events = append(events, &ledger.Authority{ID: old.record.ID, TrustDomain: td, From: ledger.StateActive, To: ledger.StateRetired,
				Reason: "followed by " + id.String(), By: "kedge"})
		}
	}
	if len(events) == 0 { // it is active, and its key was away
		return nil
	}
	if _, err := c.ledger.Append(ctx, events...); err != nil {
		// The commit may have landed though it seemed to fail, or an earlier one did: take that up.
		return fmt.Errorf("activating the new issuing CA: %w", errors.Join(err, c.reload(context.WithoutCancel(ctx))))
	}
	return nil
}

// Run renews and removes issuing CAs and prunes the ledger until ctx ends. What fails is tried again and is listed in Problems
// until it works; a renewal that fails is tried again after 5 s, and then ever later, up to every 5 min, or every 30 s while nothing can be signed.
func (c *CA) Run(ctx context.Context) error {
	var house sync.WaitGroup
	house.Go(func() { c.keepHouse(ctx) })
	defer house.Wait()
	renewal := time.NewTimer(c.untilRenewal())
	defer renewal.Stop()
	retry := retryRenewal
	var anchors <-chan struct{}
	if c.anchors != nil {
		anchors = c.anchors.Changed()
	}
	for {
		select {
		case <-ctx.Done():
			c.Note("guarded clock", c.guarded.Save())
			return nil
		case <-c.root.Changed():
			c.followNow(ctx)
			renewal.Reset(0)
		case <-anchors:
			c.followNow(ctx)
		case <-c.failing:
			if retry == retryRenewal { // else it is being tried already
				renewal.Reset(0)
			}
		case <-renewal.C:
			if c.renew(ctx) == nil {
				retry = retryRenewal
				renewal.Reset(c.untilRenewal())
				continue
			}
			if _, _, err := c.trust.Load().signer(c.now(), 0); err != nil || c.unsigned.Load() {
				retry = min(retry, urgentRetry)
			}
			renewal.Reset(retry)
			retry = min(2*retry, maxRetry)
		}
	}
}

// followNow follows the roots at once, since they changed.
func (c *CA) followNow(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, renewalLimit)
	defer cancel()
	_, err := c.takeUpRoots(ctx)
	c.Note(aboutRoot, err)
}

// keepHouse does the chores at once, since a CA that is often restarted would else never come to them, and then at each tick. It does so beside the
// renewals: dropping much of the ledger takes its time, and so may a key store.
func (c *CA) keepHouse(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for ctx.Err() == nil {
		c.chores(ctx)
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// untilRenewal is how long it is until a renewal may be due. It is never long, since the clock may be set.
func (c *CA) untilRenewal() time.Duration {
	active := c.trust.Load().active
	if active == nil || active.key == nil {
		return 0
	}
	if active.record.KeyRef == "" { // what the root brings is replaced by what it brings next
		return tick
	}
	if c.unsigned.Load() {
		return retryRenewal
	}
	return min(tick, max(active.halfLife().Sub(c.now()), 0)+time.Second)
}

func (c *CA) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewalLimit)
	defer cancel()
	err := c.RenewIssuing(ctx)
	c.Note(aboutIssuing, err)
	return err
}

// chores does what is to be done now and then. Pruning has no limit of time: it goes by small steps, for as long as there is something to drop.
func (c *CA) chores(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, renewalLimit)
	defer cancel()
	given, err := c.takeUpRoots(limited)
	c.Note(aboutRoot, err)
	c.Note("removal of retired issuing CAs", c.removeRetired(limited))
	if err == nil {
		c.Note("removal of trust anchors", c.removeRoots(limited, given))
	}
	c.Note("keys of removed issuing CAs", c.destroyKeys(limited))
	report, err := c.ledger.Prune(ctx, c.guarded.Now())
	c.Note("pruning the ledger", err)
	if report.Events > 0 {
		c.log.Info("the ledger was pruned", "events", report.Events, "first", report.First)
	}
	c.Note("guarded clock", c.guarded.Save())
}

// removeRetired lets go of issuing CAs under which no SVID is left. Of one whose coverage is not complete that is certain only after its own end,
// which nothing under it outlives (I3). The clock is the guarded one (I8).
func (c *CA) removeRetired(ctx context.Context) (err error) {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
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
	now, changed := c.guarded.Now(), false
	for _, a := range c.trust.Load().issuing {
		// One that was prepared and never became active was left by a crash.
		leftover := a.record.State == ledger.StatePrepared && now.Sub(a.cert.NotBefore) > c.issuingLifetime/2
		end := later(last[a.hash], c.unseen(a))
		if a.record.State != ledger.StateRetired && !leftover || now.Before(end.Add(removalMargin)) {
			continue
		}
		_, appendErr := c.ledger.Append(ctx, &ledger.Authority{ID: a.record.ID, TrustDomain: c.td.Name(), From: a.record.State, To: ledger.StateRemoved,
			Reason: "no unexpired certificate is left under it", By: "kedge"})
		if appendErr != nil {
			err = errors.Join(err, fmt.Errorf("removing the issuing CA %s: %w", a.short(), appendErr))
		}
		changed = true // perhaps even though it failed
	}
	if changed {
		err = errors.Join(err, c.reload(ctx))
	}
	return err
}

// destroyKeys deletes the keys of removed issuing CAs. Since deleting what is gone is no error, each is deleted once in a run of
// the program: a crash between the removal and the deletion leaves nothing behind.
func (c *CA) destroyKeys(ctx context.Context) (failed error) {
	records, err := c.ledger.Authorities()
	if err != nil {
		return fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	for _, record := range records {
		if record.State != ledger.StateRemoved || record.KeyRef == "" || c.destroyed[record.ID] {
			continue
		}
		if err := c.keys.Delete(ctx, record.KeyRef); err != nil {
			failed = errors.Join(failed, fmt.Errorf("destroying the key of the removed issuing CA %s (one of another key store is for you to destroy there): %w", record.ID, err))
			continue
		}
		c.destroyed[record.ID] = true
		c.log.Info("the key of a removed issuing CA is destroyed", "authority", record.ID)
	}
	return failed
}

// signer returns the authority that signs now, and for how long at most. It is ErrUnavailable when there is none, when its life has not begun,
// or when less than shortest is left of it.
func (t *trust) signer(now time.Time, shortest time.Duration) (a *authority, left time.Duration, err error) {
	a = t.active
	if a == nil || a.key == nil {
		return nil, 0, Unavailable(errors.New("there is no issuing CA that can sign"))
	}
	if now.Before(a.cert.NotBefore) {
		return nil, 0, Unavailable(fmt.Errorf("this machine's clock says %s, before the issuing CA's notBefore %s: the clock was set back",
			now.UTC().Format(time.RFC3339), a.cert.NotBefore.Format(time.RFC3339)))
	}
	if left = a.notAfter.Sub(now).Truncate(time.Second); left < shortest {
		return nil, 0, Unavailable(fmt.Errorf("the issuing CA %s ends at %s: the %s that are left are less than the minimum of %s",
			a.short(), a.notAfter.Format(time.RFC3339), left, shortest))
	}
	return a, left, nil
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
