// Package istio is the door for istio-agents and ztunnels: istio.v1.auth.IstioCertificateService, as istiod's CA answers it.
//
// The package has both ends: Server answers, Client asks (for a machine without an agent).
package istio

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/issuer/metrics"
	"kedge/issuer/reception"
)

// The fields of IstioCertificateRequest.metadata that mean something.
const (
	certSigner           = "CertSigner"           // names a profile; istio-agent always sends it, mostly empty
	impersonatedIdentity = "ImpersonatedIdentity" // ztunnel asks for a workload on its node
)

// Server implements IstioCertificateService.
type Server struct {
	pb.UnimplementedIstioCertificateServiceServer
	*reception.Desk
	CA      *ca.CA
	Tracer  trace.Tracer
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
	began, id := time.Now(), reception.NewRequestID()
	ctx, span := s.Tracer.Start(ctx, "issue")
	defer span.End()
	_ = grpc.SetHeader(ctx, metadata.Pairs(reception.RequestIDHeader, id)) // fails only after the header was sent

	issued, caller, err := s.issue(ctx, id, request)
	if err != nil {
		result, answer := reception.Refuse(id, err)
		s.Metrics.Call(result, time.Since(began))
		span.SetStatus(codes.Error, result)
		s.LogRefusal(ctx, "certificate refused", id, result, caller, err)
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
	number := BundleNumber{issued.Bundle.Incarnation().String(), issued.Bundle.Sequence}
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
	credentials, place, err := s.Admit(ctx, id)
	caller.Peer = credentials.Peer
	if err != nil {
		return nil, caller, err
	}
	defer place.Leave()
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
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
	issued, err = requested.Issue(ctx, ca.Request{TTL: ca.Seconds(request.GetValidityDuration()), Delivery: deliveryOf(ctx), RequestID: id})
	if err == nil {
		if profile == "" {
			profile = ca.DefaultProfile
		}
		s.Metrics.Issued(profile, caller.Proofs[0].Method, issued.ClampedFrom > 0)
	}
	return issued, caller, err
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
