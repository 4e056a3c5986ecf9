package workload_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"kedge/issuer/sds"
	"kedge/issuer/workload"
)

// shelf is a source whose materials a test sets. It is an opener of itself.
type shelf struct {
	mu        sync.Mutex
	materials *sds.Materials
	changed   chan struct{}
	answers   chan sds.Answer
	wants     sds.Wants
	ended     chan struct{}
}

func (s *shelf) OpenWorkload(context.Context) (workload.Source, error) { return s, nil }

func (s *shelf) Materials() (*sds.Materials, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.materials, s.changed
}

func (s *shelf) put(m sds.Materials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.materials = &m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *shelf) Want(w sds.Wants)       { s.wants = w }
func (s *shelf) Answered(a sds.Answer)  { s.answers <- a }
func (s *shelf) Ended() <-chan struct{} { return s.ended }
func (s *shelf) Err() error             { return status.Error(codes.Unavailable, "over") }
func (s *shelf) Close()                 {}
func (s *shelf) Missing() error         { return status.Error(codes.PermissionDenied, "none") }

// serve serves the API, and makes go-spiffe's client of it.
func serve(t *testing.T) (*shelf, *workloadapi.Client) {
	t.Helper()
	s := &shelf{materials: &sds.Materials{}, changed: make(chan struct{}), answers: make(chan sds.Answer, 10), ended: make(chan struct{})}
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer(workload.Options()...)
	workloadpb.RegisterSpiffeWorkloadAPIServer(server, &workload.Server{Opener: s})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix:///nowhere"), workloadapi.WithDialOptions(grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close() // the server ends the rest
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return s, client
}

// watcher keeps what comes.
type watcher struct {
	contexts chan *workloadapi.X509Context
	errors   chan error
}

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.contexts <- c }
func (w watcher) OnX509ContextWatchError(err error)              { w.errors <- err }

var (
	td    = spiffeid.RequireTrustDomainFromString("cluster.local")
	other = spiffeid.RequireTrustDomainFromString("example.org")
)

func certificate(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return parsed, key
}

func svid(t *testing.T, serial int64) *sds.SVID {
	t.Helper()
	leaf, key := certificate(t, &x509.Certificate{SerialNumber: big.NewInt(serial), URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/web"}}, KeyUsage: x509.KeyUsageDigitalSignature})
	return &sds.SVID{ID: spiffeid.RequireFromString("spiffe://cluster.local/web"), Chain: []*x509.Certificate{leaf}, Key: key}
}

func bundle(t *testing.T, td spiffeid.TrustDomain, sequence uint64) *sds.Bundle {
	t.Helper()
	root, _ := certificate(t, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true})
	return &sds.Bundle{TrustDomain: td, Sequence: sequence, Roots: []*x509.Certificate{root}}
}

func await[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(time.Minute):
		t.Fatal("it did not come")
		panic("unreachable")
	}
}

// TestAWorkloadGetsEachChangeAndCountsAsHoldingWhatItWasSent: its SVID, its trust bundle, and those of other trust domains.
func TestAWorkloadGetsEachChangeAndCountsAsHoldingWhatItWasSent(t *testing.T) {
	s, client := serve(t)
	first, own, foreign := svid(t, 1), bundle(t, td, 1), bundle(t, other, 7)
	s.put(sds.Materials{SVID: first, Bundles: []*sds.Bundle{own, foreign}})
	w := watcher{make(chan *workloadapi.X509Context, 10), make(chan error, 10)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- client.WatchX509Context(ctx, w) }()

	came := await(t, w.contexts)
	if !came.SVIDs[0].Certificates[0].Equal(first.Chain[0]) || !came.SVIDs[0].PrivateKey.(*ecdsa.PrivateKey).Equal(first.Key) || came.Bundles.Len() != 2 {
		t.Errorf("it got %+v", came)
	}
	for _, b := range []*sds.Bundle{own, foreign} {
		if got, ok := came.Bundles.Get(b.TrustDomain); !ok || !got.HasX509Authority(b.Roots[0]) {
			t.Errorf("it has no bundle of %s", b.TrustDomain)
		}
	}
	if a := await(t, s.answers); a.SVID != first || a.Bundle != own {
		t.Errorf("it counts as holding %+v", a)
	}
	if !s.wants.SVID || !s.wants.Bundle {
		t.Errorf("it asks for %+v", s.wants)
	}
	next := bundle(t, td, 2)
	s.put(sds.Materials{SVID: first, Bundles: []*sds.Bundle{next}})
	if came = await(t, w.contexts); came.Bundles.Len() != 1 {
		t.Errorf("it got %+v", came)
	}
	if a := await(t, s.answers); a.Bundle != next {
		t.Errorf("it counts as holding %+v", a)
	}
	s.put(sds.Materials{SVID: first, Bundles: []*sds.Bundle{next}}) // nothing new
	s.put(sds.Materials{Bundles: []*sds.Bundle{next}})              // it has expired: the stream waits
	second := svid(t, 2)
	s.put(sds.Materials{SVID: second, Bundles: []*sds.Bundle{next}})
	if came = await(t, w.contexts); !came.SVIDs[0].Certificates[0].Equal(second.Chain[0]) || len(w.errors) > 0 {
		t.Errorf("it got %+v", came)
	}
	close(s.ended)
	if err := await(t, w.errors); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ends with %v", err)
	}
	cancel()
	await(t, ended)
}

// TestWhoHasNothingIsToldSo, at once; but trust bundles are there for whoever only verifies.
func TestWhoHasNothingIsToldSo(t *testing.T) {
	s, client := serve(t)
	if _, err := client.FetchX509SVID(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("for an SVID: %v", err)
	}
	if _, err := client.FetchX509Bundles(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("for trust bundles: %v", err)
	}
	own := bundle(t, td, 1)
	s.put(sds.Materials{Bundles: []*sds.Bundle{own}})
	set, err := client.FetchX509Bundles(t.Context())
	if err != nil || set.Len() != 1 {
		t.Errorf("the trust bundles are %v, %v", set, err)
	}
	if a := await(t, s.answers); a.Bundle != own || a.SVID != nil {
		t.Errorf("it counts as holding %+v", a)
	}
}
