package istio

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	pb "istio.io/api/security/v1alpha1"

	"kedge/issuer/metrics"
)

// early tells of callers that are refused before their call reaches the door: in the TLS handshake, or by gRPC itself, as when a message is too
// large. Nothing else would say a word of them.
type early struct {
	log     *slog.Logger
	metrics *metrics.Metrics
	sparing sparing
}

func (e *early) refused(what string, err error, address net.Addr) {
	passedOver, tell := e.sparing.tell(time.Now())
	if !tell {
		return
	}
	attrs := []any{"reason", err.Error(), "passed_over", passedOver}
	if address != nil {
		attrs = append(attrs, "peer", address.String())
	}
	e.log.Warn(what, attrs...)
}

// earlyLines is how many of these lines are logged in a second: everybody who reaches the port can cause them.
const earlyLines = 10

// sparing lets so many lines through in each second, and counts the others.
type sparing struct {
	mu         sync.Mutex
	second     int64
	lines      int
	passedOver int
}

// tell says whether a line is to be logged now, and how many were not since the last.
func (s *sparing) tell(now time.Time) (passedOver int, tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); second != s.second {
		s.second, s.lines = second, 0
	}
	if s.lines++; s.lines > earlyLines {
		s.passedOver++
		return 0, false
	}
	passedOver, s.passedOver = s.passedOver, 0
	return passedOver, true
}

// handshakes are credentials that tell of handshakes that fail.
type handshakes struct {
	credentials.TransportCredentials
	early *early
}

func (h handshakes) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		h.early.metrics.Handshake()
		h.early.refused("a TLS handshake failed", err, raw.RemoteAddr())
	}
	return conn, info, err
}

// otherCall marks the context of a call that is not for the CSR API.
type otherCall struct{}

// TagRPC implements stats.Handler.
func (*early) TagRPC(ctx context.Context, call *stats.RPCTagInfo) context.Context {
	if call.FullMethodName != pb.IstioCertificateService_CreateCertificate_FullMethodName {
		return context.WithValue(ctx, otherCall{}, true)
	}
	return ctx
}

// HandleRPC sees how each call ends. What the door refused has told of itself, and names a request id.
func (e *early) HandleRPC(ctx context.Context, event stats.RPCStats) {
	end, ok := event.(*stats.End)
	if !ok || end.Error == nil || strings.Contains(end.Error.Error(), requestIDText) || ctx.Value(otherCall{}) != nil {
		return
	}
	var address net.Addr
	if p, ok := peer.FromContext(ctx); ok {
		address = p.Addr
	}
	e.metrics.Call(metrics.ResultUnread, end.EndTime.Sub(end.BeginTime))
	e.refused("a call was refused before its request was read", end.Error, address)
}

func (*early) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*early) HandleConn(context.Context, stats.ConnStats)                       {}
