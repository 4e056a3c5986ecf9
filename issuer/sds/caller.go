package sds

import (
	"context"
	"errors"
	"math/rand/v2"
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
