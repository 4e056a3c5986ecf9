package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"
)

// Client asks a CSR API for certificates: Kedge's, or istiod's.
type Client struct {
	// BundlesBySDS tells a CA of Kedge's that the SVID is handed to others, and which trust bundle these have is acknowledged on an SDS stream.
	BundlesBySDS bool

	conn    *grpc.ClientConn
	api     pb.IstioCertificateServiceClient
	servers *servers
}

// ErrUntrusted: the server did not prove itself under the roots. It will not by itself.
var ErrUntrusted = errors.New("the server does not prove itself")

// reconnect is how soon a connection that failed is tried again, and how long making one may take: a caller waits for it, and Retryable says
// that it should.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
	MinConnectTimeout: 5 * time.Second,
}

// ping finds out that a server is gone that said nothing, while a call is under way.
var ping = keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}

// Dial prepares a connection to address (host:port); it is made with the first call. The server must prove itself under roots;
// certificate, if not nil, proves the client.
func Dial(address string, roots *x509.CertPool, certificate *tls.Certificate) (*Client, error) {
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	servers := &servers{TransportCredentials: credentials.NewTLS(config)}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(servers), grpc.WithConnectParams(reconnect), grpc.WithKeepaliveParams(ping))
	if err != nil {
		return nil, fmt.Errorf("connecting to the CA at %s: %w", address, err)
	}
	return &Client{conn: conn, api: pb.NewIstioCertificateServiceClient(conn), servers: servers}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Signed is the answer to a CSR.
type Signed struct {
	Chain  []string // one certificate an element, leaf first
	Bundle string   // the trust bundle
	Number BundleNumber
}

// Sign sends a CSR (PEM). token may be empty; ttl 0 asks for the CA's default. The error is a gRPC status, or wraps ErrUntrusted.
func (c *Client) Sign(ctx context.Context, csr []byte, token string, ttl time.Duration) (*Signed, error) {
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if c.BundlesBySDS {
		ctx = metadata.AppendToOutgoingContext(ctx, deliveryHeader, deliverySDS)
	}
	var header metadata.MD
	response, err := c.api.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: string(csr), ValidityDuration: int64(ttl / time.Second)}, grpc.Header(&header))
	if err != nil {
		return nil, c.Reason(err)
	}
	elements := response.GetCertChain()
	if len(elements) < 2 {
		return nil, errors.New("the CA's answer has no certificate chain followed by a trust bundle")
	}
	return &Signed{Chain: elements[:len(elements)-1], Bundle: elements[len(elements)-1], Number: numberIn(header)}, nil
}

// Conn is for what else the server has on the same port.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Reason makes of what a call over Conn failed with an error like those of Sign.
func (c *Client) Reason(err error) error {
	if refused := c.servers.refused.Load(); refused != nil {
		return fmt.Errorf("%w: %w", ErrUntrusted, refused)
	}
	s := status.Convert(err)
	return status.Error(s.Code(), plain(s.Message()))
}

// plain is why there is no connection, without the wrappings in which gRPC's message has it:
//
//	connection error: desc = "transport: Error while dialing: dial tcp 192.0.2.1:15012: connect: connection refused"
func plain(message string) string {
	if message == "name resolver error: produced zero addresses" {
		return "the name has no address in the DNS"
	}
	_, quoted, found := strings.Cut(message, "connection error: desc = ")
	if !found {
		return message
	}
	if prefix, err := strconv.QuotedPrefix(quoted); err == nil {
		quoted = prefix
	}
	reason, err := strconv.Unquote(quoted)
	if err != nil {
		return message
	}
	if why, handshake := strings.CutPrefix(reason, "transport: authentication handshake failed: "); handshake {
		return "the TLS handshake failed: " + why
	}
	return strings.TrimPrefix(reason, "transport: Error while dialing: ")
}

// Retryable says whether the same call may succeed later: the server is not there yet or cannot do it now. The codes are those that istio-agent
// repeats; no other refusal goes away by itself.
func Retryable(err error) bool {
	if errors.Is(err, ErrUntrusted) {
		return false
	}
	switch status.Code(err) {
	case grpccodes.Unavailable, grpccodes.ResourceExhausted, grpccodes.DeadlineExceeded, grpccodes.Aborted, grpccodes.Internal, grpccodes.Canceled:
		return true
	}
	return false
}

// servers notes why the latest server did not prove itself, which gRPC tells only as a part of a text.
type servers struct {
	credentials.TransportCredentials
	refused atomic.Pointer[tls.CertificateVerificationError] // nil: it did, or may yet
}

func (s *servers) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := s.TransportCredentials.ClientHandshake(ctx, authority, raw)
	var refused *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &refused) || errors.As(err, &invalid) && invalid.Reason == x509.Expired { // a machine that has just started may have its clock set yet
		refused = nil
	}
	s.refused.Store(refused)
	return conn, info, err
}
