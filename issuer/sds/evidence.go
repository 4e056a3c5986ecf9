package sds

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/gate"
)

// connectionKey names what evidence is about: one holder on one connection. An Envoy has a stream for each secret, all on one connection, and the bundle that
// one of them acknowledges is the one with which it uses the SVID of another.
type connectionKey struct {
	through gate.Connection
	id      spiffeid.ID
	holder  ledger.Holder
}

// connection is what is known of a holder. It is of Callers.mu.
type connection struct {
	key      connectionKey
	sessions map[*session]struct{}
	departed map[uint64]time.Time     // streams that ended a moment ago, by the bundle that each had, and until when they count as before
	issues   map[uint64]ledger.Serial // that the holder evidently has: the client certificate that it presented, and SVIDs that it acknowledged
	bundle   uint64                   // the newest that all streams of that time had acknowledged; 0: none
}

// oldest is the oldest bundle with which one of the streams verifies: what one of them took says nothing of another, which may have refused it, or not have it yet. 0: one of
// them is not known to have any.
func (c *connection) oldest() (oldest uint64) {
	for s := range c.sessions {
		if s.verifies && (oldest == 0 || s.bundle < oldest) {
			if oldest = s.bundle; oldest == 0 {
				return 0
			}
		}
	}
	for bundle := range c.departed {
		if oldest == 0 || bundle < oldest {
			if oldest = bundle; oldest == 0 {
				return 0
			}
		}
	}
	return oldest
}

// departedFor is how long a stream that ended counts as before: its client verifies with what it has, and mostly is back within a second.
const departedFor = 10 * time.Second

// depart takes a stream away. c.mu is locked.
func (c *Callers) depart(s *session) {
	on := s.connection
	if delete(on.sessions, s); len(on.sessions) == 0 {
		through := on.key.through
		if c.connections[through] = slices.DeleteFunc(c.connections[through], func(there *connection) bool { return there == on }); len(c.connections[through]) == 0 {
			delete(c.connections, through)
		}
		delete(c.departed, on)
		return
	}
	if s.verifies {
		on.departed[s.bundle] = time.Now().Add(departedFor)
		c.departed[on] = true
	}
}

// forget forgets streams that stay away, and credits what holds without them. c.mu is locked.
func (c *Callers) forget() {
	now := time.Now()
	for on := range c.departed {
		maps.DeleteFunc(on.departed, func(_ uint64, until time.Time) bool { return now.After(until) })
		if len(on.departed) == 0 {
			delete(c.departed, on)
		}
		c.credit(on)
	}
}

// credit records that the holder has a newer bundle than was known, if that is so. c.mu is locked.
func (c *Callers) credit(on *connection) {
	oldest := on.oldest()
	if oldest <= on.bundle {
		return
	}
	on.bundle = oldest
	for number, serial := range on.issues {
		c.acks.add(ack{number: number, serial: serial, bundle: oldest})
	}
}

// Answered implements Source: what was acknowledged is evidence for the ledger. An SVID's arrival says nothing of the bundle.
func (s *session) Answered(a Answer) {
	if a.Reason != "" {
		return
	}
	s.mu.Lock()
	arrived, before := s.held, s.before
	if a.SVID == nil || arrived == nil || a.SVID != arrived.svid {
		arrived, before = nil, nil
		if a.SVID != nil && s.before != nil && a.SVID == s.before.svid {
			arrived = s.before // the next one is on its way
		}
	}
	s.mu.Unlock()

	c := s.callers
	c.mu.Lock()
	defer c.mu.Unlock()
	if arrived != nil {
		if before != nil {
			delete(s.connection.issues, before.number)
		}
		s.connection.issues[arrived.number] = arrived.serial
		c.acks.add(ack{number: arrived.number, serial: arrived.serial, bundle: s.connection.bundle})
	}
	if a.Bundle == nil || a.Bundle.Incarnation != c.ca.Bundle().Incarnation().String() {
		return
	}
	s.bundle = a.Bundle.Sequence
	c.credit(s.connection)
}

// ack is what is to be recorded of an issue.
type ack struct {
	number    uint64
	serial    ledger.Serial
	bundle    uint64
	presented bool // the holder presented it, which is all that is known
}

const (
	// ackWorkers is how many acknowledgements are recorded at once: they share the ledger's commits.
	ackWorkers = 256
	ackLimit   = 10 * time.Second
	ackRetry   = time.Second
)

// acks are the acknowledgements that are to be recorded: of each issue the latest. Recording waits for the disk, and whoever acknowledges does not.
type acks struct {
	ca  *ca.CA
	log *slog.Logger

	mu      sync.Mutex
	pending map[uint64]ack
	failed  map[uint64]ack
	since   time.Time // the first of failed
	workers int
	stopped bool
	idle    chan struct{} // closed once it is stopped and nobody works
}

func (a *acks) init(c *ca.CA, log *slog.Logger) {
	a.ca, a.log, a.pending, a.failed, a.idle = c, log, map[uint64]ack{}, map[uint64]ack{}, make(chan struct{})
}

func (a *acks) add(one ack) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.put(one)
}

// put takes one up. a is locked.
func (a *acks) put(one ack) {
	if a.stopped {
		return // its holder counts as under what it had
	}
	keep(a.pending, one)
	if a.workers < ackWorkers {
		a.workers++
		go a.work()
	}
}

// keep keeps of each issue what says most. Several may be recorded at once of one, and fail in any order.
func keep(all map[uint64]ack, one ack) {
	if there, ok := all[one.number]; !ok || !one.presented && there.bundle <= one.bundle {
		all[one.number] = one
	}
}

// work records until nothing is left.
func (a *acks) work() {
	for {
		a.mu.Lock()
		var one ack
		for _, one = range a.pending {
			break
		}
		if one.number == 0 {
			if a.workers--; a.workers == 0 && a.stopped {
				close(a.idle)
			}
			a.mu.Unlock()
			return
		}
		delete(a.pending, one.number)
		a.mu.Unlock()
		if err := a.record(one); err != nil {
			a.mu.Lock()
			if len(a.failed) == 0 {
				a.since = time.Now()
				a.log.Error("what holders acknowledge cannot be recorded, and is tried again: until then their certificates count as under an older bundle", "error", err)
			}
			keep(a.failed, one)
			a.mu.Unlock()
		}
	}
}

// record records one, and returns what may be better later.
func (a *acks) record(one ack) error {
	ctx, cancel := context.WithTimeout(context.Background(), ackLimit)
	defer cancel()
	var err error
	if one.presented {
		err = a.ca.Presented(ctx, &ca.Presented{Number: one.number, Serial: one.serial})
	} else {
		err = a.ca.Acknowledged(ctx, one.number, one.serial, one.bundle)
	}
	if errors.Is(err, ledger.ErrNotFound) || errors.Is(err, ca.ErrUnauthenticated) { // it was dropped, having expired, or authenticates nobody any more
		return nil
	}
	return err
}

// retry tries what failed once more, some time later.
func (a *acks) retry() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.failed) == 0 || time.Since(a.since) < ackRetry {
		return
	}
	failed := a.failed
	a.failed = map[uint64]ack{}
	for _, one := range failed {
		a.put(one)
	}
}

// stop takes no more, and waits until what is there is recorded. It is called once.
func (a *acks) stop() {
	a.mu.Lock()
	a.stopped = true
	working := a.workers > 0
	a.mu.Unlock()
	if working {
		<-a.idle
	}
}
