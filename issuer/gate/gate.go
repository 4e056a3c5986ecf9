package gate

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"
)

// Options are the limits. Zero means the default.
type Options struct {
	Connections int           // at once; default DescriptorsAllow
	Handshake   time.Duration // how long a peer may keep a handshake waiting, in all, and how long it may take to its first octet; default 10 s
	Calls       int           // that are worked on at once; default 512: as many as fill a commit of the ledger
	Waiting     int           // calls that wait; default 200,000
	Logger      *slog.Logger  // default: nothing is logged
	Metrics     Metrics       // default: nothing is counted
}

// Metrics is what counts the refusals.
type Metrics interface {
	Refused(reason string) // a connection or a call
	Handshake(err error)   // one that failed
}

// The reasons of refusals, as they are counted.
const (
	RefusedConnection = "connection"  // its peer has more than its share
	RefusedCall       = "call"        // too many wait
	ClosedIdle        = "idle-closed" // a connection that was idle made room for a new one
)

const (
	fairShare = 16      // what every peer may have, however little is free
	hello     = 2 << 10 // octets of the first read; a ClientHello with a post-quantum key share has about 1,800
	// maxHandshake is how much a client may send in a handshake, in octets: room for a chain of ten RSA-4096 certificates.
	maxHandshake = 64 << 10
	// handshakeWait is how long a handshake may wait for its turn. gRPC clients give up after 20 s and dial again.
	handshakeWait = 30 * time.Second
)

// Gate is a port's. Its methods may be called at once from several goroutines.
type Gate struct {
	connections int
	handshake   time.Duration
	log         *slog.Logger
	metrics     Metrics
	sparing     sparing

	handshakes *turns
	calls      *turns

	mu     sync.Mutex
	open   int
	peers  map[netip.Prefix]*peerConns
	idle   *list.List    // of *conn, the one that is idle longest first
	room   chan struct{} // holds one element after a connection ended or became idle
	closed chan struct{} // once the listener is
}

// peerConns is what one peer has open.
type peerConns struct {
	open int
	idle *list.List // of *conn
}

// New makes a gate.
func New(o Options) *Gate {
	o.Connections = cmp.Or(o.Connections, DescriptorsAllow())
	o.Handshake = cmp.Or(o.Handshake, 10*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = noMetrics{}
	}
	return &Gate{
		connections: o.Connections, handshake: o.Handshake, log: o.Logger, metrics: o.Metrics,
		// More at once would only make each of them slower, and calls with them.
		handshakes: newTurns(runtime.GOMAXPROCS(0), o.Connections),
		calls:      newTurns(cmp.Or(o.Calls, 512), cmp.Or(o.Waiting, 200_000)),
		peers:      map[netip.Prefix]*peerConns{}, idle: list.New(), room: make(chan struct{}, 1), closed: make(chan struct{}),
	}
}

type noMetrics struct{}

func (noMetrics) Refused(string)  {}
func (noMetrics) Handshake(error) {}

// Enter waits until a call may be worked on, no longer than ctx, and returns what ends it. address is the caller's. An error says why it was in vain.
func (g *Gate) Enter(ctx context.Context, address net.Addr) (leave func(), err error) {
	err = g.calls.take(ctx, peerOf(address))
	switch {
	case errors.Is(err, errCrowded):
		g.metrics.Refused(RefusedCall)
		return nil, fmt.Errorf("%w: %d calls, of which this peer has more than its share", err, g.calls.length())
	case err != nil:
		return nil, fmt.Errorf("waiting for a turn behind other calls: %w", err)
	}
	return g.calls.give, nil
}

// Drain sends away the calls that wait: the CA is about to stop, and another replica may have time for them. Calls that have their turn go on. It is called once.
func (g *Gate) Drain() { g.calls.end() }

// Counts says how many there are at this moment.
type Counts struct {
	Connections, Idle, WaitingHandshakes, WaitingCalls int
}

// Counts counts.
func (g *Gate) Counts() Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Counts{Connections: g.open, Idle: g.idle.Len(), WaitingHandshakes: g.handshakes.length(), WaitingCalls: g.calls.length()}
}

// Tell logs that a caller was refused before any door saw its call. Everybody who reaches the port can cause such lines, so they are few: see sparing.
func (g *Gate) Tell(what string, err error, address net.Addr) {
	passedOver, tell := g.sparing.tell(time.Now())
	if !tell {
		return
	}
	attrs := []any{"reason", err.Error(), "passed_over", passedOver}
	if address != nil {
		attrs = append(attrs, "peer", address.String())
	}
	g.log.Warn(what, attrs...)
}
