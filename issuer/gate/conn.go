package gate

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// conn is a connection that was admitted.
type conn struct {
	net.Conn
	gate *Gate
	key  netip.Prefix
	peer *peerConns
	once sync.Once

	// Of the gate's lock.
	calls         int  // that make it busy
	inVain        int  // calls in a row that were refused, or taken back
	streams       int  // see Options.Streams
	called        bool // it had a call
	closed        bool
	inAll, inPeer *list.Element // while it is idle

	// Of the goroutine that makes the handshake.
	shaking  bool // it had a turn already, and has a place
	holding  bool // it has a turn
	turn     turn
	patience time.Duration
	received int
	first    []byte // read already
}

// Close gives its place to another.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.gate.leave(c) })
	return err
}

// Read reads. During a handshake nobody holds a turn while the client is waited for, and the client's time and octets are limited.
func (c *conn) Read(into []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(into, c.first)
		if c.first = c.first[n:]; len(c.first) == 0 {
			c.first = nil // the connection may last, and be one of very many
		}
		return n, nil
	}
	if !c.shaking {
		return c.Conn.Read(into)
	}
	c.give()
	n, err := c.wait(into)
	if err == nil {
		err = c.take()
	}
	return n, err
}

// wait reads while the client's time lasts.
func (c *conn) wait(into []byte) (int, error) {
	began := time.Now()
	if err := c.SetReadDeadline(began.Add(c.patience)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(into)
	c.patience -= time.Since(began)
	if c.received += n; err == nil && c.received > maxHandshake {
		err = fmt.Errorf("the client sent more than %d octets in its handshake", maxHandshake)
	}
	return n, err
}

var errGone = errors.New("the client went away before its turn")

// take waits for a turn: a handshake that has begun goes on before others begin.
func (c *conn) take() error {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeWait)
	defer cancel()
	began := time.Now()
	var err error
	if c.shaking {
		err = c.gate.handshakes.again(ctx, &c.turn)
	} else {
		c.turn, err = c.gate.handshakes.take(ctx, c.key)
	}
	c.gate.signal() // it waits no longer, however that ended
	if err != nil {
		return fmt.Errorf("waiting for a turn behind other handshakes: %w", err)
	}
	c.holding, c.shaking = true, true
	if time.Since(began) > time.Second && c.gone() {
		return errGone
	}
	return nil
}

func (c *conn) give() {
	if c.holding {
		c.holding = false
		c.gate.handshakes.give(c.turn, true)
	}
}

// shaken ends what take began.
func (c *conn) shaken() {
	c.give()
	if c.shaking {
		c.shaking = false
		c.gate.handshakes.leave()
	}
}

// gone says whether the client has closed its side: what it would cost to answer is saved.
func (c *conn) gone() (gone bool) {
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) { // it fails for a connection that is closed, which a write will find out
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = err == nil && n == 0
	})
	return gone
}

// Info is what is known of a connection: TLS's part, and its place.
type Info struct {
	credentials.TLSInfo
	conn *conn
}

// handshakes are credentials that let handshakes take turns.
type handshakes struct {
	credentials.TransportCredentials
	gate *Gate
}

// Credentials wraps the credentials of the server. A connection's AuthInfo is an Info.
func (g *Gate) Credentials(c credentials.TransportCredentials) credentials.TransportCredentials {
	return handshakes{c, g}
}

// Clone implements credentials.TransportCredentials.
func (h handshakes) Clone() credentials.TransportCredentials {
	return handshakes{h.TransportCredentials.Clone(), h.gate}
}

// ServerHandshake makes the handshake of an admitted connection. Only what costs CPU time needs a turn; who is slow to send holds none.
func (h handshakes) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, fmt.Errorf("the connection (%T) did not come through the gate", raw)
	}
	secured, info, err := h.shake(c)
	h.gate.metrics.Handshake(err)
	if err != nil {
		h.gate.Tell("a TLS handshake failed", err, raw.RemoteAddr())
		return nil, nil, err
	}
	return secured, info, nil
}

func (h handshakes) shake(c *conn) (net.Conn, credentials.AuthInfo, error) {
	c.patience = h.gate.patience
	buffer := make([]byte, hello)
	n, err := c.wait(buffer)
	if err != nil {
		return nil, nil, fmt.Errorf("waiting for the client's first octet: %w", err)
	}
	if c.gone() {
		return nil, nil, errGone
	}
	if err := c.take(); err != nil {
		c.shaken()
		return nil, nil, err
	}
	c.first = buffer[:n]
	secured, info, err := h.TransportCredentials.ServerHandshake(c)
	c.shaken()
	if err != nil {
		return nil, nil, err
	}
	tls, ok := info.(credentials.TLSInfo)
	if !ok {
		return nil, nil, errors.Join(fmt.Errorf("the credentials gave %T instead of TLS's", info), secured.Close())
	}
	h.gate.ready(c)
	// The first words of HTTP/2 are still a part of what a client may be waited for; gRPC takes the limit off once they have come.
	return secured, Info{tls, c}, c.SetReadDeadline(time.Now().Add(h.gate.patience))
}
