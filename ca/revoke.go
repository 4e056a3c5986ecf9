package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kedge/ca/ledger"
)

// Revocation says what was revoked, and what goes on.
type Revocation struct {
	Revoked []ledger.Revoke `json:"revoked"` // in order of their numbers
	Alive   []Successor     `json:"alive"`   // what follows on it, and was not asked to be revoked: unexpired, not revoked
}

// Successor is a certificate that follows on another one.
type Successor struct {
	Number   uint64        `json:"number"` // of its issue
	Serial   ledger.Serial `json:"serial"`
	NotAfter ledger.Time   `json:"not_after"`
}

// maxRevokes is how many revocations go into one commit.
const maxRevokes = 256

// Revoke makes a certificate that this CA issued authenticate nobody any more. by names the admin. What renewed it meanwhile goes on, and is in the answer.
//
// The error wraps ledger.ErrNotFound for a serial that the ledger does not have, and ledger.ErrAlready for one that is revoked.
func (c *CA) Revoke(ctx context.Context, serial ledger.Serial, reason, by string) (Revocation, error) {
	l, err := c.lineageOf(ctx, serial)
	if err != nil {
		return Revocation{}, err
	}
	revoke := l.revoke(l.line[0], reason, by)
	_, err = c.ledger.Append(ctx, &revoke)
	already := errors.Is(err, ledger.ErrAlready)
	if err != nil && !already {
		return Revocation{}, fmt.Errorf("recording the revocation: %w", err)
	}
	var alive []Successor
	if err = l.scan(ctx); err == nil { // what renewed it before that was recorded
		alive, err = l.alive(l.line[1:])
	}
	switch {
	case err != nil:
		return Revocation{}, fmt.Errorf("the certificate %s is revoked, and it is not known what renewed it before: %w", serial, err)
	case already && len(alive) > 0:
		return Revocation{}, kinded{ledger.ErrAlready, fmt.Errorf("the certificate %s is revoked already, and number %d follows on it and is alive: "+
			"'kedge svid revoke %s --lineage' revokes that too", serial, alive[len(alive)-1].Number, serial)}
	case already:
		return Revocation{}, kinded{ledger.ErrAlready, fmt.Errorf("the certificate %s is revoked already", serial)}
	}
	return Revocation{Revoked: []ledger.Revoke{revoke}, Alive: alive}, nil
}

// RevokeLineage revokes a certificate and every one that follows on it: all of them that have not expired. Nothing renews one of them once it returns
// without an error; with one, what is revoked stays so, and a further call goes on.
//
// The error wraps ledger.ErrNotFound for a serial that the ledger does not have, and ledger.ErrAlready when nothing is left to be revoked.
func (c *CA) RevokeLineage(ctx context.Context, serial ledger.Serial, reason, by string) (Revocation, error) {
	l, err := c.lineageOf(ctx, serial)
	if err != nil {
		return Revocation{}, err
	}
	done := Revocation{Alive: []Successor{}}
	for {
		left, err := l.alive(l.line)
		if err != nil {
			return done, err
		}
		if len(left) == 0 {
			break
		}
		left = left[:min(len(left), maxRevokes)]
		revokes, bodies := make([]ledger.Revoke, len(left)), make([]ledger.Body, len(left))
		for i, one := range left {
			revokes[i] = l.revoke(one, reason, by)
			bodies[i] = &revokes[i]
		}
		switch _, err := c.ledger.Append(ctx, bodies...); {
		case errors.Is(err, ledger.ErrAlready): // another admin was faster with one of them, which is seen now
			continue
		case err != nil:
			return done, fmt.Errorf("recording the revocations, after %d: %w", len(done.Revoked), err)
		}
		done.Revoked = append(done.Revoked, revokes...)
		// What renewed one of them before that commit is in the ledger by now. After it nothing can: the ledger refuses it.
		if err := l.scan(ctx); err != nil {
			return done, fmt.Errorf("%d certificates are revoked, and it is not known what renewed them before: %w", len(done.Revoked), err)
		}
	}
	if len(done.Revoked) == 0 {
		return done, kinded{ledger.ErrAlready, fmt.Errorf("of the certificate %s and what follows on it all is revoked already, or has expired", serial)}
	}
	return done, nil
}

// lineage is a certificate and what follows on it, as far as the ledger was read.
type lineage struct {
	ca      *CA
	line    []Successor // in order of their numbers
	numbers map[uint64]bool
	serials map[string]bool
	next    uint64 // number up to which the ledger was read
}

// lineageOf finds a certificate and, in one scan from its number on, what follows on it.
func (c *CA) lineageOf(ctx context.Context, serial ledger.Serial) (*lineage, error) {
	l := &lineage{ca: c, numbers: map[uint64]bool{}, serials: map[string]bool{}}
	for event, err := range c.ledger.Events(ctx, ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, Serial: serial, Limit: 1}) {
		if err != nil {
			return nil, fmt.Errorf("looking the serial %s up: %w", serial, err)
		}
		l.add(event.Number, event.Body.(*ledger.Issue))
	}
	if len(l.line) == 0 {
		return nil, kinded{ledger.ErrNotFound, fmt.Errorf("the ledger has no certificate with the serial %s", serial)}
	}
	l.next = l.line[0].Number + 1
	return l, l.scan(ctx)
}

// proves says whether an issue was had with one of the certificates, such as an SVID of an SDS stream, which replaces none.
func (l *lineage) proves(issue *ledger.Issue) bool {
	return slices.ContainsFunc(issue.Proofs, func(p ledger.Proof) bool { return p.Method == MethodClientCertificate && l.serials[p.Subject] })
}

func (l *lineage) add(number uint64, issue *ledger.Issue) {
	l.numbers[number], l.serials[issue.Serial.String()] = true, true
	l.line = append(l.line, Successor{Number: number, Serial: issue.Serial, NotAfter: issue.NotAfter})
}

// scan reads on in the ledger, up to what is there now.
func (l *lineage) scan(ctx context.Context) error {
	end := l.ca.ledger.Head().Number
	if end < l.next {
		return nil
	}
	for event, err := range l.ca.ledger.Events(ctx, ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, From: l.next, To: end}) {
		if err != nil {
			return fmt.Errorf("looking for what follows on the certificate %s: %w", l.line[0].Serial, err)
		}
		if issue := event.Body.(*ledger.Issue); l.numbers[issue.Replaces] || l.numbers[issue.Supersedes] || l.proves(issue) {
			l.add(event.Number, issue)
		}
	}
	l.next = end + 1
	return nil
}

// alive are those of the certificates that have neither expired nor been revoked.
func (l *lineage) alive(line []Successor) ([]Successor, error) {
	alive, now := []Successor{}, ledger.At(l.ca.now())
	for _, one := range line {
		revoked, err := l.ca.ledger.Revoked(one.Serial)
		if err != nil {
			return nil, fmt.Errorf("looking for a revocation of the certificate %s: %w", one.Serial, err)
		}
		if one.NotAfter > now && !revoked {
			alive = append(alive, one)
		}
	}
	return alive, nil
}

func (l *lineage) revoke(one Successor, reason, by string) ledger.Revoke {
	return ledger.Revoke{Serial: one.Serial, Number: one.Number, NotAfter: one.NotAfter, Reason: reason, By: by}
}
