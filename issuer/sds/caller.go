package sds

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/gate"
	"kedge/issuer/metrics"
	"kedge/issuer/reception"
	"kedge/issuer/sparing"
)

// Callers is the Opener of a CA: a stream's secrets are its caller's, who is found out as for a CSR. Make one with NewCallers, and let Run look after the streams.
// Its methods may be called at once from several goroutines.
type Callers struct {
	*reception.Desk
	ca          *ca.CA
	privateKeys bool
	timeout     time.Duration
	lines       sparing.Lines // about who asks for keys
	failures    sparing.Lines // of issues that are tried again
	trusted     atomic.Pointer[trusted]
	acks        acks

	mu          sync.Mutex
	sessions    map[*session]struct{}
	connections map[gate.Connection][]*connection // one for each holder
	departed    map[*connection]bool              // from which streams departed
	retired     map[gate.Connection]time.Time     // that are to end, and since when
	parked      map[string]parked                 // SVIDs whose streams have ended, by serial number
	tainted     map[ledger.Hash]bool              // authorities
}

// CallersOptions are what Callers are made of. All are required.
type CallersOptions struct {
	Desk        *reception.Desk
	CA          *ca.CA
	PrivateKeys bool          // whether keys are made for callers who ask for an SVID
	Timeout     time.Duration // of finding out who calls, and of an issue, once they have their turn
}

// trusted is what all streams share. It never changes.
type trusted struct {
	bundles []*Bundle     // one
	changed chan struct{} // closed when there is another
}

// NewCallers makes an Opener.
func NewCallers(o CallersOptions) *Callers {
	c := &Callers{Desk: o.Desk, ca: o.CA, privateKeys: o.PrivateKeys, timeout: o.Timeout, sessions: map[*session]struct{}{},
		connections: map[gate.Connection][]*connection{}, departed: map[*connection]bool{}, retired: map[gate.Connection]time.Time{}, parked: map[string]parked{}, tainted: map[ledger.Hash]bool{}}
	c.acks.init(o.CA, o.Desk.Log)
	c.trusted.Store(&trusted{bundles: c.bundles(nil), changed: make(chan struct{})})
	return c
}

// bundles are the CA's. The slice stays the same while they do.
func (c *Callers) bundles(before []*Bundle) []*Bundle {
	b := c.ca.Bundle()
	incarnation := b.Incarnation().String()
	if len(before) == 1 && before[0].Sequence == b.Sequence && before[0].Incarnation == incarnation {
		return before
	}
	return []*Bundle{{TrustDomain: c.ca.TrustDomain(), Incarnation: incarnation, Sequence: b.Sequence, Roots: b.Roots, PEM: b.PEM}}
}

// Open finds out who opens a stream, in its turn. Refusals are those of the CSR API.
func (c *Callers) Open(ctx context.Context) (Source, error) {
	id := reception.NewRequestID()
	_ = grpc.SetHeader(ctx, metadata.Pairs(reception.RequestIDHeader, id)) // fails only after the header was sent
	s, caller, err := c.open(ctx, id)
	if errors.Is(err, errRetired) {
		return nil, errRetired
	}
	if err != nil {
		result, answer := reception.Refuse(id, err)
		c.Metrics.SDSOpened(result)
		c.LogRefusal(ctx, "an SDS stream is refused", id, result, caller, err)
		return nil, answer
	}
	c.Metrics.SDSOpened(metrics.ResultOpened)
	return s, nil
}

func (c *Callers) open(ctx context.Context, id string) (*session, ca.Caller, error) {
	credentials, place, err := c.Admit(ctx, id)
	if err != nil {
		return nil, ca.Caller{Peer: credentials.Peer}, err
	}
	defer place.Leave()
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	caller, err := c.Desk.Callers.Authenticate(limited, credentials)
	if err != nil {
		return nil, caller, err
	}
	if caller.JoinToken != "" {
		return nil, caller, ca.Denied(errors.New("a join token opens no stream: it is spent for one certificate, which renews itself from then on. " +
			"Have 'kedge svid fetch' or 'kedge agent' spend it, and the stream opened with that certificate"))
	}
	s := &session{callers: c, caller: caller, ctx: ctx, id: id, ended: make(chan struct{}), changed: make(chan struct{})}
	if p, ok := peer.FromContext(ctx); ok {
		s.address = p.Addr
	}
	if slices.ContainsFunc(caller.Proofs, func(p ledger.Proof) bool { return p.Method == ca.MethodClientCertificate }) {
		s.certificates = credentials.Certificates
	}
	now := c.ca.Now()
	lasts := part(caller.Until.Sub(now), 0.90, 0.98)
	s.ends, s.lasts = now.Add(lasts), time.Now().Add(lasts)
	s.check = time.Now().Add(part(checkEvery, 0.5, 1))
	if err := c.enrol(s); err != nil {
		return nil, caller, err
	}
	return s, caller, nil
}

// part is between these parts of d.
func part(d time.Duration, least, most float64) time.Duration {
	return time.Duration(float64(d) * (least + (most-least)*rand.Float64()))
}

// errRetired is for a client that is faster than the end of its connection, which has been explained to it.
var errRetired = status.Error(codes.Unavailable, "this connection is about to end, with the client certificate that made it: come back on another")

// enrol adds a session.
func (c *Callers) enrol(s *session) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	through, _ := gate.ConnectionOf(s.ctx)
	if _, ending := c.retired[through]; ending {
		return errRetired
	}
	key := connectionKey{through, s.caller.ID, s.caller.Holder}
	if i := slices.IndexFunc(c.connections[through], func(there *connection) bool { return there.key == key }); i >= 0 {
		s.connection = c.connections[through][i]
	} else {
		s.connection = &connection{key: key, sessions: map[*session]struct{}{}, departed: map[uint64]time.Time{}, issues: map[uint64]ledger.Serial{}}
		c.connections[through] = append(c.connections[through], s.connection)
	}
	s.connection.sessions[s] = struct{}{}
	if p := s.caller.Presented; p != nil {
		s.connection.issues[p.Number] = p.Serial
		c.acks.add(ack{number: p.Number, serial: p.Serial, presented: true})
	}
	c.sessions[s] = struct{}{}
	return nil
}

// leave takes a session away.
func (c *Callers) leave(s *session) {
	held := s.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, s)
	if held != nil {
		delete(s.connection.issues, held.number)
		if len(c.parked) < maxParked {
			c.parked[serialOf(held.svid)] = parked{held, s.caller.Holder, time.Now().Add(parkedFor)}
		}
	}
	c.depart(s)
}

// An SVID is kept for a stream that comes back, as it does when its connection was ended for its age: who names its serial number, and is the same holder, has it
// already, and needs no other.
const (
	maxParked = 10_000
	parkedFor = 2 * time.Minute
)

type parked struct {
	*held
	holder ledger.Holder
	until  time.Time
}

// unpark finds the SVID that a stream's client has from an earlier one. It may be nil.
func (c *Callers) unpark(serial string, caller ca.Caller) *held {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.parked[serial]
	if !ok || p.holder != caller.Holder || p.svid.ID != caller.ID || c.tainted[p.authority] {
		return nil
	}
	delete(c.parked, serial)
	return p.held
}

const (
	// checkEvery is about how often it is looked whether a client certificate still authenticates.
	checkEvery = 10 * time.Second
	// How often the streams are looked at, and how much of the time: of 200,000 one is always due, and each look at all of them takes 30 ms.
	leastPass, mostPass = 20 * time.Millisecond, time.Second
	partOfTime          = 20
	// retiredFor is how long no stream begins on a connection that ends.
	retiredFor = 30 * time.Second
)

// Run renews SVIDs, tells the streams of a new bundle, and ends those whose time has come, until ctx ends. It is called once.
func (c *Callers) Run(ctx context.Context) error {
	var before <-chan struct{}
	for {
		changed := c.ca.Changed() // asked for before looking, so that no change is lost
		wait := c.look(changed != before)
		before = changed
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			c.acks.stop()
			return nil
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// look looks at everything once, and says when to do so again. changed says whether authorities or the bundle may have changed.
func (c *Callers) look(changed bool) time.Duration {
	began := time.Now()
	if changed {
		if tainted, err := c.ca.Tainted(); err == nil {
			c.mu.Lock()
			changed = !maps.Equal(c.tainted, tainted) // nothing else of authorities takes a client certificate its worth
			c.tainted = tainted
			c.mu.Unlock()
		} else {
			c.Log.Error("it is not known which authorities are tainted: SVIDs under them are replaced at half of their life", "error", err)
		}
	}
	before := c.trusted.Load()
	if now := c.bundles(before.bundles); now[0] != before.bundles[0] {
		c.trusted.Store(&trusted{bundles: now, changed: make(chan struct{})})
		close(before.changed)
	}
	c.acks.retry()
	all := c.passOver()
	now := c.ca.Now()
	next := now.Add(mostPass)
	for _, s := range all {
		if due := s.look(now); due.Before(next) {
			next = due
		}
	}
	return rest(next.Sub(now), time.Since(began))
}

// rest is the time until the next look, when something is due after due and the last look took so long.
func rest(due, took time.Duration) time.Duration {
	return min(max(due, leastPass, partOfTime*took), mostPass)
}

// passOver drops what is too old, and returns the sessions.
func (c *Callers) passOver() []*session {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, valid := time.Now(), c.ca.Now()
	for serial, p := range c.parked {
		if now.After(p.until) || !valid.Before(p.svid.NotAfter) {
			delete(c.parked, serial)
		}
	}
	c.forget()
	for connection, since := range c.retired {
		if now.Sub(since) > retiredFor {
			delete(c.retired, connection)
		}
	}
	all := make([]*session, 0, len(c.sessions))
	for s := range c.sessions {
		all = append(all, s)
	}
	return all
}

// isTainted says whether an authority is.
func (c *Callers) isTainted(authority ledger.Hash) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tainted[authority]
}

// retire ends a connection, and first its streams, so that each learns why: a client that opened them again on the same one would come with the same certificate.
func (c *Callers) retire(connection gate.Connection, why error) {
	c.mu.Lock()
	_, already := c.retired[connection]
	c.retired[connection] = time.Now()
	var on []*session
	for _, one := range c.connections[connection] { // and not all sessions: when an issuing CA is tainted, everybody's connection ends
		on = slices.AppendSeq(on, maps.Keys(one.sessions))
	}
	c.mu.Unlock()
	for _, s := range on {
		s.end(why)
	}
	if !already && connection != (gate.Connection{}) {
		connection.Retire()
	}
}

// Stand says how a server's streams stand, for monitoring.
func (c *Callers) Stand(s *Server) (stand metrics.SDS) {
	b := c.ca.Bundle()
	for holding, n := range s.Holdings() {
		if holding.Incarnation != b.Incarnation().String() || holding.Sequence < b.Sequence {
			stand.Behind += n
		}
		if holding.Sequence != 0 && (stand.Oldest == 0 || holding.Sequence < stand.Oldest) {
			stand.Oldest = holding.Sequence
		}
	}
	return stand
}

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
