package ledger

import (
	"fmt"
)

func (b *batch) issue(event *Issue, encoded []byte) error {
	authority, err := b.lookup(event.Authority)
	switch {
	case err != nil:
		return err
	case authority == nil:
		return fmt.Errorf("issuing under the authority %s, which this ledger does not know: %w", event.Authority, ErrNotActive)
	case authority.State != StateActive:
		return fmt.Errorf("issuing under the authority %s, which is %s: %w", event.Authority, authority.State, ErrNotActive)
	case authority.Tainted:
		return fmt.Errorf("issuing under the authority %s, which is tainted: %w", event.Authority, ErrNotActive)
	}
	current, floor := b.currentBundle()
	if event.Bundle == 0 || event.Bundle > current {
		return fmt.Errorf("issuing with trust bundle %d, where the latest is %d: %w", event.Bundle, current, ErrNotFound)
	}
	if event.Bundle < floor {
		return fmt.Errorf("issuing with trust bundle %d, where the floor is %d: %w", event.Bundle, floor, ErrBelowFloor)
	}
	var token tokenRow
	filled := *event
	filled.Supersedes, filled.Held = 0, 0
	if event.Token != "" {
		if token, err = b.redeemable(event.Token); err != nil {
			return err
		}
		if token.Token.SPIFFEID != event.SPIFFEID {
			return fmt.Errorf("join token %q is for %s and not for %s: %w", event.Token, token.Token.SPIFFEID, event.SPIFFEID, ErrTokenUnknown)
		}
		if !token.Token.Reusable && token.Redeemed > 0 {
			filled.Supersedes = token.Last
			if filled.Replaces == 0 {
				filled.Replaces = token.Last
			}
		}
	}
	if revoked, err := b.revokedIssue(event.Replaces); err != nil {
		return err
	} else if revoked {
		return fmt.Errorf("renewing the certificate of event %d: %w", event.Replaces, ErrRevoked)
	}
	for _, proof := range event.Proofs {
		if b.revokedProof(proof) {
			return fmt.Errorf("issuing to whoever has the client certificate %s: %w", proof.Subject, ErrRevoked)
		}
	}
	if filled.Delivery == DeliverySDS {
		before, state, err := b.predecessor(&filled, b.head.Number+1)
		if err != nil {
			return err
		}
		if before != nil {
			filled.Held = holdingOf(before, state.Bundle).bundle
		}
	}
	key := holdingOf(&filled, 0)
	if _, err := b.holding(key); err != nil {
		return err
	}
	if filled.Supersedes != event.Supersedes || filled.Held != event.Held {
		if encoded, err = b.reencode(&filled); err != nil {
			return err
		}
	}

	n, err := b.store(TypeIssue, encoded)
	if err != nil {
		return err
	}
	if err := b.countUp(key, event.NotAfter); err != nil {
		return err
	}
	if event.Token == "" {
		return nil
	}
	if filled.Supersedes != 0 {
		b.superseded = append(b.superseded, superseded{event.Token, event.SPIFFEID, n, filled.Supersedes})
		if err := b.settle(filled.Supersedes, func(s *IssueState) { s.Superseded = true }); err != nil {
			return err
		}
	}
	token.redeem(n, b.now)
	return b.putRow(bucketTokens, []byte(event.Token), token)
}

// redeem notes a redemption by the issue n.
func (r *tokenRow) redeem(n uint64, now Time) {
	if r.Redeemed == 0 {
		r.First = now
	}
	r.Redeemed++
	r.Last = n
}

// redeemable finds a join token that may be redeemed now.
func (b *batch) redeemable(id string) (row tokenRow, err error) {
	value := b.table(bucketTokens).Get([]byte(id))
	if value == nil {
		return row, fmt.Errorf("join token %q: %w", id, ErrTokenUnknown)
	}
	if row, err = decodeRow[tokenRow](bucketTokens, value); err != nil {
		return row, err
	}
	switch {
	case row.Token.Expires <= b.wall:
		return row, fmt.Errorf("join token %q, at %s: %w", id, row.Token.Expires, ErrTokenExpired)
	case row.Token.Reusable || row.Redeemed == 0:
		return row, nil
	case row.Redeemed > redemptionRetries:
		return row, fmt.Errorf("join token %q was redeemed %d times: %w", id, row.Redeemed, ErrTokenSpent)
	case b.now > row.First+redemptionWindow:
		return row, fmt.Errorf("join token %q was redeemed at %s, more than five minutes ago: %w", id, row.First, ErrTokenSpent)
	case b.settled(row.Last).Confirmed: // all before it are superseded, so that none of them can be
		return row, fmt.Errorf("join token %q was redeemed, and its holder has the certificate (event %d): %w", id, row.Last, ErrTokenSpent)
	}
	revoked, err := b.revokedIssue(row.Last)
	if err == nil && revoked {
		err = fmt.Errorf("join token %q was redeemed, and the certificate (event %d) was revoked: %w", id, row.Last, ErrTokenSpent)
	}
	return row, err
}

// revokedIssue says whether the certificate of issue n is revoked. Where nothing is, as mostly, that costs next to nothing.
func (b *batch) revokedIssue(n uint64) (bool, error) {
	table := b.table(bucketRevoked)
	if key, _ := table.Cursor().First(); key == nil || n == 0 {
		return false, nil
	}
	issue, err := b.findIssue(n)
	return issue != nil && table.Get(issue.Serial) != nil, err
}

// revokedProof says whether a proof is a client certificate that is revoked. It need not be what is replaced: an SDS stream's SVID is another certificate.
func (b *batch) revokedProof(proof Proof) bool {
	serial, err := ParseSerial(proof.Subject)
	return proof.Method == MethodClientCertificate && err == nil && b.table(bucketRevoked).Get(serial) != nil
}
