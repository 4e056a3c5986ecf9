package ca

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Problem is something that is wrong though the CA goes on.
type Problem struct {
	About string // the part, in a few words of which there are few, such as "root" or "key store"
	Err   error  // what is wrong, on what, and what to do; it may have FileErrors in it
}

func (p Problem) Error() string { return p.About + ": " + p.Err.Error() }

// Unwrap returns what is wrong.
func (p Problem) Unwrap() error { return p.Err }

// FileError is an error about a file that somebody else writes, for whoever wants to know without reading the text: monitoring.
type FileError struct {
	File   string // its name, without the folder
	Reason Reason
	Err    error // says all of it, the file too
}

func (e *FileError) Error() string { return e.Err.Error() }

// Unwrap returns the whole error.
func (e *FileError) Unwrap() error { return e.Err }

// Reason says in a word why a file is no good. There are no others than these.
type Reason string

// The reasons.
const (
	Incomplete     Reason = "incomplete"      // it is not there, or something that belongs into it
	Unreadable     Reason = "unreadable"      // it cannot be read or decrypted, or is of no form that is read
	Exposed        Reason = "exposed"         // it is a secret, and others may get at it
	Mismatched     Reason = "mismatched"      // what is in it does not belong to what is in the other files
	Unfit          Reason = "unfit"           // a certificate in it cannot be what it is there for
	Expired        Reason = "expired"         // a certificate or a CRL in it is
	NotYetValid    Reason = "not-yet-valid"   // a certificate in it is valid only from a later time on
	OutlivesIssuer Reason = "outlives-issuer" // a certificate in it would be valid for longer than what it chains to
)

// FileErrors returns those in an error, however it was wrapped and joined.
func FileErrors(err error) (all []*FileError) {
	if e, ok := err.(*FileError); ok {
		return []*FileError{e}
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return FileErrors(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, part := range e.Unwrap() {
			all = append(all, FileErrors(part)...)
		}
	}
	return all
}

// What a problem may be about without which issuing goes on until the issuing CA ends.
const (
	aboutRoot    = "root"
	aboutIssuing = "issuing CA"
)

// problems are what is wrong now, by what it is about, so that each is logged when it comes and when it goes.
type problems struct {
	mu   sync.Mutex
	said map[string]error
}

// set notes that about has the problem err, or none any more, and says whether that is news.
func (p *problems) set(about string, err error) (news bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.said[about]
	if err == nil {
		delete(p.said, about)
		return before != nil
	}
	p.said[about] = err
	return before == nil || before.Error() != err.Error()
}

// each calls do for all that is noted.
func (p *problems) each(do func(about string, err error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for about, err := range p.said {
		do(about, err)
	}
}

// Problems lists what is wrong though the CA goes on: each with what it is about and what to do, and when it goes on no longer.
func (c *CA) Problems() []Problem {
	var all []Problem
	active := c.trust.Load().active
	add := func(about string, err error) {
		if (about == aboutRoot || about == aboutIssuing) && active != nil {
			err = fmt.Errorf("%w. The issuing CA that there is ends at %s", err, active.notAfter.UTC().Format(time.RFC3339))
		}
		all = append(all, Problem{about, err})
	}
	c.problems.each(add)
	for about, part := range map[string]any{aboutRoot: c.root, "key store": c.keys, "trust anchors": c.anchors} {
		if reporter, ok := part.(Reporter); ok {
			if err := reporter.Problem(); err != nil {
				add(about, err)
			}
		}
	}
	if err := c.ledger.Fault(); err != nil {
		all = append(all, Problem{"ledger", err})
	}
	if ending := c.ending(); ending.Err != nil {
		all = append(all, ending)
	}
	if err := c.guarded.Behind(); err != nil {
		all = append(all, Problem{"clock", err})
	}
	return all
}

// ending says when certificates are, or soon will be, cut short by the end of what they chain to.
func (c *CA) ending() (none Problem) {
	t, now := c.trust.Load(), c.now()
	for _, root := range t.roots {
		if left := root.notAfter.Sub(now); left < 2*c.issuingLifetime {
			return Problem{aboutRoot, fmt.Errorf("%s ends at %s, in less than two lifetimes of an issuing CA: plan its successor now", root.short(), root.notAfter.Format(time.RFC3339))}
		}
	}
	var longest time.Duration
	for _, profile := range c.profiles {
		longest = max(longest, profile.MaxTTL())
	}
	if t.active != nil && t.active.notAfter.Sub(now) < longest {
		return Problem{aboutIssuing, fmt.Errorf("%s ends at %s, so certificates are cut short: its renewal is overdue", t.active.short(), t.active.notAfter.Format(time.RFC3339))}
	}
	return none
}

// Note lists err in Problems as what is wrong about something, until it is noted anew; nil means that it works. It is logged when it comes and
// when it goes. An end of the CA itself (context.Canceled) is no problem.
func (c *CA) Note(about string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	if !c.problems.set(about, err) {
		return
	}
	if err != nil {
		c.log.Error("something is wrong and is tried again", "about", about, "error", err)
	} else {
		c.log.Info("works again", "about", about)
	}
}
