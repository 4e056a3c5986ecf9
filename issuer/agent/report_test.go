package agent

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	envoy "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

// desk is the SDS of a CA, on loopback with TLS: it gives everybody the same bundle, and remembers who acknowledged which.
type desk struct {
	ca     *authority
	serial map[string]bool // of the certificates that streams were opened with

	mu      sync.Mutex
	bundle  *sds.Bundle
	changed chan struct{}
	took    []uint64 // sequence numbers of bundles, in the order in which they were acknowledged
	refused []string
	heard   chan struct{} // closed by the next word
}

// openDesk serves the bundle of the authority, numbered 1, and makes the identity report to it.
func openDesk(t *testing.T, b *bench, services ...func(*grpc.Server)) *desk {
	t.Helper()
	d := &desk{ca: b.ca, serial: map[string]bool{}, changed: make(chan struct{}), heard: make(chan struct{})}
	d.bundle = &sds.Bundle{TrustDomain: b.svid.ID.TrustDomain(), Incarnation: "a", Sequence: 1, Roots: []*x509.Certificate{b.ca.root}, PEM: b.ca.bundle()}
	key, err := istio.NewKey("P-256")
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(99), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, b.ca.root, key.Public(), b.ca.key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.o.Server = l.Addr().String()
	server := grpc.NewServer(sds.ServerOption(), grpc.Creds(credentials.NewTLS(&tls.Config{ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})))
	if len(services) == 0 {
		sds.New(sds.Options{Opener: d}).Register(server)
	}
	for _, register := range services {
		register(server)
	}
	ended := make(chan struct{})
	go func() {
		_ = server.Serve(l) // ends with Stop
		close(ended)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-ended
	})
	return d
}

// reportAlong lets the identity report until the test ends.
func (b *bench) reportAlong(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		b.report(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

func (d *desk) Open(ctx context.Context) (sds.Source, error) {
	p, _ := peer.FromContext(ctx)
	leaf := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0]
	d.hear(func() { d.serial[serialOf(leaf)] = true })
	return d, nil
}

func (d *desk) Materials() (*sds.Materials, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &sds.Materials{Bundles: []*sds.Bundle{d.bundle}}, d.changed
}

func (d *desk) hear(note func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	note()
	close(d.heard)
	d.heard = make(chan struct{})
}

func (d *desk) Answered(a sds.Answer) {
	d.hear(func() {
		if a.Reason != "" {
			d.refused = append(d.refused, a.Reason)
		} else {
			d.took = append(d.took, a.Bundle.Sequence)
		}
	})
}

func (d *desk) Want(sds.Wants)         {}
func (d *desk) Ended() <-chan struct{} { return nil }
func (d *desk) Err() error             { return nil }
func (d *desk) Close()                 {}

// put makes the bundle another, with the next number.
func (d *desk) put(t *testing.T, text string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	next := *d.bundle
	next.Sequence, next.PEM = d.bundle.Sequence+1, text
	d.bundle = &next
	close(d.changed)
	d.changed = make(chan struct{})
}

// await waits until what was heard is as it should be.
func (d *desk) await(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		d.mu.Lock()
		now, heard := is(), d.heard
		d.mu.Unlock()
		if now {
			return
		}
		select {
		case <-heard:
		case <-deadline:
			t.Fatalf("it did not come to that: %s; acknowledged were %v", what, d.took)
		}
	}
}

// awaitBundle waits until the identity hands out the bundle of that number.
func awaitBundle(t *testing.T, i *identity, sequence uint64) *sds.Materials {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		m, changed := i.materials()
		if len(m.Bundles) > 0 && m.Bundles[0].Sequence == sequence {
			return m
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("bundle %d did not come; there is %+v", sequence, m.Bundles)
		}
	}
}

// another is a root that nobody has signed with yet.
func another(t *testing.T) string { return newAuthority(t, time.Hour).bundle() }

// issuedBench is a bench with an SVID, without a bubble: its agent began long ago.
func issuedBench(t *testing.T) *bench {
	t.Helper()
	b := newBench(t, time.Hour)
	b.ca.number = sds.NumberOf(&sds.Bundle{Incarnation: "a", Sequence: 1})
	if err := b.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.consumers.begun = time.Now().Add(-b.consumers.grace)
	return b
}

// TestTheCAHearsOfABundleOnceEveryConsumerHasIt, and consumers hear of a new one at once.
func TestTheCAHearsOfABundleOnceEveryConsumerHasIt(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	stream, _ := b.Open(t.Context())
	stream.Want(sds.Wants{Bundle: true, Own: true})
	first, _ := b.materials()
	b.reportAlong(t)
	d.await(t, "a stream is opened with the SVID", func() bool { return d.serial[serialOf(b.svid.Leaf())] })
	stream.Answered(sds.Answer{Bundle: first.Bundles[0]})
	d.await(t, "the first bundle is acknowledged", func() bool { return slices.Equal(d.took, []uint64{1}) })

	d.put(t, b.ca.bundle()+another(t))
	m := awaitBundle(t, b.identity, 2)
	if len(m.Bundles[0].Roots) != 2 || m.SVID == nil {
		t.Errorf("there are %+v", m)
	}
	late, _ := b.Open(t.Context())
	late.Want(sds.Wants{Bundle: true, Own: true})
	stream.Answered(sds.Answer{Bundle: m.Bundles[0]})
	d.mu.Lock()
	if !slices.Equal(d.took, []uint64{1}) {
		t.Errorf("a consumer does not have the bundle, and acknowledged are %v", d.took)
	}
	d.mu.Unlock()
	late.Answered(sds.Answer{Bundle: m.Bundles[0]})
	d.await(t, "the second bundle is acknowledged", func() bool { return slices.Equal(d.took, []uint64{1, 2}) })

	// A renewal is reported by a stream with the new SVID, which names what all have.
	if err := b.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.await(t, "a stream is opened with the next SVID", func() bool { return d.serial[serialOf(b.svid.Leaf())] })
	d.await(t, "that says of the bundle that it has it", func() bool { return slices.Equal(d.took, []uint64{1, 2, 2}) })
}

// TestTheCAHearsOfANewSVIDOnceEveryConsumerHasIt: the one before it counts no more from then on, and the CA may take away what that needs.
func TestTheCAHearsOfANewSVIDOnceEveryConsumerHasIt(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	stream, _ := b.Open(t.Context())
	stream.Want(sds.Wants{SVID: true, Bundle: true, Own: true})
	m, _ := b.materials()
	b.reportAlong(t)
	d.await(t, "a stream is opened with the first SVID, before anybody has it", func() bool { return d.serial[serialOf(m.SVID.Chain[0])] })
	stream.Answered(sds.Answer{SVID: m.SVID, Bundle: m.Bundles[0]})
	d.await(t, "the first bundle is acknowledged", func() bool { return slices.Equal(d.took, []uint64{1}) })
	if err := b.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := b.handed()
	d.put(t, b.ca.bundle()+another(t))
	stream.Answered(sds.Answer{Bundle: awaitBundle(t, b.identity, 2).Bundles[0]})
	d.await(t, "the second bundle is acknowledged meanwhile", func() bool { return slices.Equal(d.took, []uint64{1, 2}) })
	d.mu.Lock()
	if d.serial[serialOf(next.Chain[0])] {
		t.Error("a consumer has the SVID of before, and the CA was shown the new one")
	}
	d.mu.Unlock()
	stream.Answered(sds.Answer{SVID: next})
	d.await(t, "a stream is opened with the new SVID", func() bool { return d.serial[serialOf(next.Chain[0])] })
}

// TestAnSVIDThatAConsumerDoesNotTakeIsShownToTheCAOnceTheOneBeforeHasExpired: nobody has any use for that then, and no stream can be opened with it.
func TestAnSVIDThatAConsumerDoesNotTakeIsShownToTheCAOnceTheOneBeforeHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		first := b.handed()
		stream, _ := b.Open(t.Context())
		stream.Want(sds.Wants{SVID: true})
		stream.Answered(sds.Answer{SVID: first})
		pass(2 * time.Minute)
		awaited := make(chan struct{})
		go func() {
			b.awaitOther(t.Context(), first, nil)
			close(awaited)
		}()
		pass(50 * time.Minute)
		if svid, _, _, _ := b.presentable(first); svid != first || b.handed() == first {
			t.Error("the next SVID is shown though a consumer has the one before, or there is none")
		}
		pass(9 * time.Minute)
		if svid, _, _, _ := b.presentable(first); svid == first || svid != b.handed() {
			t.Error("the SVID of before has expired, and the next one is not shown")
		}
		<-awaited
	})
}

// TestAStreamOnWhichAConsumerIsWaitedForIsOpenedAnewBeforeTheCAEndsIt: until then the CA sends nothing newer.
func TestAStreamOnWhichAConsumerIsWaitedForIsOpenedAnewBeforeTheCAEndsIt(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	consumer, _ := b.Open(t.Context())
	consumer.Want(sds.Wants{Bundle: true, Own: true})
	var has acknowledged
	client, err := b.connect(b.handed())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if lasted, err := b.stream(t.Context(), client, b.handed(), &has, time.Millisecond); !lasted || err != errHeldBack {
		t.Errorf("the stream ended with %v", err)
	}
	d.put(t, b.ca.bundle()+another(t))
	if _, err := b.stream(t.Context(), client, b.handed(), &has, time.Millisecond); err != errHeldBack || has.order != 0 || len(d.took) > 0 {
		t.Errorf("the stream ended with %v; acknowledged were %v", err, d.took)
	}
	consumer.Answered(sds.Answer{Bundle: awaitBundle(t, b.identity, 2).Bundles[0]})
	b.reportAlong(t)
	d.await(t, "it is acknowledged on the next stream", func() bool { return slices.Equal(d.took, []uint64{2}) })
}

// slow is an SDS that takes its time, and then refuses.
type slow struct{}

func (s slow) Open(ctx context.Context) (sds.Source, error) {
	select {
	case <-time.After(2 * firstRetry):
	case <-ctx.Done():
	}
	return nil, status.Error(codes.Unauthenticated, "not you")
}

// TestACAThatTakesItsTimeToRefuseAStreamIsAProblem, and is asked more and more seldom.
func TestACAThatTakesItsTimeToRefuseAStreamIsAProblem(t *testing.T) {
	b := issuedBench(t)
	openDesk(t, b, func(server *grpc.Server) { sds.New(sds.Options{Opener: slow{}}).Register(server) })
	client, err := b.connect(b.handed())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if lasted, err := b.stream(t.Context(), client, b.handed(), &acknowledged{}, time.Hour); lasted || status.Code(err) != codes.Unauthenticated || b.svid.arrived {
		t.Errorf("the stream lasted: %t, the CA knows of the SVID: %t; it ended with %v", lasted, b.svid.arrived, err)
	}
}

// TestABundleThatIsNoneIsRefused, with a reason, and the next one is taken.
func TestABundleThatIsNoneIsRefused(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	b.reportAlong(t)
	d.await(t, "the first bundle is acknowledged", func() bool { return slices.Equal(d.took, []uint64{1}) })
	for n, text := range []string{"", "nonsense", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})), b.ca.bundle()[:200]} {
		d.put(t, text)
		d.await(t, "it is refused", func() bool { return len(d.refused) == n+1 })
	}
	d.put(t, b.ca.bundle()+another(t))
	awaitBundle(t, b.identity, 6)
	d.await(t, "the good one is acknowledged", func() bool { return slices.Equal(d.took, []uint64{1, 6}) })
}

// TestABundleUnderWhichTheSVIDDoesNotVerifyHasItRenewed: the CA knows why, and the SVID is of no use any more.
func TestABundleUnderWhichTheSVIDDoesNotVerifyHasItRenewed(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	b.reportAlong(t)
	if b.due(b.wall()) {
		t.Fatal("it is due from the start")
	}
	d.put(t, another(t))
	awaitBundle(t, b.identity, 2)
	if !b.due(b.wall()) {
		t.Error("the SVID is not due")
	}
}

// TestTrustBundlesComeWhileAnSVIDIsRenewed: whatever one of them does to the time of the next renewal (of use with the race detector).
func TestTrustBundlesComeWhileAnSVIDIsRenewed(t *testing.T) {
	b := issuedBench(t)
	var running sync.WaitGroup
	running.Go(func() {
		for range 200 {
			if err := b.renew(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
	other := another(t)
	for n := range 2000 {
		secret, err := anypb.New(&envoy.Secret{Type: &envoy.Secret_ValidationContext{ValidationContext: &envoy.CertificateValidationContext{
			TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte([]string{other, b.ca.bundle()}[n%2])}}}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.hear(&discovery.DeltaDiscoveryResponse{Resources: []*discovery.Resource{{Name: sds.NameBundle, Version: "1", Resource: secret}}}); err != nil {
			t.Fatal(err)
		}
	}
	running.Wait()
}

// TestACAWithoutSDSIsAsGood: bundles come with the SVIDs then.
func TestACAWithoutSDSIsAsGood(t *testing.T) {
	b := issuedBench(t)
	openDesk(t, b, func(*grpc.Server) {})
	b.reportAlong(t)
	deadline := time.After(time.Minute)
	for !b.alone.Load() {
		select {
		case <-time.After(time.Millisecond):
		case <-deadline:
			t.Fatal("it is not noticed")
		}
	}
	if len(b.problems()) != 0 || b.handed() == nil {
		t.Errorf("that is a problem: %v", b.problems())
	}
	b.ca.mu.Lock()
	b.ca.number = sds.NumberOf(&sds.Bundle{Incarnation: "a", Sequence: 2})
	b.ca.mu.Unlock()
	if err := b.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitBundle(t, b.identity, 2)
}

// TestAServerThatDoesNotProveItselfGetsNothingAndGivesNothing.
func TestAServerThatDoesNotProveItselfGetsNothingAndGivesNothing(t *testing.T) {
	b := issuedBench(t)
	d := openDesk(t, b)
	write(t, b.o.RootFile, another(t))
	d.put(t, b.ca.bundle()+another(t))
	client, err := b.connect(b.handed())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, err = b.stream(t.Context(), client, b.handed(), &acknowledged{}, time.Hour)
	if err == nil || !strings.Contains(err.Error(), "does not prove itself") || len(d.serial) > 0 {
		t.Errorf("the stream ends with %v, opened were %v", err, d.serial)
	}
	if _, err := b.askCA(t.Context(), shown{token: "secret"}); err == nil || !isRefusal(err) || !strings.Contains(err.Error(), "Does "+b.o.RootFile+" belong to this CA") {
		t.Errorf("a CSR ends with %v", err)
	}
}

// TestTheServersRootsFollowTheTrustBundle when the file is the CA's own, and only then.
func TestTheServersRootsFollowTheTrustBundle(t *testing.T) {
	b := issuedBench(t)
	next := newAuthority(t, time.Hour)
	trusts := func(a *authority) bool {
		t.Helper()
		pool, err := b.serverRoots()
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: "server"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute)}
		der, err := x509.CreateCertificate(rand.Reader, leaf, a.root, a.key.Public(), a.key)
		if err != nil {
			t.Fatal(err)
		}
		if leaf, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: pool})
		return err == nil
	}
	elsewhere := newAuthority(t, time.Hour)
	write(t, b.o.RootFile, elsewhere.bundle())
	if trusts(b.ca) || !trusts(elsewhere) {
		t.Error("the file has a root of another kind, which does not decide alone")
	}
	write(t, b.o.RootFile, b.ca.bundle())
	if !trusts(b.ca) || trusts(next) {
		t.Error("the file is the trust bundle of now, and another root counts")
	}
	b.mu.Lock()
	b.takeLocked(b.svid.ID.TrustDomain(), []*x509.Certificate{b.ca.root, next.root}, "both", sds.NumberOf(&sds.Bundle{Incarnation: "a", Sequence: 2}), time.Now())
	b.mu.Unlock()
	if !trusts(b.ca) || !trusts(next) {
		t.Error("a root that has come to the trust bundle does not count")
	}
	b.mu.Lock()
	b.takeLocked(b.svid.ID.TrustDomain(), []*x509.Certificate{next.root}, "the next", sds.NumberOf(&sds.Bundle{Incarnation: "a", Sequence: 3}), time.Now())
	b.mu.Unlock()
	if !trusts(next) {
		t.Error("the file is of before, and the root of now does not count")
	}
	if err := os.Remove(b.o.RootFile); err != nil {
		t.Fatal(err)
	}
	if !trusts(next) {
		t.Error("the file is away for a moment, and the root of now does not count")
	}
	write(t, b.o.RootFile, elsewhere.bundle())
	if trusts(next) || !trusts(elsewhere) {
		t.Error("there is a file with a root of another kind now, which does not decide alone")
	}
}
