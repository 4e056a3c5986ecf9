// Command istio-ca is Istio's own CA server, to be measured beside Kedge, and for agents to move from to Kedge: the certificate authority, the CSR API and the authenticators of istiod
// (security/pkg/pki/ca, security/pkg/server/ca, security/pkg/server/ca/authenticate), behind a gRPC server with the options and the TLS configuration
// that istiod gives its secure port. It is a module of its own, so that Istio's dependencies stay out of Kedge's go.mod and have the versions that Istio
// ships with.
//
//	istio-ca FOLDER ADDRESS
//
// The folder has istiod's "cacerts" (ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem), the certificate of the server (tls-cert.pem, tls-key.pem), and
// the key set of the token issuer (jwks.json) with its name (issuer). Once it serves, it writes the address, whose port may have been 0, to the file "address" in the
// folder. It runs until SIGTERM.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/api/security/v1beta1"
	istiogrpc "istio.io/istio/pilot/pkg/grpc"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/keepalive"
	"istio.io/istio/pkg/security"
	"istio.io/istio/pkg/spiffe"
	"istio.io/istio/pkg/xds"
	"istio.io/istio/security/pkg/cmd"
	"istio.io/istio/security/pkg/pki/ca"
	caserver "istio.io/istio/security/pkg/server/ca"
	"istio.io/istio/security/pkg/server/ca/authenticate"
)

const (
	trustDomain = "cluster.local"
	audience    = "istio-ca"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "istio-ca:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if len(os.Args) != 3 {
		return errors.New("usage: istio-ca FOLDER ADDRESS")
	}
	dir := os.Args[1]
	authority, err := openAuthority(dir)
	if err != nil {
		return err
	}
	tokens, err := openTokens(dir)
	if err != nil {
		return err
	}
	// In istiod's order (pilot/pkg/bootstrap/server.go, NewServer).
	server, err := caserver.New(authority, cmd.DefaultMaxWorkloadCertTTL, []security.Authenticator{&authenticate.ClientCertAuthenticator{}, tokens}, nil)
	if err != nil {
		return fmt.Errorf("making the CSR API: %w", err)
	}
	creds, err := openTLS(dir, authority)
	if err != nil {
		return err
	}
	// As initSecureDiscoveryService in the same file has it.
	grpcprom.EnableHandlingTimeHistogram()
	secure := grpc.NewServer(append(istiogrpc.ServerOptions(keepalive.DefaultOption(), xds.RecordRecvSize, grpcprom.UnaryServerInterceptor), grpc.Creds(creds))...)
	server.Register(secure)
	listener, err := net.Listen("tcp", os.Args[2])
	if err != nil {
		return err
	}
	address := filepath.Join(dir, "address")
	if err := os.WriteFile(address+".new", []byte(listener.Addr().String()), 0o600); err != nil {
		return err
	}
	if err := os.Rename(address+".new", address); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, secure.Stop)()
	return secure.Serve(listener)
}

// openAuthority is istiod's CA with certificates that were plugged in.
func openAuthority(dir string) (*ca.IstioCA, error) {
	options, err := ca.NewPluggedCertIstioCAOptions(ca.SigningCAFileBundle{
		RootCertFile: filepath.Join(dir, ca.RootCertFile), CertChainFiles: []string{filepath.Join(dir, ca.CertChainFile)},
		SigningCertFile: filepath.Join(dir, ca.CACertFile), SigningKeyFile: filepath.Join(dir, ca.CAPrivateKeyFile),
	}, cmd.DefaultWorkloadCertTTL, cmd.DefaultMaxWorkloadCertTTL, 2048)
	if err != nil {
		return nil, fmt.Errorf("opening the CA: %w", err)
	}
	authority, err := ca.NewIstioCA(options)
	if err != nil {
		return nil, fmt.Errorf("opening the CA: %w", err)
	}
	return authority, nil
}

// openTokens is istiod's authenticator for tokens that it verifies itself. It takes the keys from a URL only, so that they are served here; it asks
// once and keeps them.
func openTokens(dir string) (*authenticate.JwtAuthenticator, error) {
	issuer, err := os.ReadFile(filepath.Join(dir, "issuer"))
	if err != nil {
		return nil, err
	}
	jwks, err := os.ReadFile(filepath.Join(dir, "jwks.json"))
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	keys := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(jwks) // the authenticator says that it got no keys
	})}
	go func() { _ = keys.Serve(listener) }() // until the process ends
	rule := &v1beta1.JWTRule{Issuer: strings.TrimSpace(string(issuer)), JwksUri: "http://" + listener.Addr().String(), Audiences: []string{audience}}
	tokens, err := authenticate.NewJwtAuthenticator(rule, fixedMesh{})
	if err != nil {
		return nil, fmt.Errorf("opening the token authenticator: %w", err)
	}
	return tokens, nil
}

// openTLS is what istiod's secure port has: client certificates are verified in the handshake when one is given.
func openTLS(dir string, authority *ca.IstioCA) (credentials.TransportCredentials, error) {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls-cert.pem"), filepath.Join(dir, "tls-key.pem"))
	if err != nil {
		return nil, err
	}
	peers := spiffe.NewPeerCertVerifier()
	if err := peers.AddMappingFromPEM(trustDomain, authority.GetCAKeyCertBundle().GetRootCertPem()); err != nil {
		return nil, err
	}
	return credentials.NewTLS(&tls.Config{
		GetCertificate:        func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &certificate, nil },
		ClientAuth:            tls.VerifyClientCertIfGiven,
		ClientCAs:             peers.GetGeneralCertPool(),
		VerifyPeerCertificate: peers.VerifyPeerCert,
		MinVersion:            tls.VersionTLS12,
	}), nil
}

// fixedMesh is a mesh configuration that never changes: Istio's default.
type fixedMesh struct{}

var defaultMesh = mesh.DefaultMeshConfig()

func (fixedMesh) Mesh() *meshconfig.MeshConfig { return defaultMesh }

func (fixedMesh) AddMeshHandler(func()) *mesh.WatcherHandlerRegistration {
	return mesh.NewWatcherHandlerRegistration(func() {})
}

func (fixedMesh) DeleteMeshHandler(*mesh.WatcherHandlerRegistration) {}
