// Package workload is the door for programs that have their SVID from the SPIFFE Workload API: its X.509-SVID profile, as go-spiffe's X509Source asks for it.
//
// A Server is registered together with Options, which refuse what lacks the header that every client of the API sends. What it hands out comes from a Source, one
// for each stream, as in issuer/sds. The profiles of JWT-SVIDs and WIT-SVIDs are Unimplemented.
//
// The API has no acknowledgement: a client counts as holding what was sent to it.
package workload

import (
	"context"
	"crypto/x509"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kedge/issuer/sds"
)

// Source is where a stream's secrets come from.
type Source interface {
	sds.Source
	// Missing is the gRPC status for a client for whom there is nothing: Unavailable when it may come by itself, PermissionDenied when the CA has refused.
	Missing() error
}

// Opener decides who may have a stream. An error is a gRPC status.
type Opener interface {
	OpenWorkload(ctx context.Context) (Source, error)
}

// Server implements the SpiffeWorkloadAPI.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	Opener Opener
}

// securityHeader keeps a server-side request forgery from getting at the API (SPIFFE Workload Endpoint 3).
const securityHeader = "workload.spiffe.io"

// Options make a gRPC server refuse calls of the API that lack the header.
func Options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := checkHeader(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handle(server, stream)
		}),
	}
}

func checkHeader(ctx context.Context, method string) error {
	if !strings.HasPrefix(method, "/"+workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/") {
		return nil
	}
	if md, _ := metadata.FromIncomingContext(ctx); !slices.Equal(md.Get(securityHeader), []string{"true"}) {
		return status.Errorf(codes.InvalidArgument, "the call lacks the header %q with the value \"true\", which every client of the Workload API sends", securityHeader)
	}
	return nil
}

// FetchX509SVID sends the SVID with its key and the trust bundles, and does so again whenever they change.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.follow(stream.Context(), sds.Wants{SVID: true, Bundle: true}, func(m *sds.Materials) error {
		key, err := x509.MarshalPKCS8PrivateKey(m.SVID.Key)
		if err != nil {
			return status.Error(codes.Internal, "the key of the SVID cannot be encoded")
		}
		response := &workload.X509SVIDResponse{
			Svids:            []*workload.X509SVID{{SpiffeId: m.SVID.ID.String(), X509Svid: der(m.SVID.Chain), X509SvidKey: key, Bundle: der(m.Bundles[0].Roots)}},
			FederatedBundles: map[string][]byte{},
		}
		for _, b := range m.Bundles[1:] {
			response.FederatedBundles[b.TrustDomain.IDString()] = der(b.Roots)
		}
		return stream.Send(response)
	})
}

// FetchX509Bundles sends the trust bundles, and does so again whenever they change.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.follow(stream.Context(), sds.Wants{Bundle: true}, func(m *sds.Materials) error {
		response := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range m.Bundles {
			response.Bundles[b.TrustDomain.IDString()] = der(b.Roots)
		}
		return stream.Send(response)
	})
}

// follow sends what the stream wants and can have, whenever that has changed. A client for whom there is nothing at first is told so, rather than kept waiting (SPIFFE
// Workload API 4.3); one that has something keeps it until there is something else.
func (s *Server) follow(ctx context.Context, wants sds.Wants, send func(*sds.Materials) error) error {
	source, err := s.Opener.OpenWorkload(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	source.Want(wants)
	var sent sds.Materials
	for {
		now, changed := source.Materials()
		has := len(now.Bundles) > 0 && (now.SVID != nil || !wants.SVID)
		switch news := !slices.Equal(now.Bundles, sent.Bundles) || wants.SVID && now.SVID != sent.SVID; {
		case has && news:
			if err := send(now); err != nil {
				return err
			}
			sent = *now
			answer := sds.Answer{Bundle: now.Bundles[0]}
			if wants.SVID {
				answer.SVID = now.SVID
			}
			source.Answered(answer)
		case !has && sent.Bundles == nil:
			return source.Missing()
		}
		select {
		case <-changed:
		case <-source.Ended():
			return source.Err()
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// der is certificates one after the other, in DER.
func der(certificates []*x509.Certificate) []byte {
	var all []byte
	for _, c := range certificates {
		all = append(all, c.Raw...)
	}
	return all
}
