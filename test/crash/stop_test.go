package crash

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/stats"

	"kedge/test/process"
)

// sent tells when calls have left a client.
type sent struct{ calls chan struct{} }

func (s sent) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (s sent) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (s sent) HandleConn(context.Context, stats.ConnStats)                       {}
func (s sent) HandleRPC(_ context.Context, rpc stats.RPCStats) {
	if _, ok := rpc.(*stats.OutPayload); ok {
		s.calls <- struct{}{}
	}
}

// TestCallsInFlightAreAnsweredWhenItStops: the disk is slowed down, so that the calls are surely under way when SIGTERM comes.
func TestCallsInFlightAreAnsweredWhenItStops(t *testing.T) {
	t.Parallel()
	const calls = 16
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	tracer, err := trace(t, k, "--inject=fdatasync:delay_enter=300000") // microseconds
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	left := make(chan struct{}, 2*calls)
	caller := k.Dial(t, nil, grpc.WithStatsHandler(sent{left}))
	key, token := process.NewKey(t), cluster.Token(t, "default", "web")
	l := &load{}
	var answered sync.WaitGroup
	for range calls {
		answered.Go(func() { l.ask(t.Context(), caller, key, token) })
	}
	for range calls {
		<-left
	}
	// The server reads a connection in order: when it has answered this one, it has taken up those before it.
	if _, err := caller.Health(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.Terminate(t)
	answered.Wait()
	if got := l.received.Load(); got != calls {
		t.Errorf("%d of %d calls in flight were answered; %v", got, calls, l.odd)
	}
	if code := k.Wait(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, k.Log())
	}
	tracer.stop()
	k.Start(t)
	l.check(t, k)
}

// TestStoppingUnderLoadLosesNothing: each call succeeds and is in the ledger, or fails as unavailable. Nothing of the process stays behind.
func TestStoppingUnderLoadLosesNothing(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	l := newLoad(t, cluster)
	for range 3 {
		k.Start(t)
		stop := l.start(t, k)
		l.await(t, 50)
		k.Stop(t)
		stop()
		if _, err := os.Stat(filepath.Join(k.Data, "admin.sock")); !os.IsNotExist(err) {
			t.Errorf("the admin socket is still there (%v)", err)
		}
	}
	k.Start(t) // the lock is free
	l.check(t, k)
}

// TestNobodyHoldsUpAStop: connections without a call, and streams that never end by themselves, are closed.
func TestNobodyHoldsUpAStop(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 1000) // more than the buffers of a socket take
	stop()
	export, err := net.Dial("unix", filepath.Join(k.Data, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer export.Close()
	if _, err := export.Write([]byte("GET /v1/ledger/events HTTP/1.1\r\nHost: kedge\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := export.Read(make([]byte, 1)); err != nil { // it has begun, and nobody reads on
		t.Fatal(err)
	}
	watch, err := grpc_health_v1.NewHealthClient(k.Dial(t, nil).Conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	var idle []net.Conn
	for network, address := range map[string]string{"tcp": k.Status(t).OpsAddress, "unix": filepath.Join(k.Data, "admin.sock")} {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	reflection, err := grpc_reflection_v1.NewServerReflectionClient(k.Dial(t, nil).Conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := reflection.Send(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{ListServices: "*"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := reflection.Recv(); err != nil {
		t.Fatal(err)
	}
	k.Stop(t)
	if strings.Contains(k.Log(), "cut off") {
		t.Errorf("something had to be cut off:\n%s", k.Log())
	}
	for _, conn := range idle {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}
