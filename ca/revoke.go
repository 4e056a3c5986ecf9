package ca

import (
	"context"
	"errors"
	"fmt"

	"kedge/ca/ledger"
)

// Revoke makes a certificate that this CA issued authenticate nobody any more. by names the admin.
func (c *CA) Revoke(ctx context.Context, serial ledger.Serial, reason, by string) (*ledger.Revoke, error) {
	var found *ledger.Issue
	var number uint64
	for event, err := range c.ledger.Events(ctx, ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, Serial: serial, Limit: 1}) {
		if err != nil {
			return nil, fmt.Errorf("looking the serial %s up: %w", serial, err)
		}
		found, number = event.Body.(*ledger.Issue), event.Number
	}
	if found == nil {
		return nil, fmt.Errorf("%w: the ledger has no certificate with the serial %s", ledger.ErrNotFound, serial)
	}
	revoke := &ledger.Revoke{Serial: serial, Number: number, NotAfter: found.NotAfter, Reason: reason, By: by}
	if _, err := c.ledger.Append(ctx, revoke); err != nil {
		if errors.Is(err, ledger.ErrAlready) {
			return nil, fmt.Errorf("%w: the certificate %s is revoked", ledger.ErrAlready, serial)
		}
		return nil, fmt.Errorf("recording the revocation: %w", err)
	}
	return revoke, nil
}
