package ca

import (
	"context"
	"fmt"

	"kedge/ca/ledger"
)

// ConfirmClock takes an admin's word that the wall clock is right, and records it: what waits for time that is borne out goes on. by names the admin.
func (c *CA) ConfirmClock(ctx context.Context, by string) (number uint64, waiver *ledger.Waiver, err error) {
	now := c.now()
	waiver = &ledger.Waiver{Gate: "clock", From: ledger.At(c.guarded.Now()), To: ledger.At(now), By: by}
	if number, err = c.ledger.Append(ctx, waiver); err != nil {
		return 0, nil, fmt.Errorf("recording that the clock is right: %w", err)
	}
	c.guarded.Corroborate(now)
	return number, waiver, nil
}
