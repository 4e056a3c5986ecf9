package istio

import (
	"context"
	"net"
	"strings"

	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	pb "istio.io/api/security/v1alpha1"

	"kedge/issuer/gate"
	"kedge/issuer/metrics"
)

// early is a statistics handler that tells of calls which gRPC itself refuses before the door sees them, as when a message is too large. Nothing else
// would say a word of them.
type early struct {
	gate    *gate.Gate
	metrics *metrics.Metrics
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
	e.gate.Tell("a call was refused before its request was read", end.Error, address)
}

func (*early) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*early) HandleConn(context.Context, stats.ConnStats)                       {}
