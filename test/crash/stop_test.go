package crash

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	for i := range 3 {
		k.Start(t)
		if i == 1 {
			l.prove(t, k) // half of the callers renew by client certificate from now on
		}
		stop := l.start(t, k)
		l.await(t, 1+rand.Int64N(100))
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

// TestASecondSIGTERMEndsItAtOnce: a caller who began a call and does not send its request holds the first one up.
func TestASecondSIGTERMEndsItAtOnce(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	tracer, err := trace(t, k, "--inject=fdatasync:delay_enter=5000000") // microseconds: a call is under way for long
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	left, ctx := make(chan struct{}, 2), t.Context()
	caller, key, token := k.Dial(t, nil, grpc.WithStatsHandler(sent{left})), process.NewKey(t), cluster.Token(t, "default", "web")
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		_, _ = caller.Issue(ctx, key.CSR, token, 0) // nobody is answered by a process that is killed
	}()
	<-left
	if _, err := caller.Health(t.Context()); err != nil { // it has taken up the call before
		t.Fatal(err)
	}
	k.Terminate(t)
	process.Eventually(t, "the process to say that it stops", func() error {
		if !strings.Contains(k.Log(), `"msg":"stopping: `) {
			return errors.New("it has not")
		}
		return nil
	})
	process.Eventually(t, "its end", func() error {
		if k.Ended() {
			return nil
		}
		_ = syscall.Kill(k.PID(), syscall.SIGTERM) // it may be ending at this moment
		return errors.New("it goes on")
	})
	if code := k.Wait(t); code != -1 {
		t.Errorf("it ended with exit code %d, and not by the signal\n%s", code, k.Log())
	}
	<-asked
	tracer.stop()
	k.Start(t) // nothing that it left behind is in the way
	k.CheckLedger(t, nil)
}

// TestSIGTERMDuringTheFirstStart stops the process while a data folder comes into being, which a slow disk makes long. It ends as if it had never been
// in a hurry: exit code 0, nothing but log lines that tell of no error, and a folder that the next start takes up.
func TestSIGTERMDuringTheFirstStart(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	var early atomic.Int64
	t.Run("stages", func(t *testing.T) {
		for _, stage := range []string{"lock", "ledger.db", "root/root-cert.pem", "root/root-key.pem", "keys/*.pem", "join-token-keys/*.pem",
			"join-token-keys/current", "root-cert.pem", "admin.sock"} {
			t.Run(stage, func(t *testing.T) {
				t.Parallel()
				k := newCA(t, process.NewCluster(t), "")
				const slow = "fsync,fdatasync"
				k.Through = []string{strace, "--follow-forks", "--output=/dev/null", "--trace=" + slow, "--inject=" + slow + ":delay_enter=100000"} // microseconds
				k.Launch(t)
				process.Eventually(t, stage, func() error {
					found, err := filepath.Glob(filepath.Join(k.Data, stage))
					if err == nil && len(found) == 0 {
						err = fs.ErrNotExist
					}
					return err
				})
				var pid int
				process.Eventually(t, "the process's own id", func() (err error) {
					text, err := os.ReadFile(filepath.Join(k.Data, "lock"))
					if err != nil {
						return err
					}
					pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
					return err
				})
				if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if code := k.Wait(t); code != 0 {
					t.Errorf("exit code %d\n%s", code, k.Log())
				}
				stopping := 0
				for line := range strings.Lines(k.Log()) {
					var entry struct{ Level, Msg string }
					if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level != "INFO" {
						t.Errorf("it says %s", line)
					}
					if strings.HasPrefix(entry.Msg, "stopping: ") {
						stopping++
					}
				}
				if stopping != 1 {
					t.Errorf("it says %d times that it is stopping\n%s", stopping, k.Log())
				}
				if !strings.Contains(k.Greeting(t), "\nNext: ") {
					early.Add(1)
				}
				for _, left := range []string{"admin.sock", ".*", "*/.*", "root/root-key.new.pem"} {
					if found, err := filepath.Glob(filepath.Join(k.Data, left)); err != nil || len(found) > 0 {
						t.Errorf("it leaves %q behind (%v)", found, err)
					}
				}
				k.Through = nil
				k.Start(t)
				if out := k.Must(t, "authority", "list"); strings.Count(out, " root ") != 1 || strings.Count(out, " active ") != 2 || strings.Count(out, "\n") != 3 {
					t.Errorf("after the next start:\n%s", out)
				}
				if keys, err := filepath.Glob(filepath.Join(k.Data, "keys", "*")); err != nil || len(keys) != 1 {
					t.Errorf("there are the keys %q (%v)", keys, err)
				}
				if founded := k.Export(t)[0].Authority; founded == nil || founded.Record.Coverage.Kind != "complete" {
					t.Errorf("the ledger does not know all of its root's past: %+v", founded)
				}
				k.CheckLedger(t, nil)
				k.Stop(t)
			})
		}
	})
	if early.Load() == 0 {
		t.Error("every stop came after the CA had started: are its stages still found?")
	}
}
