package gate

import (
	"container/list"
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// call is an RPC from its header on.
type call struct {
	conn    *conn // nil: it did not come through the gate
	address net.Addr
	work    bool // see Options.Work
	stream  bool // see Options.Streams
	began   time.Time
	handled bool // a door has seen it: of the goroutine that handles it

	arriving *list.Element // of the gate's lock; nil: its request is there, or it has ended
}

type callKey struct{}

// calls is a statistics handler that knows which RPCs are arriving, which are under way, and how they end.
type calls struct{ gate *Gate }

// Stats is the statistics handler that the server needs besides UnaryInterceptor and StreamInterceptor.
func (g *Gate) Stats() stats.Handler { return calls{g} }

// TagRPC makes the call.
func (s calls) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	c := &call{work: s.gate.work(info.FullMethodName), stream: s.gate.streams(info.FullMethodName)}
	if p, ok := peer.FromContext(ctx); ok {
		c.address = p.Addr
		if info, ok := p.AuthInfo.(Info); ok {
			c.conn = info.conn
		}
	}
	return context.WithValue(ctx, callKey{}, c)
}

// HandleRPC follows it.
func (s calls) HandleRPC(ctx context.Context, event stats.RPCStats) {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return
	}
	switch event := event.(type) {
	case *stats.Begin:
		c.began = event.BeginTime
		s.gate.arrives(c)
	case *stats.InPayload:
		s.gate.arrived(c)
	case *stats.End:
		s.gate.ends(c, status.Code(event.Error))
		if event.Error != nil && !c.handled && c.work {
			s.gate.metrics.Unread(event.EndTime.Sub(event.BeginTime))
			s.gate.Tell("a call was refused before its request was read", event.Error, c.address)
		}
	}
}

// TagConn has nothing to add.
func (calls) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn has nothing to do: see conn.
func (calls) HandleConn(context.Context, stats.ConnStats) {}

// UnaryInterceptor notes that a door has the call.
func (g *Gate) UnaryInterceptor(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.handled = true
	}
	return handle(ctx, request)
}

// StreamInterceptor notes that a door has the stream. One that lasts is refused when its peer has more than its share.
func (g *Gate) StreamInterceptor(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if c, ok := stream.Context().Value(callKey{}).(*call); ok {
		c.handled = true
		if err := g.share(c); err != nil {
			g.metrics.Refused(RefusedStream)
			g.Tell("a stream was refused", err, c.address)
			return status.Error(codes.Unavailable, "too many streams from this address: try again later")
		}
	}
	return handle(server, stream)
}

// share says whether a stream is more than its peer's share.
func (g *Gate) share(c *call) error {
	if c.conn == nil || !c.stream {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if free := g.mostStreams - g.streaming; c.conn.peer.streaming > max(free, fairStreams) || free < 0 {
		return fmt.Errorf("its peer has %d of %d streams, and %d are free: no peer may have more than that", c.conn.peer.streaming, g.mostStreams, max(free, 0))
	}
	return nil
}

// arrives notes a call whose request is to come, and makes room if too many are arriving: whose takes longest has to go.
func (g *Gate) arrives(c *call) {
	if c.conn == nil {
		return
	}
	g.mu.Lock()
	c.arriving = g.arriving.PushBack(c)
	switch idle := c.conn.inAll != nil; {
	case c.work:
		g.busy(c.conn)
		g.begins(c)
		c.conn.calls++
	case idle && (c.stream || !c.conn.called):
		g.busy(c.conn) // for another list
		g.begins(c)
		g.rest(c.conn)
	default:
		g.begins(c)
	}
	var slowest *conn
	if g.arriving.Len() > mostArriving {
		if first := g.arriving.Front().Value.(*call); c.began.Sub(first.began) > time.Second {
			slowest = first.conn
		}
	}
	g.mu.Unlock()
	if slowest != nil {
		g.hangUp(slowest, ClosedSlow, "too many requests are half sent, and this client's takes longest")
	}
}

// begins notes a call of a connection that is on no list. The gate is locked.
func (g *Gate) begins(c *call) {
	c.conn.called = true
	if c.stream {
		c.conn.streams++
		c.conn.peer.streaming++
		g.streaming++
	}
}

// arrived notes that the request, or the first of a stream, is there.
func (g *Gate) arrived(c *call) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settle(c)
}

// ends notes the end of a call. A client that makes one call after the other in vain, such as those that it takes back at once, loses its connection: to read
// them costs what no turn counts.
func (g *Gate) ends(c *call, code codes.Code) {
	if c.conn == nil {
		return
	}
	g.mu.Lock()
	g.settle(c)
	switch code {
	case codes.OK:
		c.conn.inVain = 0
	case codes.Unavailable: // not by the client's fault
	default:
		c.conn.inVain++
	}
	if c.stream {
		idle := c.conn.inAll != nil
		g.busy(c.conn)
		c.conn.streams--
		c.conn.peer.streaming--
		g.streaming--
		if idle {
			g.rest(c.conn)
		}
	}
	if c.work {
		g.release(c.conn)
	}
	enough := c.conn.inVain == mostInVain
	g.mu.Unlock()
	if enough {
		g.hangUp(c.conn, ClosedInVain, "the client made one call after the other in vain: they were refused, or it took them back")
	}
}

// settle takes a call off the list of those that are arriving. The gate is locked.
func (g *Gate) settle(c *call) {
	if c.arriving != nil {
		g.arriving.Remove(c.arriving)
		c.arriving = nil
	}
}

// watch hangs up on clients that take too long to send a request, until the listener is closed.
func (g *Gate) watch() {
	ticker := time.NewTicker(min(time.Second, g.patience/4))
	defer ticker.Stop()
	for {
		select {
		case <-g.closed:
			return
		case now := <-ticker.C:
			for _, c := range g.late(now) {
				g.hangUp(c, ClosedSlow, "the client began a request and did not send the rest in time")
			}
		}
	}
}

// late finds the connections of requests that take too long.
func (g *Gate) late(now time.Time) (all []*conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for e := g.arriving.Front(); e != nil && now.Sub(e.Value.(*call).began) > g.patience; e = e.Next() {
		all = append(all, e.Value.(*call).conn)
	}
	return all
}

// hangUp ends a connection over what its client does.
func (g *Gate) hangUp(c *conn, reason, why string) {
	if c.Close() == nil { // otherwise it has ended already
		g.metrics.Refused(reason)
		g.Tell("a connection was ended", errorText(why), c.RemoteAddr())
	}
}

type errorText string

func (e errorText) Error() string { return string(e) }
