package ca

import "context"

// ParseCSR is parseCSR, for fuzzing.
var ParseCSR = parseCSR

// Housekeep does what Run does at each tick.
func (c *CA) Housekeep(ctx context.Context) {
	c.renew(ctx)
	c.chores(ctx)
}

// RemoveRetired does that part of it.
func (c *CA) RemoveRetired(ctx context.Context) {
	c.Note("removal of retired issuing CAs", c.removeRetired(ctx))
}

// CrashAfterPreparing makes and records a new issuing CA, and stops before it takes over.
func (c *CA) CrashAfterPreparing(ctx context.Context) error {
	next, _, err := c.makeIssuing(ctx, c.trust.Load())
	if err != nil {
		return err
	}
	return c.prepare(ctx, next)
}
