package ca

import (
	"context"
	"errors"
	"fmt"

	"kedge/ca/ledger"
)

// Taint marks an issuing CA as compromised, for good: from the moment that this is durable nothing is issued under it, and client certificates
// under it authenticate nobody. What it issued still verifies until it expires. When it is the one that signs, a new one is made at
// once; by names the admin.
//
// The error wraps ledger.ErrNotFound for an authority that the ledger does not have, and ledger.ErrAlready for one that is tainted. An error after
// the taint was recorded says so; then the new issuing CA is tried for again by Run.
func (c *CA) Taint(ctx context.Context, id ledger.Hash, reason, by string) error {
	if err := c.recordTaint(ctx, id, reason, by); err != nil {
		return err
	}
	c.log.Warn("an issuing CA is tainted: it signs no more, and client certificates under it count for nothing", "authority", id, "reason", reason, "by", by)
	err := c.RenewIssuing(ctx)
	c.Note(aboutIssuing, err)
	if err != nil {
		return fmt.Errorf("the authority %s is tainted, and nothing can be issued until there is a new issuing CA, which is tried again soon: %w", id, err)
	}
	return nil
}

func (c *CA) recordTaint(ctx context.Context, id ledger.Hash, reason, by string) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	records, err := c.ledger.Authorities()
	if err != nil {
		return fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	for _, record := range records {
		switch {
		case record.ID != id:
			continue
		case record.Role == ledger.RoleRoot:
			return Invalid(fmt.Errorf("the authority %s is a root: every new issuing CA would be under it again. Replace a compromised root", id))
		}
		if record.Tainted {
			return kinded{ledger.ErrAlready, fmt.Errorf("the authority %s is tainted already", id)}
		}
		_, err := c.ledger.Append(ctx, &ledger.Authority{ID: id, TrustDomain: c.td.Name(), From: record.State, To: record.State, Tainted: true, Reason: reason, By: by})
		// The append may have landed though the caller went away, so the ledger is asked in any case.
		return errors.Join(err, c.reload(context.WithoutCancel(ctx)))
	}
	return fmt.Errorf("the authority %s: %w", id, ledger.ErrNotFound)
}
