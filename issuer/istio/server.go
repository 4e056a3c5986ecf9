// Package istio is the door for istio-agents and ztunnels: istio.v1.auth.IstioCertificateService, as istiod's CA answers it.
//
// The package has both ends: Server answers, Client asks (for a machine without an agent).
package istio

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
	"kedge/issuer/gate"
	"kedge/issuer/metrics"
)

// The fields of IstioCertificateRequest.metadata that mean something.
const (
	certSigner           = "CertSigner"           // names a profile; istio-agent always sends it, mostly empty
	impersonatedIdentity = "ImpersonatedIdentity" // ztunnel asks for a workload on its node
)

// requestIDHeader carries the request id back, in the header of every answer.
const requestIDHeader = "x-request-id"

// Server implements IstioCertificateService.
type Server struct {
	pb.UnimplementedIstioCertificateServiceServer
	CA      *ca.CA
	Callers *authn.Authenticator
	Metrics *metrics.Metrics
	Log     *slog.Logger
	Tracer  trace.Tracer
	Gate    *gate.Gate    // at which callers take turns
	Waiting time.Duration // how long a call may wait for its turn, which costs next to nothing
	Timeout time.Duration // of one call once it has its turn: the agent sets none, and waits with a lock held
}

// IsCSR says whether a gRPC method is the CSR API's.
func IsCSR(method string) bool {
	return method == pb.IstioCertificateService_CreateCertificate_FullMethodName
}

// CreateCertificate answers a CSR. The identity is the caller's; of the CSR only the public key counts (I4).
//
// The answer's cert_chain has the leaf first, then what leads to a root, one certificate an element, and last the whole trust
// bundle in one element. The codes are those that make the agent try again when that helps: Unavailable, and no other.
func (s *Server) CreateCertificate(ctx context.Context, request *pb.IstioCertificateRequest) (*pb.IstioCertificateResponse, error) {
	began, id := time.Now(), newRequestID()
	ctx, span := s.Tracer.Start(ctx, "issue")
	defer span.End()
	_ = grpc.SetHeader(ctx, metadata.Pairs(requestIDHeader, id)) // fails only after the header was sent

	issued, caller, err := s.issue(ctx, id, request)
	if err != nil {
		result, answer := refuse(id, err)
		s.Metrics.Call(result, time.Since(began))
		span.SetStatus(codes.Error, result)
		s.logRefusal(ctx, id, result, caller, err)
		return nil, answer
	}
	s.Metrics.Call(metrics.ResultIssued, time.Since(began))
	attrs := []slog.Attr{slog.String("request_id", id), slog.String("spiffe_id", issued.ID.String()),
		slog.String("serial", issued.Serial.String()), slog.Uint64("number", issued.Number), slog.String("method", caller.Proofs[0].Method),
		slog.String("peer", caller.Peer), slog.Time("not_after", issued.NotAfter)}
	if issued.ClampedFrom > 0 {
		attrs = append(attrs, slog.String("clamped_from", ca.DurationText(issued.ClampedFrom)))
	}
	s.Log.LogAttrs(ctx, slog.LevelInfo, "certificate issued", attrs...)
	number := BundleNumber{issued.Bundle.Record().Incarnation.String(), issued.Bundle.Sequence}
	_ = grpc.SetHeader(ctx, metadata.Pairs(bundleHeader, number.String())) // as above
	return &pb.IstioCertificateResponse{CertChain: append(issued.Chain, issued.Bundle.PEM)}, nil
}

// issue authenticates the caller and signs for it.
func (s *Server) issue(ctx context.Context, id string, request *pb.IstioCertificateRequest) (issued *ca.Issued, caller ca.Caller, err error) {
	defer func() {
		if p := recover(); p != nil { // a defect in here must not take the CA down
			s.Log.Error("panic while answering a CSR", "request_id", id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	credentials, address := callerOf(ctx)
	credentials.RequestID = id
	caller.Peer = credentials.Peer
	place, err := s.enter(ctx, address)
	if err != nil {
		return nil, caller, err
	}
	defer place.Leave()
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	credentials.Aside = func() (back func(context.Context) error) {
		place.Leave()
		return place.Again
	}
	authenticated, err := s.Callers.Authenticate(ctx, credentials)
	if err != nil {
		return nil, caller, err
	}
	caller = authenticated
	identity, err := metadataText(request, impersonatedIdentity)
	if err != nil {
		return nil, caller, err
	}
	if identity != "" {
		return nil, caller, ca.Denied(fmt.Errorf("%s asks for a certificate in the name of %.256q: nobody is authorised to do that", caller.ID, identity))
	}
	profile, err := metadataText(request, certSigner)
	if err != nil {
		return nil, caller, err
	}
	granted, err := s.CA.Grant(caller, profile)
	if err != nil {
		return nil, caller, err
	}
	requested, err := granted.ReadCSR([]byte(request.GetCsr()))
	if err != nil {
		return nil, caller, err
	}
	place.Checked()
	issued, err = requested.Issue(ctx, ca.Request{TTL: ca.Seconds(request.GetValidityDuration()), Delivery: ledger.DeliveryResponse, RequestID: id})
	if err == nil {
		if profile == "" {
			profile = ca.DefaultProfile
		}
		s.Metrics.Issued(profile, caller.Proofs[0].Method, issued.ClampedFrom > 0)
	}
	return issued, caller, err
}

// enter waits for the call's turn.
func (s *Server) enter(ctx context.Context, address net.Addr) (place *gate.Place, err error) {
	waiting, cancel := context.WithTimeout(ctx, s.Waiting)
	defer cancel()
	began := time.Now()
	place, err = s.Gate.Enter(waiting, address)
	s.Metrics.Waited(time.Since(began))
	if err != nil && ctx.Err() == nil {
		err = ca.Unavailable(err)
	}
	return place, err
}

// metadataText reads a field of the request's metadata. One that is not a text is refused rather than passed over.
func metadataText(request *pb.IstioCertificateRequest, name string) (string, error) {
	field, ok := request.GetMetadata().GetFields()[name]
	if !ok {
		return "", nil
	}
	if text, ok := field.GetKind().(*structpb.Value_StringValue); ok {
		return text.StringValue, nil
	}
	return "", ca.Invalid(fmt.Errorf("metadata.%s is not a string", name))
}

// maxClusterID bounds the caller's own word that goes into the ledger.
const maxClusterID = 128

// callerOf takes from a call what may prove who is asking, and its address.
func callerOf(ctx context.Context) (c authn.Credentials, address net.Addr) {
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		c.Tokens = md.Get("authorization")
		if ids := md.Get("clusterid"); len(ids) > 0 {
			c.ClusterID = ids[0][:min(len(ids[0]), maxClusterID)]
		}
	}
	if p, ok := peer.FromContext(ctx); ok {
		address, c.Peer = p.Addr, p.Addr.String()
		if info, ok := p.AuthInfo.(gate.Info); ok {
			c.Certificates = info.State.PeerCertificates
		}
	}
	return c, address
}

// refuse turns an error into what the caller gets to see. Only a wrong request is explained: for everything else the request id leads an admin to the log.
func refuse(id string, err error) (result string, answer error) {
	switch {
	case errors.Is(err, ca.ErrCSR):
		return metrics.ResultBadCSR, status.Errorf(grpccodes.InvalidArgument, "%s (request id %s)", err, id)
	case errors.Is(err, ca.ErrInvalid):
		return metrics.ResultInvalid, status.Errorf(grpccodes.InvalidArgument, "%s (request id %s)", err, id)
	case errors.Is(err, ca.ErrUnauthenticated):
		return metrics.ResultUnauthenticated, status.Errorf(grpccodes.Unauthenticated, "not authenticated; the CA's log says why (request id %s)", id)
	case errors.Is(err, ca.ErrDenied):
		return metrics.ResultDenied, status.Errorf(grpccodes.PermissionDenied, "permission denied; the CA's log says why (request id %s)", id)
	case errors.Is(err, context.Canceled):
		return metrics.ResultCanceled, status.Errorf(grpccodes.Canceled, "the caller went away (request id %s)", id)
	case errors.Is(err, ca.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		// Istio's retry interceptor never repeats DeadlineExceeded, whatever its list says; Unavailable it does.
		return metrics.ResultUnavailable, status.Errorf(grpccodes.Unavailable, "temporarily unavailable, try again; the CA's log says why (request id %s)", id)
	}
	return metrics.ResultInternal, status.Errorf(grpccodes.Internal, "internal error; the CA's log says which (request id %s)", id)
}

func (s *Server) logRefusal(ctx context.Context, id, result string, caller ca.Caller, err error) {
	level := slog.LevelWarn
	switch result {
	case metrics.ResultInternal, metrics.ResultUnavailable:
		level = slog.LevelError
	case metrics.ResultCanceled:
		level = slog.LevelInfo
	}
	if errors.Is(err, ledger.ErrSuperseded) { // a join token is in two hands
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("request_id", id), slog.String("result", result), slog.String("reason", err.Error()), slog.String("peer", caller.Peer)}
	if !caller.ID.IsZero() {
		attrs = append(attrs, slog.String("spiffe_id", caller.ID.String()))
	}
	s.Log.LogAttrs(ctx, level, "certificate refused", attrs...)
}

func newRequestID() string {
	var octets [8]byte
	rand.Read(octets[:]) // never fails since Go 1.24
	return hex.EncodeToString(octets[:])
}
