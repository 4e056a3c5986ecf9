package istio

import (
	"crypto/tls"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"
	pb "istio.io/api/security/v1alpha1"
)

// Limits of what a caller may send.
const (
	maxMessage = 256 << 10 // octets; a CSR has at most 16 KiB, and a larger one still gets a clear answer
	maxHeaders = 32 << 10  // octets; a token has at most 16 KiB
	maxStreams = 256       // calls at once on one connection
	handshake  = 10 * time.Second
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
}

// NewGRPCServer makes the gRPC server of the CSR API's port, with health and, if asked for, reflection.
// The health service's status is the caller's to set.
func NewGRPCServer(s *Server, config *tls.Config, c Connections) (*grpc.Server, *health.Server) {
	options := []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(config)),
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
	if c.Stats != nil {
		options = append(options, grpc.StatsHandler(c.Stats))
	}
	server := grpc.NewServer(options...)
	pb.RegisterIstioCertificateServiceServer(server, s)
	healthServer := health.NewServer()
	grpc_health_v1.RegisterHealthServer(server, healthServer)
	if c.Reflection {
		reflection.Register(server)
	}
	return server, healthServer
}
