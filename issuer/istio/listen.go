package istio

import (
	"context"
	"crypto/tls"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"

	"kedge/issuer/sds"
)

// Limits of what a caller may send.
const (
	maxMessage = 256 << 10 // octets; a CSR has at most 16 KiB, and a larger one still gets a clear answer
	maxHeaders = 32 << 10  // octets; a token has at most 16 KiB
	maxStreams = 16        // calls at once on one connection: an istio-agent makes one, a ztunnel some, an Envoy one for each secret. More would wait here under overload, for the collector to go through
	window     = 64 << 10  // octets that a client may send ahead, on a stream and on a connection: the least that HTTP/2 allows, and never more

	// readBuffer is what each connection keeps, in octets: enough for a request with its header.
	readBuffer = 4 << 10
	// handshake bounds a handshake with all its waiting behind others. What a client is waited for has a limit of its own: see gate.
	handshake = 2 * time.Minute
)

// Connections says how connections are kept. Istio's agent pings every 30 s (its environment may lower that to gRPC's floor of
// 10 s), only during calls, and closes an idle connection after 30 minutes by itself.
type Connections struct {
	MaxAge      time.Duration // after which a connection is asked to end, so that agents spread over replicas again
	MaxAgeGrace time.Duration // for the calls that are still on it
	MinPing     time.Duration // a client that pings more often is disconnected
	Ping        time.Duration // after so long without a word from a client it is pinged …
	PingTimeout time.Duration // … and disconnected when it does not answer
	Reflection  bool          // whether gRPC reflection lists the services
	Stats       stats.Handler // traces; nil: none

	// SDS is served on the same port; nil: it is not. Its streams end by themselves, and with its own Options.Ending.
	SDS *sds.Server

	// Streams ends the streams of health and reflection, which do not end by themselves, so that a server can stop in good order
	// as soon as its calls are answered; nil: they end with the server.
	Streams context.Context
}

// NewGRPCServer makes the gRPC server of the CSR API's port, with SDS, health and, if asked for, reflection.
// The health service's status is the caller's to set. The listener that it serves has to be one of s.Gate's.
func NewGRPCServer(s *Server, config *tls.Config, c Connections) (*grpc.Server, *health.Server) {
	options := []grpc.ServerOption{
		grpc.Creds(s.Gate.Credentials(credentials.NewTLS(config))),
		grpc.StatsHandler(s.Gate.Stats()),
		grpc.ChainUnaryInterceptor(s.Gate.UnaryInterceptor),
		grpc.ChainStreamInterceptor(s.Gate.StreamInterceptor),
		sds.ServerOption(),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.ReadBufferSize(readBuffer), // connections are many, and mostly idle
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshake),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: c.MinPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge: c.MaxAge, MaxConnectionAgeGrace: c.MaxAgeGrace,
			Time: c.Ping, Timeout: c.PingTimeout, // finds peers that vanished without a word
		}),
	}
	if c.Streams != nil {
		options = append(options, grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if sds.IsSDS(info.FullMethod) {
				return handle(srv, stream) // very many, and without another goroutine for each
			}
			ctx, cancel := context.WithCancel(stream.Context())
			defer cancel()
			defer context.AfterFunc(c.Streams, cancel)()
			return handle(srv, endingStream{stream, ctx})
		}))
	}
	if c.Stats != nil {
		options = append(options, grpc.StatsHandler(c.Stats))
	}
	server := grpc.NewServer(options...)
	pb.RegisterIstioCertificateServiceServer(server, s)
	if c.SDS != nil {
		c.SDS.Register(server)
	}
	healthServer := health.NewServer()
	grpc_health_v1.RegisterHealthServer(server, healthServer)
	if c.Reflection {
		reflection.Register(server)
	}
	return server, healthServer
}

// endingStream is a stream that ends with a context of its own.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

// RecvMsg waits for the client's next message, and no longer than the context lasts; what is left of it then ends with the stream.
func (s endingStream) RecvMsg(message any) error {
	received := make(chan error, 1)
	go func() { received <- s.ServerStream.RecvMsg(message) }()
	select {
	case err := <-received:
		return err
	case <-s.ctx.Done():
		return status.FromContextError(s.ctx.Err()).Err()
	}
}
