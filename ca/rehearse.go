package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"kedge/ca/ledger"
)

// Rehearsal is what a rehearsal found.
type Rehearsal struct {
	Roots   []*x509.Certificate // trust anchors, the root's first
	Chain   []*x509.Certificate // of the issuing CA that would sign, without the root
	Brought bool                // it came with the root
}

// rehearsedLifetime is how long the issuing CA of a rehearsal lives at least, whose key is deleted at once.
const rehearsedLifetime = 10 * time.Minute

// Rehearse goes through what a first start does with a root and a key store, and leaves nothing that counts: it makes a key, has it certified for some minutes, lets
// it sign a throwaway leaf, makes the checks on it that a client makes, and deletes the key. An issuing CA that the root brings is proved as it is. What a
// first Open refuses about them, it refuses. Of the options TrustDomain, Root, Anchors, Keys, Profiles, IssuingKey and Clock count.
func Rehearse(ctx context.Context, o Options) (found Rehearsal, err error) {
	now := o.Clock.Wall()
	if found.Roots, _, err = givenRoots(ctx, o.Root, o.Anchors, o.TrustDomain, now); err != nil {
		return found, err
	}
	trial := candidacy{td: o.TrustDomain, anchors: found.Roots, now: now, shortest: o.Profiles[DefaultProfile].MinTTL(),
		may: func(*x509.Certificate) error { return nil }} // nobody holds a certificate yet
	if root, ok := o.Root.(IssuingRoot); ok {
		chain, key, err := root.Issuing(ctx)
		if err != nil {
			return found, fmt.Errorf("asking the root for its issuing CA: %w", err)
		}
		if len(chain) > 0 {
			found.Chain, found.Brought = chain, true
			anchor, err := checkBrought(chain, key, found.Roots, o.TrustDomain, now)
			if err == nil {
				_, err = trial.prove(foundIssuing(o.TrustDomain, chain, anchor, "", ledger.Coverage{}), anchor, key)
			}
			return found, err
		}
	}
	ref, _, err := o.Keys.Create(ctx, o.IssuingKey)
	if err != nil {
		return found, fmt.Errorf("making its key: %w", err)
	}
	defer func() {
		if deleteErr := o.Keys.Delete(context.WithoutCancel(ctx), ref); deleteErr != nil {
			err = errors.Join(err, fmt.Errorf("deleting the rehearsal's key %s: %w", ref, deleteErr))
		}
	}()
	key, err := o.Keys.Open(ctx, ref) // as each later start does
	if err != nil {
		return found, fmt.Errorf("opening the key that was just made: %w", err)
	}
	a, err := trial.certify(ctx, o.Root, ref, key, "Kedge rehearsal", max(rehearsedLifetime, 2*trial.shortest))
	if err == nil {
		found.Chain = a.chain
	}
	return found, err
}
