package crash

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"

	"kedge/test/process"
)

// wire is a network between clients and a CA that can be cut: from then on nothing goes through, in neither direction, and nobody is told.
type wire struct {
	address string
	mu      sync.Mutex
	ends    []net.Conn
	cut     chan struct{}
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{address: listener.Addr().String(), cut: make(chan struct{})}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return // the listener is closed
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				t.Errorf("the wire: %v", err)
				return
			}
			w.mu.Lock()
			w.ends = append(w.ends, client, server)
			w.mu.Unlock()
			for from, to := range map[net.Conn]net.Conn{client: server, server: client} {
				running.Go(func() { w.carry(to, from) })
			}
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		w.mu.Lock()
		for _, end := range w.ends {
			_ = end.Close() // perhaps a second time
		}
		w.mu.Unlock()
		running.Wait()
	})
	return w
}

// carry moves what comes, until the wire is cut or an end hangs up.
func (w *wire) carry(to, from net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		select {
		case <-w.cut:
			return // and both ends stay open
		default:
		}
		if err == nil {
			_, err = to.Write(buffer[:n])
		}
		if err != nil {
			_ = to.Close() // so that the other end hears of it
			return
		}
	}
}

// dial is for a client that goes through the wire.
func (w *wire) dial() grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", w.address)
	})
}

// TestPeersThatVanishCostNothingForLong: connections whose other end is gone without a word, with and without a call before, are closed, and their descriptors
// come back. Other callers do not notice.
func TestPeersThatVanishCostNothingForLong(t *testing.T) {
	t.Parallel()
	const peers, half = 20, 10
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, `
csr: {listen: "127.0.0.1:0", keepaliveTime: 10s, keepaliveTimeout: 1s}
operations: {listen: "127.0.0.1:0"}
log: {level: warn}
`+cluster.Configuration(t, k.Dir))
	k.Start(t)
	w := newWire(t, k.Status(t).CSRAddress)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	before := k.Metrics(t)["process_open_fds"]

	for range peers {
		caller := k.Dial(t, nil, w.dial())
		l.ask(t.Context(), caller, l.keys[0], l.tokens[0])
	}
	for range half { // these have not even begun with TLS
		conn, err := net.Dial("tcp", w.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	process.Eventually(t, "the connections to be there", func() error {
		if now := k.Metrics(t)["process_open_fds"]; now < before+peers+half {
			return fmt.Errorf("%v descriptors, and %v before", now, before)
		}
		return nil
	})
	close(w.cut)
	process.Eventually(t, "the descriptors to come back", func() error {
		if now := k.Metrics(t)["process_open_fds"]; now > before+3 { // a scrape has some itself
			return fmt.Errorf("%v descriptors, and %v before", now, before)
		}
		return nil
	})
	l.await(t, 50)
	stop()
	if refused := l.refused.Load(); refused > 0 {
		t.Errorf("%d others were refused", refused)
	}
	l.check(t, k)
}

// TestAStopWaitsForNobodyWhoVanished: SIGTERM while calls are under way whose callers are gone without a word.
func TestAStopWaitsForNobodyWhoVanished(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	k.Start(t)
	w := newWire(t, k.Status(t).CSRAddress)
	l := newLoad(t, cluster)
	l.ask(t.Context(), k.Dial(t, nil, w.dial()), l.keys[0], l.tokens[0])
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range workers {
		caller := k.Dial(t, nil, w.dial())
		asking.Go(func() {
			for ctx.Err() == nil {
				l.ask(ctx, caller, l.keys[0], l.tokens[0])
			}
		})
	}
	l.await(t, 100)
	close(w.cut)
	k.Stop(t)
	cancel()
	asking.Wait()
	k.Start(t)
	l.check(t, k)
}
