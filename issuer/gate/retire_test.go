package gate

import (
	"context"
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// A connection with a stream makes room only when there is no other that is idle, and is idle like others once its stream is over.
func TestAConnectionWithAStreamMakesRoomLast(t *testing.T) {
	g := New(Options{Connections: 20, Work: func(string) bool { return false }})
	var all []*conn
	for i := range 20 {
		c := &conn{gate: g, key: peerNamed(fmt.Sprintf("192.0.2.%d", 10+i))}
		if _, admitted, err := g.place(c); !admitted || err != nil {
			t.Fatal(admitted, err)
		}
		g.ready(c)
		all = append(all, c)
	}
	streams := []*call{{conn: all[0], stream: true}, {conn: all[1], stream: true}, {conn: all[0], stream: true}}
	for _, c := range streams {
		g.arrives(c)
		g.arrived(c)
	}
	newcomers := 0
	takes := func(want *conn) {
		t.Helper()
		newcomers++
		victim, admitted, err := g.place(&conn{gate: g, key: peerNamed(fmt.Sprintf("198.51.100.%d", newcomers))})
		if victim != want || !admitted || err != nil {
			t.Fatalf("a newcomer takes the place of %v, %t, %v", victim, admitted, err)
		}
		g.leave(victim)
	}
	takes(all[2]) // and not the first two, which are idle longer
	g.ends(streams[0], codes.OK)
	takes(all[3]) // one of its streams goes on
	g.ends(streams[2], codes.OK)
	takes(all[0]) // it was served
	for _, c := range all[4:] {
		takes(c)
	}
	takes(all[1])
	g.ends(streams[1], codes.OK)
	if n := g.Counts().Idle; n != 0 {
		t.Errorf("%d are idle", n)
	}
}

// A connection that is retired ends, but not while it is busy; its streams end with it. Two calls over it know that it is one.
func TestARetiredConnectionEndsOnceItIsNotBusy(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{Work: func(method string) bool { return method == grpc_health_v1.Health_Check_FullMethodName }})
	var seen []Connection
	watch := func(conn *grpc.ClientConn) grpc_health_v1.Health_WatchClient {
		t.Helper()
		w, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Recv(); err != nil {
			t.Fatal(err)
		}
		return w
	}
	conn := p.client(t, "127.0.0.1")
	stream := watch(conn)
	p.gate.mu.Lock()
	for e := p.gate.idle.served.Front(); e != nil; e = e.Next() {
		seen = append(seen, Connection{e.Value.(*gated)})
	}
	p.gate.mu.Unlock()
	if len(seen) != 1 {
		t.Fatalf("%d connections", len(seen))
	}
	busy, err := conn.NewStream(t.Context(), &grpc.StreamDesc{}, grpc_health_v1.Health_Check_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	for p.gate.Counts().Arriving == 0 {
		runtime.Gosched()
	}
	seen[0].Retire()
	if err := busy.SendMsg(&grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := busy.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); err != nil {
		t.Errorf("the call that was under way: %v", err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream: %v", err)
	}
	if _, ok := ConnectionOf(context.Background()); ok {
		t.Error("a call from nowhere has a connection")
	}
}

type gated = conn

// One peer may have as many streams as are still free, and always some; another finds room.
func TestAPeerHasNoMoreStreamsThanItsShare(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{MaxStreams: 2 * fairStreams, Streams: func(method string) bool { return method == grpc_health_v1.Health_Watch_FullMethodName }})
	watch := func(conn *grpc.ClientConn) error {
		w, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			return err
		}
		_, err = w.Recv()
		return err
	}
	conn, refused := p.client(t, "127.0.0.1"), 0
	for range 2 * fairStreams {
		if err := watch(conn); status.Code(err) == codes.Unavailable {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused != fairStreams {
		t.Errorf("%d were refused", refused)
	}
	if p.count(RefusedStream) != refused {
		t.Errorf("%d were counted", p.count(RefusedStream))
	}
	p.log.await(t, "a stream was refused")
	if err := watch(p.client(t, "127.0.0.2")); err != nil {
		t.Errorf("another peer: %v", err)
	}
}
