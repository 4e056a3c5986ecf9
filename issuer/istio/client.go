package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"
)

// Client asks a CSR API for certificates: Kedge's, or istiod's.
type Client struct {
	conn *grpc.ClientConn
	api  pb.IstioCertificateServiceClient
}

// Dial prepares a connection to address (host:port); it is made with the first call. The server must prove itself under roots;
// certificate, if not nil, proves the client.
func Dial(address string, roots *x509.CertPool, certificate *tls.Certificate) (*Client, error) {
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return nil, fmt.Errorf("connecting to the CA at %s: %w", address, err)
	}
	return &Client{conn: conn, api: pb.NewIstioCertificateServiceClient(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Sign sends a CSR (PEM). token may be empty; ttl 0 asks for the CA's default. It returns the chain, one certificate an element,
// leaf first, and the trust bundle.
func (c *Client) Sign(ctx context.Context, csr []byte, token string, ttl time.Duration) (chain []string, bundle string, err error) {
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	response, err := c.api.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: string(csr), ValidityDuration: int64(ttl / time.Second)})
	if err != nil {
		return nil, "", err
	}
	elements := response.GetCertChain()
	if len(elements) < 2 {
		return nil, "", errors.New("the CA's answer has no certificate chain followed by a trust bundle")
	}
	return elements[:len(elements)-1], elements[len(elements)-1], nil
}
