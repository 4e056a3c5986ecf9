package crash

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

func TestMain(m *testing.M) { os.Exit(process.Main(m)) }

const (
	workers     = 32
	connections = 4
)

// load is a crowd of clients that ask for certificates without a pause, most with service account tokens, some with client certificates.
type load struct {
	received atomic.Int64
	refused  atomic.Int64

	mu     sync.Mutex
	leaves []*x509.Certificate // that clients hold
	proofs []*tls.Certificate  // of those that renew without a token
	odd    []error             // other than the ones that a client has to live with

	keys   []process.Key
	tokens []string
}

func newLoad(t *testing.T, cluster *process.Cluster) *load {
	t.Helper()
	l := &load{}
	for i := range 8 {
		l.keys = append(l.keys, process.NewKey(t))
		l.tokens = append(l.tokens, cluster.Token(t, "default", fmt.Sprintf("web-%d", i)))
	}
	return l
}

// newCA makes a CA that accepts a cluster's tokens.
func newCA(t *testing.T, cluster *process.Cluster, yaml string) *process.Kedge {
	t.Helper()
	k := process.New(t, "")
	process.Write(t, k.Config, process.Ports+cluster.Configuration(t, k.Dir)+yaml)
	return k
}

// start sets the clients to work on a running CA. The first that gets an answer of another code than Unavailable, or none at all, says so.
// stop ends them and waits for the last answer.
func (l *load) start(t *testing.T, k *process.Kedge) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	callers := make([]*process.Caller, connections)
	for i := range callers {
		var proof *tls.Certificate
		if i < len(l.proofs) {
			proof = l.proofs[i]
		}
		callers[i] = k.Dial(t, proof)
	}
	var running sync.WaitGroup
	for i := range workers {
		running.Go(func() {
			caller, key, token := callers[i%connections], l.keys[i%len(l.keys)], l.tokens[i%len(l.tokens)]
			if i%connections < len(l.proofs) {
				until := l.proofs[i%connections].Leaf.NotAfter.Add(-5 * time.Second)
				for ctx.Err() == nil && time.Now().Before(until) {
					l.ask(ctx, caller, key, "") // the connection's client certificate proves who asks
				}
				token = l.tokens[i%connections] // of the same one
			}
			for ctx.Err() == nil {
				l.ask(ctx, caller, key, token)
			}
		})
	}
	return sync.OnceFunc(func() {
		cancel()
		running.Wait()
		for _, caller := range callers {
			_ = caller.Conn.Close() // its server may be gone
		}
	})
}

func (l *load) ask(ctx context.Context, caller *process.Caller, key process.Key, token string) {
	issued, err := caller.Issue(ctx, key.CSR, token, 0)
	switch {
	case err == nil:
		l.received.Add(1)
		l.mu.Lock()
		l.leaves = append(l.leaves, issued.Leaf)
		l.mu.Unlock()
	case ctx.Err() != nil: // this client gave up; nobody received anything
	case status.Code(err) == codes.Unavailable:
		l.refused.Add(1)
	default:
		l.mu.Lock()
		l.odd = append(l.odd, err)
		l.mu.Unlock()
	}
}

// prove gives some of the connections a client certificate from now on, for as long as it is valid.
func (l *load) prove(t *testing.T, k *process.Kedge) {
	t.Helper()
	caller := k.Dial(t, nil)
	l.proofs = nil
	for i := range connections / 2 {
		key := process.NewKey(t)
		issued, err := caller.Issue(t.Context(), key.CSR, l.tokens[i], 0)
		if err != nil {
			t.Fatal(err)
		}
		l.leaves = append(l.leaves, issued.Leaf)
		l.proofs = append(l.proofs, key.Certificate(issued))
	}
}

// await waits until so many more certificates were received.
func (l *load) await(t *testing.T, more int64) {
	t.Helper()
	goal := l.received.Load() + more
	process.Eventually(t, fmt.Sprintf("%d more certificates", more), func() error {
		if got := l.received.Load(); got < goal {
			return fmt.Errorf("%d of %d were received, %d calls were refused", got, goal, l.refused.Load())
		}
		return nil
	})
}

// take gives away what was received since the last time, once no client was told anything but what it can live with.
func (l *load) take(t *testing.T) (leaves []*x509.Certificate) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.complain(t)
	leaves, l.leaves = l.leaves, nil
	return leaves
}

// complain tells of what clients cannot live with.
func (l *load) complain(t *testing.T) {
	t.Helper()
	for i, err := range l.odd {
		if i == 5 {
			t.Errorf("… and %d more", len(l.odd)-i)
			break
		}
		t.Errorf("a client was told: %v", err)
	}
}

// check makes sure that clients were told nothing but what they can live with, and that the ledger has all that they hold.
func (l *load) check(t *testing.T, k *process.Kedge) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.complain(t)
	if len(l.leaves) == 0 {
		t.Error("no client received anything")
	}
	k.CheckLedger(t, l.leaves)
}
