package sds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"kedge/issuer/sparing"
)

// Limits of what a client may ask for. An Envoy asks for one secret a stream, and says a word to each response.
const (
	maxNames   = 100      // on one stream
	maxName    = 2048     // octets, as SPIFFE IDs have it (SPIFFE-ID 2.4)
	maxOctets  = 16 << 10 // of all names on one stream
	maxVersion = 256      // octets of a version that is looked at
	maxReason  = 512      // octets of what a client says of a refusal
	burst      = 200      // requests that a stream may make at once …
	rate       = 5        // … and in a second after that
)

const (
	// turn is how long a push takes part in the pacing. A client that does not answer by then holds up nobody any more.
	turn = 250 * time.Millisecond
	// fetchWait is how long a fetch waits for a secret that is still being made.
	fetchWait = 10 * time.Second
)

// Options are what a Server is made of.
type Options struct {
	Opener   Opener
	Pushes   int             // that are under way at once over all streams; default 512
	Patience time.Duration   // how long a client may take to answer a response before its stream is ended; default 1 min
	Ending   context.Context // ends all streams, in good order, when it ends; nil: never
	Logger   *slog.Logger    // default: nothing is logged
	Metrics  Metrics         // default: nothing is counted
}

// Metrics is what counts. resource is what Resource says of a name.
type Metrics interface {
	SDSStream(kind string, more int) // one began (1) or ended (-1)
	SDSPushed(resource string)       // a secret was sent
	SDSAnswered(resource string, took bool)
}

// The kinds of streams.
// Kinds are the kinds of streams.
var Kinds = []string{kindState, kindDelta}

const (
	kindState = "state-of-the-world"
	kindDelta = "delta"
)

// Server implements SecretDiscoveryService. Its methods may be called at once from several goroutines.
type Server struct {
	secret.UnimplementedSecretDiscoveryServiceServer
	opener   Opener
	slots    chan struct{} // holds one element for each push that is under way
	patience time.Duration
	ending   <-chan struct{}
	log      *slog.Logger
	lines    sparing.Lines
	metrics  Metrics
	bundles  atomic.Pointer[bundleSecrets] // made last

	mu      sync.Mutex
	holding map[Holding]int // streams by the bundle that they acknowledged last
}

// Holding names a bundle of the own trust domain; the zero value is none.
type Holding struct {
	Incarnation string
	Sequence    uint64
}

// New makes a server.
func New(o Options) *Server {
	s := &Server{opener: o.Opener, slots: make(chan struct{}, cmp.Or(o.Pushes, 512)), patience: cmp.Or(o.Patience, time.Minute), log: o.Logger, metrics: o.Metrics,
		holding: map[Holding]int{}}
	if o.Ending != nil {
		s.ending = o.Ending.Done()
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.metrics == nil {
		s.metrics = noMetrics{}
	}
	return s
}

type noMetrics struct{}

func (noMetrics) SDSStream(string, int)    {}
func (noMetrics) SDSPushed(string)         {}
func (noMetrics) SDSAnswered(string, bool) {}

// Register registers the service with a gRPC server that was made with ServerOption.
func (s *Server) Register(server grpc.ServiceRegistrar) {
	secret.RegisterSecretDiscoveryServiceServer(server, s)
}

// IsSDS says whether a gRPC method is this service's.
func IsSDS(method string) bool {
	return strings.HasPrefix(method, "/"+secret.SecretDiscoveryService_ServiceDesc.ServiceName+"/")
}

// Holdings counts the streams by the bundle that each acknowledged last. Those that acknowledged none yet, or asked for none, are under the zero Holding.
func (s *Server) Holdings() map[Holding]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[Holding]int, len(s.holding))
	for h, n := range s.holding {
		all[h] = n
	}
	return all
}

// holds notes that a stream went from one bundle to another. nil is for a stream that begins, or ends.
func (s *Server) holds(before, after *Holding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if before != nil {
		if s.holding[*before]--; s.holding[*before] == 0 {
			delete(s.holding, *before)
		}
	}
	if after != nil {
		s.holding[*after]++
	}
}

// guard keeps a defect from taking the process down.
func (s *Server) guard(err *error) {
	if p := recover(); p != nil {
		s.log.Error("panic in an SDS call", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error; the server's log says which")
	}
}

// tell logs what a client does. Everybody who may open a stream can cause such lines, so they are few.
func (s *Server) tell(ctx context.Context, source Source, what string, attrs ...any) {
	passedOver, tell := s.lines.Tell(time.Now())
	if !tell {
		return
	}
	if named, ok := source.(fmt.Stringer); ok {
		attrs = append(attrs, "stream", named.String())
	}
	if p, ok := peer.FromContext(ctx); ok {
		attrs = append(attrs, "peer", p.Addr.String())
	}
	s.log.WarnContext(ctx, what, append(attrs, "passed_over", passedOver)...)
}

// invalid is the refusal of a request that is wrong and stays wrong.
func invalid(format string, arguments ...any) error {
	return status.Errorf(codes.InvalidArgument, format, arguments...)
}

var errStopping = status.Error(codes.Unavailable, "the server is stopping: come back")

// errGone says that the client ended the stream, or its connection did.
var errGone = errors.New("the client is gone")
