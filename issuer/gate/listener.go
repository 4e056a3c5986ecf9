package gate

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// reserved is how many descriptors are left to everything else: the ledger, admins, monitoring, token issuers.
const reserved = 256

// DescriptorsAllow is how many connections fit into the descriptors that this process may have (RLIMIT_NOFILE, getrlimit(2)).
func DescriptorsAllow() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 - reserved // what Linux gives unless told otherwise
	}
	return int(max(min(limit.Cur, math.MaxInt32), reserved+fairShare) - reserved)
}

// listener admits connections.
type listener struct {
	net.Listener
	gate  *Gate
	close func() error
}

// Listener wraps the port's listener. It accepts up to as many connections as there may be. Beyond that a new one takes the place of the one that is
// idle longest after a call, or without one, or waits for one that ends. A peer that has more than its share makes room among its own, and is refused when
// it has no idle one. While the handshakes of very many peers wait, nobody is accepted.
// It is called once, and what it returns is closed.
func (g *Gate) Listener(l net.Listener) net.Listener {
	go g.watch()
	return &listener{l, g, sync.OnceValue(func() error {
		close(g.closed)
		return l.Close()
	})}
}

// Close ends Accept as well.
func (l *listener) Close() error { return l.close() }

// Accept returns the next connection that was admitted.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, gate: l.gate, key: peerOf(raw.RemoteAddr())}
		switch err := l.gate.admit(c); {
		case errors.Is(err, net.ErrClosed):
			return nil, errors.Join(err, raw.Close())
		case err != nil:
			l.gate.metrics.Refused(RefusedConnection)
			l.gate.Tell("a connection was refused", err, raw.RemoteAddr())
			_ = raw.Close() // nothing was sent over it
			continue
		}
		return c, nil
	}
}

// admit finds a place for a connection, or says why there is none.
func (g *Gate) admit(c *conn) error {
	for {
		victim, admitted, err := g.place(c)
		if victim != nil {
			g.metrics.Refused(ClosedIdle)
			_ = victim.Close() // its client notices, and dials again when it has something to ask
		}
		if admitted || err != nil {
			return err
		}
		select {
		case <-g.room:
		case <-g.closed:
			return net.ErrClosed
		}
	}
}

// place takes a place for c, perhaps that of a victim, which is to be closed. It is not admitted when there is no place now.
func (g *Gate) place(c *conn) (victim *conn, admitted bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[c.key]
	if p == nil {
		p = &peerConns{idle: newIdle()}
	}
	free := g.connections - g.open
	switch {
	case g.handshakes.crowd() >= g.shaking:
		return nil, false, nil
	case p.open >= max(free, fairShare):
		if victim = p.idle.dispensable(); victim == nil {
			return nil, false, fmt.Errorf("its peer has %d of %d connections, none of them idle, and %d are free: no peer may have more than that", p.open, g.connections, max(free, 0))
		}
	case free <= 0:
		if victim = g.idle.dispensable(); victim == nil {
			return nil, false, nil
		}
	}
	if victim != nil {
		g.busy(victim)
	}
	g.open++
	p.open++
	g.peers[c.key], c.peer = p, p
	return victim, true, nil
}

// leave gives the place of a connection back.
func (g *Gate) leave(c *conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy(c)
	c.closed = true
	g.open--
	if c.peer.open--; c.peer.open == 0 {
		delete(g.peers, c.key)
	}
	g.signal()
}

// ready notes that a connection's handshake is done. Until its first call it is idle.
func (g *Gate) ready(c *conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.calls++
	g.release(c)
}

// release notes that a call has ended. A connection without any is idle. The gate is locked.
func (g *Gate) release(c *conn) {
	if c.calls--; c.calls > 0 || c.closed {
		return
	}
	g.rest(c)
	if g.open >= g.connections {
		g.signal()
	}
}

// rest puts a connection on the lists of idle ones. The gate is locked.
func (g *Gate) rest(c *conn) {
	c.inAll, c.inPeer = g.idle.of(c).PushBack(c), c.peer.idle.of(c).PushBack(c)
}

// busy takes a connection off the lists of idle ones. The gate is locked.
func (g *Gate) busy(c *conn) {
	if c.inAll != nil {
		g.idle.of(c).Remove(c.inAll)
		c.peer.idle.of(c).Remove(c.inPeer)
		c.inAll, c.inPeer = nil, nil
	}
}

// signal wakes Accept if it waits for room.
func (g *Gate) signal() {
	select {
	case g.room <- struct{}{}:
	default:
	}
}

// peerOf is whom an address belongs to. What has no IP address is one peer.
func peerOf(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	if !ok {
		return netip.Prefix{}
	}
	ip = ip.Unmap()
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil { // an address has as many bits
		return netip.Prefix{}
	}
	return prefix
}
