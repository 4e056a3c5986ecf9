package ca

import (
	"context"
	"errors"
	"fmt"

	"kedge/ca/ledger"
)

// confirmedBySDS is how a holder was seen to have a certificate that it acknowledged, next to MethodClientCertificate.
const confirmedBySDS = "sds-ack"

// maxAcks is how many acknowledgements are in the ledger's queue at once. When a root changes all streams acknowledge it in the same second: what is more than
// that waits outside of the queue, which issuing needs, too.
const maxAcks = 2048

// Acknowledged records that the holder of a certificate acknowledged it on its own stream. bundle is the sequence number of the trust bundle
// that it acknowledged, by a name with which it verifies others, as its newest on that stream; 0: it acknowledged none yet. It is called for the first
// acknowledgement of the certificate, and then for each newer bundle; thousands may call at once, and share the ledger's commits.
//
// What is known already is no error. The error is ErrUnauthenticated when the certificate's join token was redeemed again meanwhile, ErrUnavailable when
// the ledger cannot be written, or that of ctx; it wraps ledger.ErrNotFound when the ledger has no such certificate (any more) or no such bundle.
func (c *CA) Acknowledged(ctx context.Context, number uint64, serial ledger.Serial, bundle uint64) error {
	select {
	case c.acks <- struct{}{}:
		defer func() { <-c.acks }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for other acknowledgements to be recorded: %w", ctx.Err())
	}
	return c.confirm(ctx, &ledger.Confirm{Number: number, Serial: serial, How: confirmedBySDS, Bundle: bundle})
}

// Presented records that a holder presented a certificate of this CA as its client certificate, where that opens a stream and no issue follows: with an
// issue Record does it. It may be nil: then none was presented. The errors are those of Acknowledged.
func (c *CA) Presented(ctx context.Context, presented *Presented) error {
	if presented == nil {
		return nil
	}
	state, err := c.ledger.IssueState(presented.Number)
	if errors.Is(err, ledger.ErrNotFound) {
		return err
	}
	if err != nil {
		return Unavailable(fmt.Errorf("reading issue %d from the ledger: %w", presented.Number, err))
	}
	if state.Confirmed {
		return nil
	}
	return c.confirm(ctx, &ledger.Confirm{Number: presented.Number, Serial: presented.Serial, How: MethodClientCertificate})
}

// confirm appends a confirmation, if it is news.
func (c *CA) confirm(ctx context.Context, event *ledger.Confirm) error {
	_, err := c.ledger.Append(ctx, event)
	switch {
	case err == nil, errors.Is(err, ledger.ErrAlready):
		return nil
	case errors.Is(err, ledger.ErrSuperseded):
		return Unauthenticated(fmt.Errorf("the ledger refuses the certificate: %w", err))
	case errors.Is(err, ledger.ErrNotFound), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return Unavailable(fmt.Errorf("recording in the ledger that the certificate of event %d is with its holder: %w", event.Number, err))
}
