package sds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/ca/pemfile"
	"kedge/issuer/reception"
)

// How long it takes until a failed issue is tried again: at first, and at most.
const (
	firstRetry = time.Second
	mostRetry  = time.Minute
)

// issue gives the stream its SVID, or its next one. The old one stays until there is another, or it expires.
func (s *session) issue() {
	s.mu.Lock()
	before := s.held
	s.mu.Unlock()
	next, err := s.make(before)
	s.mu.Lock()
	s.issuing = false
	if err == nil {
		s.before, s.held, s.retry = s.held, next, 0
		s.try = next.try
		s.tell()
		s.mu.Unlock()
		return
	}
	lasts := !errors.Is(err, ca.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) && s.ctx.Err() == nil
	s.retry = min(max(s.retry, firstRetry), mostRetry)
	s.try = time.Now().Add(part(s.retry, 0.5, 1))
	s.retry *= 2
	over, goesOn := s.over, before == nil && s.wants.Bundle
	if s.barred = lasts; lasts {
		s.held = nil // kept for the stream that comes back, it would end that one, too: nothing follows on it
	}
	s.mu.Unlock()
	if over || s.ctx.Err() != nil {
		return
	}
	result, answer := reception.Refuse(s.id, err)
	s.callers.Metrics.SDSIssueFailed()
	if _, tell := s.callers.failures.Tell(time.Now()); lasts || tell { // what is tried again fails for all streams at once, and again
		s.callers.LogRefusal(s.ctx, "an SDS stream does not get its SVID, and keeps the one that it has", s.id, result, s.caller, err)
	}
	if lasts && !goesOn {
		s.expire(answer)
	}
}

// make makes a key, and has the CA issue an SVID for it, in its turn.
func (s *session) make(before *held) (h *held, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.callers.Log.Error("panic while issuing for an SDS stream", "request_id", s.id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	place, err := s.callers.Enter(s.ctx, s.address)
	if err != nil {
		return nil, err
	}
	defer place.Leave()
	ctx, cancel := context.WithTimeout(s.ctx, s.callers.timeout)
	defer cancel()
	caller := s.caller
	// The SVID is another certificate than the one that opened the stream, which goes on.
	caller.Presented, caller.Replaces = nil, 0
	if len(s.certificates) > 0 {
		if _, err := s.callers.ca.ClientCertificates().Verify(ctx, s.certificates); err != nil {
			return nil, err
		}
	}
	if before != nil {
		caller.Replaces = before.number
		caller.IssuedAt = time.Time{} // it says nothing of the time of now
	}
	granted, err := s.callers.ca.Grant(caller, "")
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	requested, err := granted.ForKey(key.Public())
	if err != nil {
		return nil, err
	}
	place.Checked()
	issued, err := requested.Issue(ctx, ca.Request{Delivery: ledger.DeliverySDS, RequestID: s.id})
	if err != nil {
		return nil, err
	}
	chain, err := pemfile.Certificates([]byte(strings.Join(issued.Chain, "")))
	if err != nil {
		return nil, fmt.Errorf("parsing what was issued: %w", err)
	}
	svid := &SVID{ID: issued.ID, Chain: chain, Key: key, NotBefore: issued.NotBefore, NotAfter: issued.NotAfter}
	s.callers.Metrics.Issued(ca.DefaultProfile, caller.Proofs[0].Method, false)
	s.logIssued(issued)
	now := s.callers.ca.Now()
	half := part(issued.NotAfter.Sub(now), 0.45, 0.55)
	return &held{svid: svid, number: issued.Number, serial: issued.Serial, authority: issued.Authority, renew: now.Add(half), try: time.Now().Add(half)}, nil
}
