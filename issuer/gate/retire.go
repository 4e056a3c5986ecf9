package gate

import (
	"context"
	"time"

	"google.golang.org/grpc/peer"
)

// How a connection that is to end waits for the calls on it.
const (
	retireStep  = time.Second
	retireSteps = 15
)

// Connection is one that came through the gate. Two calls came by the same one when theirs are equal.
type Connection struct{ conn *conn }

// ConnectionOf is the connection of a call; ok says whether it came through a gate.
func ConnectionOf(ctx context.Context) (c Connection, ok bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Connection{}, false
	}
	info, ok := p.AuthInfo.(Info)
	return Connection{info.conn}, ok
}

// Retire ends the connection a moment later, so that what was said last arrives, and calls that keep it busy for some time end first. A client that needs one
// makes a new one, with the certificate that it has then.
func (c Connection) Retire() { c.conn.retire(retireSteps) }

func (c *conn) retire(steps int) {
	time.AfterFunc(retireStep, func() {
		c.gate.mu.Lock()
		wait := c.calls > 0 && steps > 1
		c.gate.mu.Unlock()
		if wait {
			c.retire(steps - 1)
			return
		}
		_ = c.Close() // it may have ended by itself
	})
}
