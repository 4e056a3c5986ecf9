package ledger

import (
	"errors"
	"fmt"
	"slices"
)

func (b *batch) confirm(event *Confirm) error {
	issue, err := b.findIssue(event.Number)
	if err != nil {
		return err
	}
	if issue == nil || string(issue.Serial) != string(event.Serial) {
		return fmt.Errorf("confirming the certificate with serial %s of event %d: %w", event.Serial, event.Number, ErrNotFound)
	}
	if event.Bundle != 0 && b.table(bucketBundles).Get(number(event.Bundle)) == nil {
		return fmt.Errorf("confirming that the holder of the certificate of event %d has trust bundle %d: %w", event.Number, event.Bundle, ErrNotFound)
	}
	state := b.settled(event.Number)
	from, to := holdingOf(issue, state.Bundle), holdingOf(issue, event.Bundle)
	newer := event.Bundle > from.bundle
	switch {
	case state.Superseded:
		return fmt.Errorf("confirming the certificate of event %d, whose join token %q was redeemed again: %w", event.Number, issue.Token, ErrSuperseded)
	case event.Bundle != 0 && (event.Bundle < from.bundle || state.Confirmed && !newer):
		return fmt.Errorf("confirming that the holder of the certificate of event %d has trust bundle %d, where it counts under %d: %w",
			event.Number, event.Bundle, from.bundle, ErrAlready)
	case state.Confirmed && !newer:
		return fmt.Errorf("confirming the certificate of event %d: %w", event.Number, ErrAlready)
	}
	moves := newer && !state.Retired
	if moves {
		row, err := b.holding(from)
		if err != nil {
			return err
		}
		moves = row.count > 0 // 0: Prune dropped the row, since its hour is past
	}
	confirmed := *event
	confirmed.Retires = 0
	var retires holdingKey
	if !state.Confirmed {
		var found bool
		if retires, found, err = b.retires(issue, event.Number); err != nil {
			return err
		}
		if found {
			confirmed.Retires = issue.Replaces
		}
	}
	encoded, err := b.reencode(&confirmed)
	if err != nil {
		return err
	}

	if _, err := b.store(TypeConfirm, encoded); err != nil {
		return err
	}
	if moves {
		if err := errors.Join(b.countDown(from), b.countUp(to, issue.NotAfter)); err != nil {
			return err
		}
	}
	err = b.settle(event.Number, func(s *IssueState) {
		s.Confirmed = true
		if newer {
			s.Bundle = event.Bundle
		}
	})
	if err != nil || confirmed.Retires == 0 {
		return err
	}
	if err := b.countDown(retires); err != nil {
		return err
	}
	return b.settle(confirmed.Retires, func(s *IssueState) { s.Retired = true })
}

// retires finds the row in which the certificate counts that no longer does once its successor, issue n, is confirmed: the one that it replaces, if that
// is unexpired and not retired yet. found is false when there is none.
func (b *batch) retires(successor *Issue, n uint64) (key holdingKey, found bool, err error) {
	issue, state, err := b.predecessor(successor, n)
	if err != nil || issue == nil || state.Retired || issue.NotAfter <= b.now {
		return key, false, err
	}
	key = holdingOf(issue, state.Bundle)
	row, err := b.holding(key)
	return key, row.count > 0, err // 0: Prune dropped the row, since its hour is past
}

// predecessor finds the issue that another one, issue n, replaces, and what became of it, if one holder has both: they are for the same name, and went out in the same
// way, by SDS to the same Holder. It is nil when there is none. Of one that was superseded nobody knows who has it.
func (b *batch) predecessor(successor *Issue, n uint64) (*Issue, IssueState, error) {
	if successor.Replaces == 0 || successor.Replaces >= n {
		return nil, IssueState{}, nil
	}
	issue, err := b.findIssue(successor.Replaces)
	if err != nil || issue == nil || !follows(successor, issue) {
		return nil, IssueState{}, err
	}
	state := b.settled(successor.Replaces)
	if state.Superseded {
		return nil, IssueState{}, nil
	}
	return issue, state, nil
}

// follows says whether one holder has both certificates, of which the first replaces the second. It does not where the second is superseded by that.
func follows(successor, issue *Issue) bool {
	return successor.Supersedes != successor.Replaces && issue.SPIFFEID == successor.SPIFFEID && slices.Equal(issue.Names, successor.Names) && issue.Delivery == successor.Delivery &&
		(issue.Delivery != DeliverySDS || issue.Holder == successor.Holder)
}

// findIssue returns the issue event n, nil when the log has no such issue.
func (b *batch) findIssue(n uint64) (*Issue, error) {
	raw := b.tx.Bucket(bucketEvents).Get(number(n))
	if raw == nil {
		return nil, nil
	}
	e, err := DecodeEvent(raw)
	if err != nil {
		return nil, damaged{fmt.Errorf("event %d: %w", n, err)}
	}
	issue, _ := e.Body.(*Issue)
	return issue, nil
}

// settled says what became of issue n.
func (b *batch) settled(n uint64) IssueState {
	return decodeSettled(b.table(bucketSettled).Get(number(n)))
}

// settle notes what became of issue n.
func (b *batch) settle(n uint64, change func(*IssueState)) error {
	state := b.settled(n)
	change(&state)
	return b.put(b.table(bucketSettled), number(n), state.encode())
}
