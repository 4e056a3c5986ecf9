package gate

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"kedge/issuer/sparing"
)

// Options are the limits. Zero means the default.
type Options struct {
	Connections int                      // at once; default, and at most, DescriptorsAllow
	Patience    time.Duration            // how long a client is waited for: for a handshake, in all, and for a request, from its header on; default 10 s
	Calls       int                      // that are worked on at once; default 512: as many as fill a commit of the ledger
	Waiting     int                      // calls that wait; default 200,000
	Work        func(method string) bool // which calls make their connection busy, and are counted when gRPC refuses them; default all
	Streams     func(method string) bool // which calls last as long as their connection, mostly in silence: of those that are idle it goes last; default none
	MaxStreams  int                      // of such calls at once; default 200,000. A peer may have as many as are still free
	Logger      *slog.Logger             // default: nothing is logged
	Metrics     Metrics                  // default: nothing is counted
}

// Metrics is what counts the refusals.
type Metrics interface {
	Refused(reason string)  // a connection or a call
	Handshake(err error)    // one that ended
	Unread(d time.Duration) // a call that gRPC refused by itself
}

// The reasons of refusals, as they are counted.
const (
	RefusedConnection = "connection"     // its peer has more than its share
	RefusedCall       = "call"           // too many wait
	RefusedStream     = "stream"         // its peer has more than its share
	ClosedIdle        = "idle-closed"    // a connection that was idle made room for a new one
	ClosedSlow        = "slow-closed"    // a connection whose client did not send the rest of a request
	ClosedInVain      = "in-vain-closed" // a connection of which one call after the other was refused or taken back
)

const (
	fairShare   = 16      // connections that every peer may have, however few are free
	fairStreams = 256     // streams, likewise
	hello       = 2 << 10 // octets of the first read; a ClientHello with a post-quantum key share has about 1,800
	// maxHandshake is how much a client may send in a handshake, in octets: room for a chain of ten RSA-4096 certificates.
	maxHandshake = 64 << 10
	// handshakeWait is how long a handshake may wait for its turn. gRPC clients give up after 20 s and dial again: who has waited longer than this would
	// be gone before it is done, and the others behind it as well.
	handshakeWait = 15 * time.Second
	// peersShaking is of how many peers, for each processor, handshakes may wait before no more connections are accepted: some 2 s of work. The others are
	// better off in the kernel, where they cost nothing, and which of them comes next is a matter of luck instead of who is about to give up.
	peersShaking = 4096
	// mostArriving is how many requests may be half sent, so that a flood of them takes a bounded part of the memory.
	mostArriving = 2048
	// mostInVain is how many calls in a row may be refused, or taken back, on one connection. Who means well and is refused for so long only makes a new one.
	mostInVain = 100
)

// Gate is a port's. Its methods may be called at once from several goroutines.
type Gate struct {
	connections int
	shaking     int // see peersShaking
	patience    time.Duration
	work        func(method string) bool
	streams     func(method string) bool
	mostStreams int
	log         *slog.Logger
	metrics     Metrics
	sparing     sparing.Lines

	handshakes *turns
	calls      *turns

	mu        sync.Mutex
	open      int
	streaming int // calls that are streams
	peers     map[netip.Prefix]*peerConns
	idle      idle
	arriving  *list.List    // of *call, the one that began first first
	room      chan struct{} // holds one element after a connection ended or became idle, or a handshake waits no longer
	closed    chan struct{} // once the listener is
}

// peerConns is what one peer has open.
type peerConns struct {
	open      int
	streaming int
	idle      idle
}

// idle are connections without a call, of *conn, the one that is idle longest first. Who was served needs its connection no more for a while; who was not made
// a handshake for its call; and who has a stream is back at once.
type idle struct{ served, fresh, streaming *list.List }

func newIdle() idle { return idle{list.New(), list.New(), list.New()} }

// length is how many there are.
func (i idle) length() int { return i.served.Len() + i.fresh.Len() + i.streaming.Len() }

// of is the list for a connection.
func (i idle) of(c *conn) *list.List {
	switch {
	case c.streams > 0:
		return i.streaming
	case c.called:
		return i.served
	}
	return i.fresh
}

// dispensable is the connection that is missed least; nil: there is none.
func (i idle) dispensable() *conn {
	for _, l := range []*list.List{i.served, i.fresh, i.streaming} {
		if first := l.Front(); first != nil {
			return first.Value.(*conn)
		}
	}
	return nil
}

// New makes a gate.
func New(o Options) *Gate {
	o.Connections = min(cmp.Or(o.Connections, math.MaxInt), DescriptorsAllow())
	o.Patience = cmp.Or(o.Patience, 10*time.Second)
	if o.Work == nil {
		o.Work = func(string) bool { return true }
	}
	if o.Streams == nil {
		o.Streams = func(string) bool { return false }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = noMetrics{}
	}
	g := &Gate{
		connections: o.Connections, shaking: peersShaking * runtime.GOMAXPROCS(0), patience: o.Patience, work: o.Work, streams: o.Streams, mostStreams: cmp.Or(o.MaxStreams, 200_000), log: o.Logger, metrics: o.Metrics,
		// More at once would only make each of them slower, and calls with them.
		handshakes: newTurns(runtime.GOMAXPROCS(0), o.Connections, o.Connections),
		calls:      newTurns(runtime.GOMAXPROCS(0), cmp.Or(o.Calls, 512), cmp.Or(o.Waiting, 200_000)),
		peers:      map[netip.Prefix]*peerConns{}, idle: newIdle(), arriving: list.New(), room: make(chan struct{}, 1), closed: make(chan struct{}),
	}
	for _, t := range []*turns{g.handshakes, g.calls} {
		t.way = &lookout{turns: t, closed: g.closed}
	}
	return g
}

type noMetrics struct{}

func (noMetrics) Refused(string)       {}
func (noMetrics) Handshake(error)      {}
func (noMetrics) Unread(time.Duration) {}

// Place is that of a call that is worked on. Its methods are for one goroutine.
type Place struct {
	gate          *Gate
	peer          netip.Prefix
	turn          turn
	has, checking bool
}

// Enter waits until a call may be worked on, no longer than ctx. address is the caller's. An error says why it was in vain. Who has a place leaves it.
//
// At first the call has a turn of the processor, too, in which what the caller sent is checked: see Checked.
func (g *Gate) Enter(ctx context.Context, address net.Addr) (*Place, error) {
	p := &Place{gate: g, peer: peerOf(address)}
	if err := p.Again(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// Again is Enter for a call that left its place. In vain, the call has none, and may go on all the same with what is not dear.
func (p *Place) Again(ctx context.Context) error {
	turn, err := p.gate.calls.take(ctx, p.peer)
	switch {
	case errors.Is(err, errCrowded):
		p.gate.metrics.Refused(RefusedCall)
		return fmt.Errorf("%w: %d calls, of which this peer has more than its share", err, p.gate.calls.length())
	case err != nil:
		return fmt.Errorf("waiting for a turn behind other calls: %w", err)
	}
	p.turn, p.has, p.checking = turn, true, true
	return nil
}

// Checked ends the turn of the processor, if the call has one: what is left is to sign, and to wait for the ledger together with others.
func (p *Place) Checked() { p.end(false) }

func (p *Place) end(inVain bool) {
	if p.checking {
		p.checking = false
		p.gate.calls.give(p.turn, inVain)
	}
}

// Leave gives the place, if the call has one, to another.
func (p *Place) Leave() {
	p.end(true)
	if p.has {
		p.has = false
		p.gate.calls.leave()
	}
}

// Drain sends away the calls that wait, and hangs up on clients whose requests are half sent: the CA is about to stop, and another replica may have time
// for them. Calls that have their turn go on. It is called once.
func (g *Gate) Drain() {
	g.calls.end()
	g.mu.Lock()
	var half []*conn
	for e := g.arriving.Front(); e != nil; e = e.Next() {
		half = append(half, e.Value.(*call).conn)
	}
	g.mu.Unlock()
	for _, c := range half {
		_ = c.Close() // it may have ended meanwhile
	}
}

// Counts says how many there are at this moment.
type Counts struct {
	Connections, Idle, Arriving, WaitingHandshakes, WaitingCalls int
}

// Counts counts.
func (g *Gate) Counts() Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Counts{Connections: g.open, Idle: g.idle.length(), Arriving: g.arriving.Len(), WaitingHandshakes: g.handshakes.length(), WaitingCalls: g.calls.length()}
}

// Tell logs that a caller was refused before any door saw its call. Everybody who reaches the port can cause such lines, so they are few: see sparing.
func (g *Gate) Tell(what string, err error, address net.Addr) {
	passedOver, tell := g.sparing.Tell(time.Now())
	if !tell {
		return
	}
	attrs := []any{"reason", err.Error(), "passed_over", passedOver}
	if address != nil {
		attrs = append(attrs, "peer", address.String())
	}
	g.log.Warn(what, attrs...)
}
