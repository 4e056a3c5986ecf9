package sds_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"kedge/issuer/sds"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

var (
	td    = spiffeid.RequireTrustDomainFromString("cluster.local")
	other = spiffeid.RequireTrustDomainFromString("example.org")
	me    = spiffeid.RequireFromString("spiffe://cluster.local/ns/ns1/sa/sa1")
)

// shelf is a source whose materials a test sets, and that remembers what it hears. It is an opener of itself.
type shelf struct {
	mu        sync.Mutex
	materials *sds.Materials
	changed   chan struct{}
	heard     chan struct{} // closed by the next word
	answers   []sds.Answer
	wants     []sds.Wants
	ended     chan struct{}
	err       error // of ended
	refuses   error
	opened    int
	closed    int
}

func newShelf(m *sds.Materials) *shelf {
	return &shelf{materials: m, changed: make(chan struct{}), heard: make(chan struct{}), ended: make(chan struct{})}
}

func (s *shelf) Open(context.Context) (sds.Source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	if s.refuses != nil {
		return nil, s.refuses
	}
	return s, nil
}

func (s *shelf) put(m *sds.Materials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.materials = m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *shelf) Materials() (*sds.Materials, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.materials, s.changed
}

func (s *shelf) hear(note func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	note()
	close(s.heard)
	s.heard = make(chan struct{})
}

func (s *shelf) Want(w sds.Wants)       { s.hear(func() { s.wants = append(s.wants, w) }) }
func (s *shelf) Answered(a sds.Answer)  { s.hear(func() { s.answers = append(s.answers, a) }) }
func (s *shelf) Close()                 { s.hear(func() { s.closed++ }) }
func (s *shelf) Ended() <-chan struct{} { return s.ended }
func (s *shelf) Err() error             { return s.err }

// await waits until what the shelf has heard is as it should be.
func (s *shelf) await(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		s.mu.Lock()
		now, heard := is(), s.heard
		s.mu.Unlock()
		if now {
			return
		}
		select {
		case <-heard:
		case <-deadline:
			t.Fatalf("%s: it did not come to that: answers %+v, wants %+v", what, s.answers, s.wants)
		}
	}
}

var roots = sync.OnceValue(func() []*x509.Certificate {
	var all []*x509.Certificate
	for i := range 8 {
		all = append(all, certificate(&x509.Certificate{SerialNumber: big.NewInt(int64(i) + 1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true}, newKey()))
	}
	return all
})

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func certificate(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return parsed
}

func bundle(td spiffeid.TrustDomain, incarnation string, sequence uint64) *sds.Bundle {
	root := roots()[sequence%8]
	return &sds.Bundle{TrustDomain: td, Incarnation: incarnation, Sequence: sequence, Roots: []*x509.Certificate{root},
		PEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))}
}

func svid(serial int64) *sds.SVID {
	key := newKey()
	uri, err := url.Parse(me.String())
	if err != nil {
		panic(err)
	}
	leaf := certificate(&x509.Certificate{SerialNumber: big.NewInt(serial), URIs: []*url.URL{uri}}, key)
	return &sds.SVID{ID: me, Chain: []*x509.Certificate{leaf, roots()[7]}, Key: key, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
}

// serve serves SDS in this process's memory, and returns a connection to it.
func serve(t testing.TB, o sds.Options) (*sds.Server, secret.SecretDiscoveryServiceClient, *grpc.ClientConn) {
	t.Helper()
	s := sds.New(o)
	server := grpc.NewServer(sds.ServerOption())
	s.Register(server)
	listener := bufconn.Listen(1 << 20)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:memory", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return listener.DialContext(ctx)
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); server.Stop(); <-ended })
	return s, secret.NewSecretDiscoveryServiceClient(conn), conn
}

// state is a client's stream of the state-of-the-world protocol.
type state struct {
	t      *testing.T
	wire   secret.SecretDiscoveryService_StreamSecretsClient
	names  []string
	took   string // version
	latest *discovery.DiscoveryResponse
}

func stateOf(t *testing.T, client secret.SecretDiscoveryServiceClient) *state {
	t.Helper()
	wire, err := client.StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &state{t: t, wire: wire}
}

// ask asks for names, as one that has what an earlier stream took.
func (s *state) ask(names ...string) *state {
	s.t.Helper()
	s.names = names
	s.send(&discovery.DiscoveryRequest{VersionInfo: s.took, ResourceNames: names, TypeUrl: secretType, ResponseNonce: s.latest.GetNonce()})
	return s
}

func (s *state) send(request *discovery.DiscoveryRequest) {
	s.t.Helper()
	if err := s.wire.Send(request); err != nil {
		s.t.Fatal(err)
	}
}

// next is the next response: its secrets by their names.
func (s *state) next() map[string]*tls.Secret {
	s.t.Helper()
	response, err := s.wire.Recv()
	if err != nil {
		s.t.Fatalf("no response: %v", err)
	}
	s.latest = response
	if response.TypeUrl != secretType || response.Nonce == "" || response.VersionInfo == "" {
		s.t.Fatalf("the response %+v lacks something", response)
	}
	all := map[string]*tls.Secret{}
	for _, packed := range response.Resources {
		one := &tls.Secret{}
		if err := packed.UnmarshalTo(one); err != nil {
			s.t.Fatal(err)
		}
		if err := one.ValidateAll(); err != nil {
			s.t.Fatal(err)
		}
		all[one.Name] = one
	}
	return all
}

func (s *state) ack() *state {
	s.t.Helper()
	s.took = s.latest.VersionInfo
	return s.ask(s.names...)
}

func (s *state) nack(reason string) *state {
	s.t.Helper()
	s.send(&discovery.DiscoveryRequest{VersionInfo: s.took, ResourceNames: s.names, TypeUrl: secretType, ResponseNonce: s.latest.Nonce, ErrorDetail: status.New(codes.Unknown, reason).Proto()})
	return s
}

// has fails unless exactly these secrets are there.
func has(t *testing.T, secrets map[string]*tls.Secret, names ...string) {
	t.Helper()
	var there []string
	for name := range secrets {
		there = append(there, name)
	}
	slices.Sort(there)
	slices.Sort(names)
	if !slices.Equal(there, names) {
		t.Fatalf("the response has %q, and should have %q", there, names)
	}
}

func rootsIn(one *tls.Secret) string {
	return string(one.GetValidationContext().GetTrustedCa().GetInlineBytes())
}
