package sds

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/metrics"
	"kedge/issuer/reception"
)

// session is the Source of a caller's stream.
type session struct {
	callers      *Callers
	caller       ca.Caller
	ctx          context.Context // the stream's
	id           string          // of the request, as in the log
	address      net.Addr
	certificates []*x509.Certificate // with which the stream was opened; none: with a token alone
	connection   *connection
	ends         time.Time // by the CA's clock
	lasts        time.Time // the same by a clock that nobody puts back

	// Of Callers.mu.
	verifies bool   // with the trust bundle that the stream asks for
	bundle   uint64 // the oldest that it has by one of its names; 0: by one of them it is not known to have any

	mu      sync.Mutex
	check   time.Time // when the client certificate is looked at again; monotonic
	wants   Wants
	changed chan struct{} // closed when there is another SVID, or another bundle for a stream with an SVID
	shared  *trusted      // that changed was made for
	ended   chan struct{}
	err     error
	over    bool // it ended, or is closed

	held    *held
	before  *held // that held replaced
	issuing bool
	barred  bool          // this stream gets no SVID
	try     time.Time     // when the next SVID is due; monotonic
	retry   time.Duration // wait after the next failure; 0: the last issue did not fail
}

// held is an SVID that a stream was given.
type held struct {
	svid      *SVID
	number    uint64 // of its issue
	serial    ledger.Serial
	authority ledger.Hash
	renew     time.Time // when the next is due by the CA's clock …
	try       time.Time // … and by one that nobody puts back
}

// String names the stream in the log.
func (s *session) String() string {
	return fmt.Sprintf("%s (request id %s)", s.caller.ID, s.id)
}

// Materials implements Source.
func (s *session) Materials() (*Materials, <-chan struct{}) {
	now := s.callers.trusted.Load()
	m := &Materials{ID: s.caller.ID, Bundles: now.bundles}
	if now.bundles[0].Sequence < s.callers.ca.Floor() {
		m.Bundles = nil // the next one is being taken up
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.wants.SVID {
		return m, now.changed
	}
	if s.held != nil {
		m.SVID = s.held.svid
	}
	s.shared = now
	return m, s.changed
}

// tell wakes a stream with an SVID. The session is locked.
func (s *session) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Want implements Source.
func (s *session) Want(wants Wants) {
	s.mu.Lock()
	asks := wants.SVID && !s.wants.SVID
	s.mu.Unlock()
	var has *held
	if asks && s.callers.privateKeys {
		has = s.callers.unpark(wants.Holds, s.caller)
	}
	s.mu.Lock()
	s.wants = wants // from here on Run issues for a stream that has none
	if has != nil {
		s.held, s.try = has, has.try
		s.tell()
	}
	s.mu.Unlock()
	s.callers.mu.Lock()
	s.verifies = wants.Own
	s.callers.mu.Unlock()
	if !asks {
		return
	}
	if !s.callers.privateKeys {
		s.refuseKeys(wants.Bundle)
		return
	}
	if has == nil {
		s.look(s.callers.ca.Now())
	}
}

// refuseKeys tells whoever asks for an SVID what to do. A stream that asks for bundles, too, goes on with them.
func (s *session) refuseKeys(goesOn bool) {
	const what = "an SVID was asked for by SDS, and this CA hands out no private keys: set sds.privateKeys to true in its configuration, or run 'kedge agent' beside the workload"
	if passedOver, tell := s.callers.lines.Tell(time.Now()); tell {
		s.callers.Log.Warn(what, "request_id", s.id, "spiffe_id", s.caller.ID.String(), "peer", s.caller.Peer, "goes_on_with_bundles", goesOn, "passed_over", passedOver)
	}
	s.callers.Metrics.SDSOpened(metrics.ResultKeysOff)
	s.mu.Lock()
	s.barred = true
	s.mu.Unlock()
	if !goesOn {
		s.end(status.Errorf(codes.PermissionDenied, "%s (request id %s)", what, s.id))
	}
}

// Ended implements Source.
func (s *session) Ended() <-chan struct{} { return s.ended }

// Err implements Source.
func (s *session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close implements Source.
func (s *session) Close() { s.callers.leave(s) }

// end ends the stream.
func (s *session) end(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.over, s.err = true, why
		close(s.ended)
	}
}

// close notes that the stream is over, and returns the SVID that its client has.
func (s *session) close() *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	return s.held
}

// look does what is due, and says when to look again.
func (s *session) look(now time.Time) (next time.Time) {
	if !now.Before(s.ends) || !time.Now().Before(s.lasts) {
		s.expire(status.Errorf(codes.Unavailable, "what this stream was opened with expires at %s: come back with its successor (request id %s)",
			s.caller.Until.UTC().Format(time.RFC3339), s.id))
		return now.Add(mostPass)
	}
	next = s.ends
	if len(s.certificates) > 0 && !s.stands() {
		return now.Add(mostPass)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wants.SVID && s.shared != nil && s.shared != s.callers.trusted.Load() {
		s.tell()
	}
	if !s.wants.SVID || s.barred || s.over {
		return next
	}
	if s.held != nil && !now.Before(s.held.svid.NotAfter) {
		s.held = nil // its client has it, and can do nothing with it
		s.tell()
	}
	if s.issuing {
		return next
	}
	due := time.Until(s.try)
	if s.held != nil && s.retry == 0 && (!now.Before(s.held.renew) || s.callers.isTainted(s.held.authority)) {
		due = 0
	}
	if due <= 0 {
		s.issuing = true
		go s.issue()
		return next
	}
	if try := now.Add(due); try.Before(next) {
		next = try
	}
	return next
}

// expire ends the stream, and when a client certificate opened it, the connection.
func (s *session) expire(why error) {
	if len(s.certificates) > 0 {
		s.callers.retire(s.connection.key.through, why)
	}
	s.end(why)
}

// stands looks now and then whether the client certificate still authenticates. It does not do so for all streams at once when authorities change, in the moment in which they get the
// next bundle: each certificate is verified anew then.
func (s *session) stands() bool {
	s.mu.Lock()
	due := !time.Now().Before(s.check)
	if due {
		s.check = time.Now().Add(part(checkEvery, 0.5, 1))
	}
	s.mu.Unlock()
	if !due {
		return true
	}
	_, err := s.callers.ca.ClientCertificates().Verify(s.ctx, s.certificates)
	if err == nil || errors.Is(err, ca.ErrUnavailable) || s.ctx.Err() != nil {
		return true // or it will be known later
	}
	result, answer := reception.Refuse(s.id, err)
	s.callers.LogRefusal(s.ctx, "an SDS stream is ended: its client certificate counts no more", s.id, result, s.caller, err)
	s.expire(answer)
	return false
}

// logIssued is the line of an SVID, as the CSR API writes it.
func (s *session) logIssued(issued *ca.Issued) {
	s.callers.Log.LogAttrs(s.ctx, slog.LevelInfo, "certificate issued", slog.String("request_id", s.id), slog.String("spiffe_id", issued.ID.String()),
		slog.String("serial", issued.Serial.String()), slog.Uint64("number", issued.Number), slog.String("method", s.caller.Proofs[0].Method),
		slog.String("peer", s.caller.Peer), slog.Time("not_after", issued.NotAfter), slog.String("delivery", "sds"))
}
