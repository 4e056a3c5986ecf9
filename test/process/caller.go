package process

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"
)

// Caller is a connection to the CSR API.
type Caller struct {
	Conn *grpc.ClientConn
	api  pb.IstioCertificateServiceClient
}

// Dial connects to the running CA, which must prove itself under its root. certificate, if not nil, proves the caller.
func (k *Kedge) Dial(t testing.TB, certificate *tls.Certificate, options ...grpc.DialOption) *Caller {
	t.Helper()
	status := k.Status(t)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(Read(t, status.RootFile))) {
		t.Fatalf("%s has no certificate", status.RootFile)
	}
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	conn, err := grpc.NewClient(status.CSRAddress, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // a second time when the test closed it
	return &Caller{conn, pb.NewIstioCertificateServiceClient(conn)}
}

// Issue asks for a certificate. token may be "", ttl 0 asks for the default. The error is gRPC's own.
func (c *Caller) Issue(ctx context.Context, csr, token string, ttl time.Duration) (*Issued, error) {
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	response, err := c.api.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: csr, ValidityDuration: int64(ttl / time.Second)})
	if err != nil {
		return nil, err
	}
	return parse(response.GetCertChain())
}

// Health asks gRPC's own health service.
func (c *Caller) Health(ctx context.Context) (grpc_health_v1.HealthCheckResponse_ServingStatus, error) {
	response, err := grpc_health_v1.NewHealthClient(c.Conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return response.GetStatus(), err
}

// Issued is the answer to a CSR.
type Issued struct {
	Leaf  *x509.Certificate
	Chain []*x509.Certificate // what leads from it to a root
	Roots *x509.CertPool
	PEM   string // the leaf, and the chain behind it
}

func parse(elements []string) (*Issued, error) {
	if len(elements) < 3 {
		return nil, fmt.Errorf("the answer has %d elements: there are a leaf, an issuing CA and a bundle", len(elements))
	}
	issued := &Issued{Roots: x509.NewCertPool()}
	for _, element := range elements[:len(elements)-1] {
		block, rest := pem.Decode([]byte(element))
		if block == nil || len(rest) > 0 {
			return nil, errors.New("an element of the chain is not one PEM block")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		issued.Chain = append(issued.Chain, cert)
		issued.PEM += element
	}
	issued.Leaf, issued.Chain = issued.Chain[0], issued.Chain[1:]
	if !issued.Roots.AppendCertsFromPEM([]byte(elements[len(elements)-1])) {
		return nil, errors.New("the bundle has no certificate")
	}
	return issued, nil
}

// VerifyAt verifies the chain as a peer would at that moment.
func (i *Issued) VerifyAt(now time.Time) error {
	between := x509.NewCertPool()
	for _, cert := range i.Chain {
		between.AddCert(cert)
	}
	_, err := i.Leaf.Verify(x509.VerifyOptions{Roots: i.Roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// Key is a key pair with a CSR for it.
type Key struct {
	Signer crypto.Signer
	CSR    string
}

// NewKey makes a P-256 key and its CSR.
func NewKey(t testing.TB) Key {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return Key{key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))}
}

// Certificate is what a client shows that holds the key and what was issued for it.
func (k Key) Certificate(i *Issued) *tls.Certificate {
	certificate := &tls.Certificate{PrivateKey: k.Signer, Leaf: i.Leaf, Certificate: [][]byte{i.Leaf.Raw}}
	for _, cert := range i.Chain {
		certificate.Certificate = append(certificate.Certificate, cert.Raw)
	}
	return certificate
}
