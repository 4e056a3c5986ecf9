package istio_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
	"kedge/test/machine"
)

const mine = "spiffe://cluster.local/ns/ns1/sa/sa1"

// subscription is an Envoy's stream.
type subscription struct {
	t      *testing.T
	wire   secret.SecretDiscoveryService_StreamSecretsClient
	names  []string
	latest *discovery.DiscoveryResponse
}

// subscribe opens a stream as Envoy does; held is the version that it has from an earlier one.
func subscribe(t *testing.T, ctx context.Context, conn *grpc.ClientConn, held string, names ...string) *subscription {
	t.Helper()
	wire, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := wire.Send(&discovery.DiscoveryRequest{ResourceNames: names, VersionInfo: held}); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return &subscription{t: t, wire: wire, names: names}
}

// next is the next response: its secrets by their names. It is not answered yet.
func (s *subscription) next() map[string]*envoytls.Secret {
	s.t.Helper()
	all, err := s.receive()
	if err != nil {
		s.t.Fatalf("no response: %v", err)
	}
	return all
}

func (s *subscription) receive() (map[string]*envoytls.Secret, error) {
	response, err := s.wire.Recv()
	if err != nil {
		return nil, err
	}
	s.latest = response
	all := map[string]*envoytls.Secret{}
	for _, packed := range response.Resources {
		one := &envoytls.Secret{}
		if err := packed.UnmarshalTo(one); err != nil {
			return nil, err
		}
		all[one.Name] = one
	}
	return all, nil
}

func (s *subscription) ack() *subscription {
	s.t.Helper()
	err := s.wire.Send(&discovery.DiscoveryRequest{ResourceNames: s.names, VersionInfo: s.latest.VersionInfo, ResponseNonce: s.latest.Nonce})
	if err != nil && err != io.EOF { // of a stream that has ended, which the next receive says
		s.t.Fatal(err)
	}
	return s
}

func (s *subscription) nack(reason string) {
	s.t.Helper()
	if err := s.wire.Send(&discovery.DiscoveryRequest{ResourceNames: s.names, ResponseNonce: s.latest.Nonce, ErrorDetail: status.New(codes.Internal, reason).Proto()}); err != nil {
		s.t.Fatal(err)
	}
}

// ends takes what comes until the stream ends.
func (s *subscription) ends() error {
	for {
		if _, err := s.receive(); err != nil {
			return err
		}
		s.ack()
	}
}

// pair is the SVID in a secret, which is good under the CA's roots.
func (d *door) pair(t *testing.T, one *envoytls.Secret) *x509.Certificate {
	t.Helper()
	made, err := tls.X509KeyPair(one.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), one.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(made.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	between, roots := x509.NewCertPool(), x509.NewCertPool()
	for _, der := range made.Certificate[1:] {
		one, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		between.AddCert(one)
	}
	roots.AppendCertsFromPEM([]byte(d.ca.Bundle().PEM))
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: time.Now()}); err != nil {
		t.Error(err)
	}
	return leaf
}

// issue finds the ledger's record of a certificate.
func (d *door) issue(t *testing.T, leaf *x509.Certificate) (number uint64, issue *ledger.Issue) {
	t.Helper()
	for event, err := range d.ledger.Events(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, Serial: leaf.SerialNumber.Bytes()}) {
		if err != nil {
			t.Fatal(err)
		}
		return event.Number, event.Body.(*ledger.Issue)
	}
	t.Fatalf("the ledger has no record of %x", leaf.SerialNumber)
	return 0, nil
}

// awaitState waits until what the ledger knows of an issue is so.
func (d *door) awaitState(t *testing.T, number uint64, want func(ledger.IssueState) bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		state, err := d.ledger.IssueState(number)
		if err != nil {
			t.Fatal(err)
		}
		if want(state) {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("issue %d stays %+v", number, state)
		}
	}
}

func only(t *testing.T, secrets map[string]*envoytls.Secret, names ...string) {
	t.Helper()
	for _, name := range names {
		if secrets[name] == nil {
			t.Fatalf("there is no %q among %v", name, secrets)
		}
	}
	if len(secrets) != len(names) {
		t.Fatalf("there are others than %q: %v", names, secrets)
	}
}

// An Envoy gets its own SVID, which is in the ledger, and the bundle; nobody else's.
func TestAnEnvoyGetsItsOwnSVIDAndTheBundle(t *testing.T) {
	t.Parallel()
	d := openDoorWith(t, doorOptions{privateKeys: true})
	conn := d.connect(t, nil)
	s := subscribe(t, bearer(t.Context(), d.token(t)), conn, "", "default", "ROOTCA", mine, "spiffe://cluster.local/ns/ns1/sa/other", "spiffe://cluster.local", "file-root:/x")
	got := map[string]*envoytls.Secret{}
	for len(got) < 4 {
		for name, one := range s.next() {
			got[name] = one
		}
		s.ack()
	}
	only(t, got, "default", "ROOTCA", mine, "spiffe://cluster.local")
	if string(got["ROOTCA"].GetValidationContext().GetTrustedCa().GetInlineBytes()) != d.ca.Bundle().PEM {
		t.Error("ROOTCA is not the CA's bundle")
	}
	leaf := d.pair(t, got["default"])
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != mine || !leaf.Equal(d.pair(t, got[mine])) {
		t.Errorf("the SVID is for %v", leaf.URIs)
	}
	if _, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok {
		t.Errorf("its key is %T", leaf.PublicKey)
	}
	_, issue := d.issue(t, leaf)
	if issue.Delivery != ledger.DeliverySDS || issue.Holder != (ledger.Holder{Kind: "pod", ID: "u-pod"}) || issue.Replaces != 0 || issue.Proofs[0].Method != ca.MethodKubernetes {
		t.Errorf("the ledger says %+v", issue)
	}
	if text := d.log.String(); strings.Contains(text, "PRIVATE KEY") {
		t.Error("a key is in the log")
	}
}

// Until it is configured that keys travel, bundles are served, and whoever asks for an SVID is told what to do.
func TestWithoutPrivateKeysThereAreBundlesAndAReason(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	conn, ctx := d.connect(t, nil), bearer(t.Context(), d.token(t))
	err := subscribe(t, ctx, conn, "", "default").ends()
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "sds.privateKeys") || !strings.Contains(err.Error(), "kedge agent") {
		t.Errorf("an SVID alone: %v", err)
	}
	d.await(t, "this CA hands out no private keys: set sds.privateKeys to true", mine)
	mixed := subscribe(t, ctx, conn, "", "default", "ROOTCA")
	only(t, mixed.next(), "ROOTCA")
	mixed.ack()
	d.anchors.add(t)
	only(t, mixed.next(), "ROOTCA")
	got, err := secret.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}})
	if err != nil || len(got.Resources) != 1 {
		t.Errorf("fetched %v, %v", got, err)
	}
	if n := len(slices.Collect(func(yield func(ledger.Event) bool) {
		for e := range d.ledger.Events(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}}) {
			if e.Body.(*ledger.Issue).SPIFFEID != "" && !yield(e) {
				return
			}
		}
	})); n != 0 {
		t.Errorf("%d SVIDs were issued", n)
	}
}

// TestEachRefusedStreamEndsAsTheDocsPromise holds docs/refusals.md against the door, both ways: whoever would get no certificate gets no stream, in the same words; and a join token is for a
// CSR: a stream does not spend it.
func TestEachRefusedStreamEndsAsTheDocsPromise(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	conn := d.connect(t, nil)
	join, record, err := d.join.Create(spiffeid.RequireFromString(mine), time.Hour, false)
	if err != nil {
		t.Fatal(err)
	}
	record.By = "test"
	if _, err := d.ledger.Append(t.Context(), &record); err != nil {
		t.Fatal(err)
	}
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	roots := &discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}
	good := []string{d.token(t)}
	calls := map[string]struct {
		tokens  []string
		request *discovery.DiscoveryRequest
		reason  string // in the log
	}{
		"a stream without credentials":                        {nil, roots, "neither a token nor a client certificate"},
		"a stream with an expired token":                      {[]string{signToken(t, d.key, "RS256", "k1", with(goodClaims(), "exp", time.Now().Add(-time.Hour).Unix()))}, roots, "it expired at"},
		"a stream with a join token":                          {[]string{join}, roots, "a join token opens no stream"},
		"a stream for an SVID alone, without sds.privateKeys": {good, &discovery.DiscoveryRequest{ResourceNames: []string{"default"}}, "hands out no private keys"},
		"a stream for another type than secrets":              {good, &discovery.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, "is not served here"},
		"a stream for ten thousand names":                     {good, &discovery.DiscoveryRequest{ResourceNames: many}, "10000 names"},
		"a stream for a name of more than 2048 octets":        {good, &discovery.DiscoveryRequest{ResourceNames: []string{strings.Repeat("a", 2049)}}, "more than 2048 octets"},
	}
	promises := readPromises(t, true)
	for name := range promises {
		if _, ok := calls[name]; !ok {
			t.Errorf("docs/refusals.md promises something for %q, which is not tested", name)
		}
	}
	for name, c := range calls {
		want, ok := promises[name]
		if !ok {
			t.Errorf("docs/refusals.md does not say what happens to %s", name)
		}
		wire, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(bearer(t.Context(), c.tokens...))
		if err != nil {
			t.Fatal(err)
		}
		if err := wire.Send(c.request); err != nil {
			t.Fatal(err)
		}
		_, err = wire.Recv()
		if status.Code(err) != want.code || !strings.Contains(err.Error(), want.says) || len(err.Error()) > maxText {
			t.Errorf("%s: %v; promised is %s %q", name, err, want.code, want.says)
		}
		d.await(t, c.reason)
	}
	if err := d.ledger.Redeemable(record.ID); err != nil {
		t.Errorf("the join token: %v", err)
	}
}

// What a holder acknowledges is evidence for what it has: the SVID that arrived, and the bundle that it verifies with, over all streams of its connection.
// What it did not take is none, and neither is what another one took.
func TestAcknowledgementsAreEvidenceForTheHolderOfTheConnection(t *testing.T) {
	t.Parallel()
	d := openDoorWith(t, doorOptions{privateKeys: true})
	conn, ctx := d.connect(t, nil), bearer(t.Context(), d.token(t))
	svid := subscribe(t, ctx, conn, "", "default")
	number, _ := d.issue(t, d.pair(t, svid.next()["default"]))
	roots := subscribe(t, ctx, conn, "", "ROOTCA")
	roots.next()
	if state, err := d.ledger.IssueState(number); err != nil || state != (ledger.IssueState{}) {
		t.Errorf("before anything was acknowledged: %+v, %v", state, err)
	}
	svid.ack()
	d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Confirmed })
	if state, _ := d.ledger.IssueState(number); state.Bundle != 0 {
		t.Errorf("the arrival of an SVID is taken for that of a bundle: %+v", state)
	}
	stranger := subscribe(t, ctx, d.connect(t, nil), "", "ROOTCA") // of the same pod, and another connection
	stranger.next()
	stranger.ack()
	roots.nack("no")
	other := subscribe(t, bearer(t.Context(), signToken(t, d.key, "RS256", "k1", with(goodClaims(), "kubernetes.io", map[string]any{"namespace": "ns1",
		"serviceaccount": map[string]string{"name": "sa1", "uid": "u-sa"}, "pod": map[string]string{"name": "p2", "uid": "u-pod2"}}))), conn, "", "ROOTCA")
	other.next()
	other.ack() // by the same connection, and another holder
	d.anchors.add(t)
	roots.next()
	d.await(t, "a client did not take its secrets")
	if state, _ := d.ledger.IssueState(number); state.Bundle != 0 {
		t.Errorf("somebody else's bundle counts: %+v", state)
	}
	roots.ack()
	d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Bundle == d.ca.Bundle().Sequence })
	all := subscribe(t, ctx, conn, "", "ALL")
	all.next()
	all.ack()
	d.anchors.add(t)
	all.next()
	all.ack() // the validator counts like ROOTCA
	roots.next()
	roots.ack()
	d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Bundle == d.ca.Bundle().Sequence })
}

// An Envoy has a stream for each of its validators. What one of them took does not count for the SVID while another goes on with an older bundle: with that it still verifies.
func TestABundleCountsOnceEveryStreamOfTheConnectionHasIt(t *testing.T) {
	t.Parallel()
	d := openDoorWith(t, doorOptions{privateKeys: true})
	conn, ctx := d.connect(t, nil), bearer(t.Context(), d.token(t))
	svid, roots, all := subscribe(t, ctx, conn, "", "default"), subscribe(t, ctx, conn, "", "ROOTCA"), subscribe(t, ctx, conn, "", "ALL")
	subscribe(t, ctx, conn, "", "spiffe://example.org", "file-root:/x") // gets nothing, and verifies with nothing of this CA
	number, _ := d.issue(t, d.pair(t, svid.next()["default"]))
	for _, s := range []*subscription{svid, roots, all} {
		if s != svid {
			s.next()
		}
		s.ack()
	}
	d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Bundle == 1 })
	d.anchors.add(t)
	roots.next()
	all.next()
	all.nack("no")
	d.await(t, "a client did not take its secrets")
	roots.ack()
	taken := subscribe(t, ctx, conn, "", "default") // what is acknowledged after that on the same connection counts like what was before
	second, _ := d.issue(t, d.pair(t, taken.next()["default"]))
	taken.ack()
	d.awaitState(t, second, func(s ledger.IssueState) bool { return s.Confirmed })
	for _, n := range []uint64{number, second} {
		if state, err := d.ledger.IssueState(n); err != nil || state.Bundle != 1 {
			t.Errorf("the validator that refused the bundle is passed over: %+v, %v", state, err)
		}
	}
	d.anchors.add(t)
	for _, s := range []*subscription{roots, all} {
		s.next()
		s.ack()
	}
	for _, n := range []uint64{number, second} {
		d.awaitState(t, n, func(s ledger.IssueState) bool { return s.Bundle == 3 })
	}
}

// A validator whose stream ended may be back in a moment, and goes on meanwhile with what it has. One that stays away counts no more.
func TestAValidatorThatIsAwayForAMomentIsNotPassedOver(t *testing.T) {
	inBubble(t, doorOptions{privateKeys: true, connections: lasting(), patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn, ctx := w.dial(t, d), bearer(t.Context(), d.token(t))
		brief, end := context.WithCancel(ctx)
		svid, roots, all := subscribe(t, ctx, conn, "", "default"), subscribe(t, ctx, conn, "", "ROOTCA"), subscribe(t, brief, conn, "", "ALL")
		number, _ := d.issue(t, d.pair(t, svid.next()["default"]))
		svid.ack()
		for _, s := range []*subscription{roots, all} {
			s.next()
			s.ack()
		}
		d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Bundle == 1 })
		d.anchors.add(t)
		roots.next()
		roots.ack()
		all.next()
		all.nack("no")
		<-time.After(time.Second)
		end()
		<-time.After(time.Second)
		brief, end = context.WithCancel(ctx)
		all = subscribe(t, brief, conn, "", "ALL")
		all.next()
		all.nack("no")
		<-time.After(time.Minute)
		if state, err := d.ledger.IssueState(number); err != nil || state.Bundle != 1 {
			t.Errorf("the validator that refused the bundle is passed over: %+v, %v", state, err)
		}
		end()
		d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Bundle == 2 })
	})
}

// No bundle below the floor is sent, from the moment that the floor is durable.
func TestNoBundleBelowTheFloorIsSent(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	b := d.ca.Bundle().Record()
	if _, err := d.ledger.Append(t.Context(), &ledger.Bundle{TrustDomain: td.Name(), Sequence: b.Sequence + 1, SHA256: b.SHA256, Roots: b.Roots, Floor: b.Sequence + 1}); err != nil {
		t.Fatal(err)
	}
	s := subscribe(t, bearer(t.Context(), d.token(t)), d.connect(t, nil), "", "ROOTCA")
	d.clientCertificate(t, bearer(t.Context(), d.token(t)), d.api(t, nil)) // an issue makes the CA take the next bundle up
	s.next()
	if !strings.Contains(s.latest.VersionInfo, "-2.") {
		t.Errorf("the first bundle that was sent has the version %s", s.latest.VersionInfo)
	}
}

// clientCertificate is a client certificate of the CA, as a VM has one.
func (d *door) clientCertificate(t *testing.T, ctx context.Context, api pb.IstioCertificateServiceClient) (*tls.Certificate, *x509.Certificate) {
	t.Helper()
	key := newKey(t)
	response, err := api.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
	if err != nil {
		t.Fatal(err)
	}
	made := &tls.Certificate{PrivateKey: key}
	for _, text := range response.CertChain[:len(response.CertChain)-1] {
		block, _ := pem.Decode([]byte(text))
		made.Certificate = append(made.Certificate, block.Bytes)
	}
	leaf, err := x509.ParseCertificate(made.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return made, leaf
}

// A client certificate that opens a stream has been presented, and the bundle that is acknowledged counts for it. What is issued to the stream does not replace it; revoking
// it, with its lineage, revokes that, too, and ends the stream and its connection.
func TestAStreamOfAClientCertificateLivesAndDiesWithIt(t *testing.T) {
	inBubble(t, doorOptions{privateKeys: true, patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		made, leaf := d.clientCertificate(t, bearer(t.Context(), d.token(t)), pb.NewIstioCertificateServiceClient(w.dial(t, d)))
		number, _ := d.issue(t, leaf)
		conn := w.dialWith(t, d, made)
		s := subscribe(t, t.Context(), conn, "", "default")
		svid, issue := d.issue(t, d.pair(t, s.next()["default"]))
		s.ack()
		if issue.Replaces != 0 || issue.Proofs[0].Method != ca.MethodClientCertificate || issue.Holder != (ledger.Holder{Kind: "pod", ID: "u-pod"}) {
			t.Errorf("the ledger says %+v", issue)
		}
		d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Confirmed && !s.Retired })
		roots := subscribe(t, t.Context(), conn, "", "ROOTCA")
		roots.next()
		roots.ack()
		d.awaitState(t, svid, func(s ledger.IssueState) bool { return s.Bundle == 1 })
		connections := w.accepted.Load()

		done, err := d.ca.RevokeLineage(t.Context(), ledger.Serial(leaf.SerialNumber.Bytes()), "stolen", "test")
		if err != nil || len(done.Revoked) != 2 || done.Revoked[1].Number != svid {
			t.Errorf("revoked %+v, %v", done, err)
		}
		for _, stream := range []*subscription{s, roots} {
			if err := stream.ends(); status.Code(err) != codes.Unauthenticated {
				t.Errorf("a stream ended with %v", err)
			}
		}
		d.await(t, "an SDS stream is ended: its client certificate counts no more", "is revoked")
		<-time.After(time.Minute)
		if err := subscribe(t, t.Context(), conn, "", "ROOTCA").ends(); status.Code(err) != codes.Unauthenticated {
			t.Errorf("it is let in again: %v", err)
		}
		if got := w.accepted.Load(); got != connections+1 {
			t.Errorf("%d connections more; the old one is to end", got-connections)
		}
	})
}

// jumpingClock is a clock of a CA that a test sets ahead.
func jumpingClock() (ca.Clock, *atomic.Int64) {
	clock, ahead := ca.SystemClock(), &atomic.Int64{}
	system := clock.Wall
	clock.Wall = func() time.Time { return system().Add(time.Duration(ahead.Load())) }
	return clock, ahead
}

// A clock that is put back puts off no renewal, and no end of a stream: the others' clocks go on.
func TestAClockThatIsPutBackPutsNothingOff(t *testing.T) {
	clock, ahead := jumpingClock()
	inBubble(t, doorOptions{privateKeys: true, connections: lasting(), patience: time.Hour, profiles: hourly(), clock: &clock}, func(t *testing.T, d *door, w *wire) {
		ahead.Store(int64(5 * time.Hour))
		token := signToken(t, d.key, "RS256", "k1", with(goodClaims(), "exp", time.Now().Add(7*time.Hour).Unix())) // two by the clock of now
		began := time.Now()
		s := subscribe(t, bearer(t.Context(), token), w.dial(t, d), "", "default")
		s.next()
		s.ack()
		<-time.After(time.Minute)
		ahead.Store(0)
		s.next()
		s.ack()
		if after := time.Since(began); after > 34*time.Minute {
			t.Errorf("an SVID of an hour is renewed after %s", after)
		}
		if err := s.ends(); status.Code(err) != codes.Unavailable || time.Since(began) > 2*time.Hour {
			t.Errorf("after %s the stream ended with %v", time.Since(began), err)
		}
	})
}

// counted is what a counter without labels says.
func (d *door) counted(t *testing.T, name string) float64 {
	t.Helper()
	families, err := d.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			return family.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("nothing is counted as %s", name)
	return 0
}

// While there is no issuing CA in the place of a tainted one, those who wait for another SVID ask more and more rarely.
func TestATaintedSVIDThatCannotBeReplacedIsTriedAgainWithBackoff(t *testing.T) {
	dir := t.TempDir()
	inBubble(t, doorOptions{privateKeys: true, connections: lasting(), patience: time.Hour, dir: dir}, func(t *testing.T, d *door, w *wire) {
		ctx := bearer(t.Context(), d.token(t))
		for range 2 {
			conn := w.dial(t, d)
			for range 15 { // a connection has no more than 16
				s := subscribe(t, ctx, conn, "", "default")
				s.next()
				s.ack()
			}
		}
		if err := os.Rename(filepath.Join(dir, "keys"), filepath.Join(dir, "away")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "keys"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		tainted, _ := d.ca.Active()
		if err := d.ca.Taint(t.Context(), tainted, "lost", "test"); err == nil {
			t.Error("there is another issuing CA")
		}
		tried := func() float64 { return d.counted(t, "kedge_sds_issue_failures_total") }
		<-time.After(500 * time.Millisecond)
		if n, lines := tried(), strings.Count(d.log.String(), "an SDS stream does not get its SVID"); n != 30 || lines == 0 || lines > 20 {
			t.Errorf("it was tried %v times at once, and there are %d lines about it", n, lines)
		}
		<-time.After(5 * time.Minute)
		if n := tried() / 30; n < 5 || n > 20 {
			t.Errorf("it was tried %v times a stream in five minutes", n)
		}
	})
}

// A clock that is put back does not put off the look at whether a client certificate still counts.
func TestARevocationIsSeenWhenTheClockWasPutBack(t *testing.T) {
	clock, ahead := jumpingClock()
	inBubble(t, doorOptions{connections: lasting(), patience: time.Hour, clock: &clock}, func(t *testing.T, d *door, w *wire) {
		made, leaf := d.clientCertificate(t, bearer(t.Context(), d.token(t)), pb.NewIstioCertificateServiceClient(w.dial(t, d)))
		ahead.Store(int64(5 * time.Hour))
		s := subscribe(t, t.Context(), w.dialWith(t, d, made), "", "ROOTCA")
		s.next()
		s.ack()
		<-time.After(time.Minute)
		ahead.Store(0)
		if _, err := d.ca.Revoke(t.Context(), ledger.Serial(leaf.SerialNumber.Bytes()), "stolen", "test"); err != nil {
			t.Fatal(err)
		}
		revoked := time.Now()
		if err := s.ends(); status.Code(err) != codes.Unauthenticated || time.Since(revoked) > time.Minute {
			t.Errorf("after %s the stream ended with %v", time.Since(revoked), err)
		}
	})
}

// A stream ends before the token does that opened it, with a reason, and the client goes on with a new token on the same connection, where it needs nothing that it has.
func TestAStreamEndsWithItsTokenAndIsResumedWithTheNext(t *testing.T) {
	forever := defaultConnections
	forever.MaxAge = 0
	inBubble(t, doorOptions{privateKeys: true, connections: forever, patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn, began := w.dial(t, d), time.Now()
		s := subscribe(t, bearer(t.Context(), d.token(t)), conn, "", "default", "ROOTCA")
		s.next()
		s.ack()
		if len(s.latest.Resources) == 1 {
			s.next()
			s.ack()
		}
		held := s.latest.VersionInfo
		err := s.ends()
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "come back with its successor") {
			t.Errorf("it ended with %v", err)
		}
		if after := time.Since(began); after < 50*time.Minute || after > time.Hour {
			t.Errorf("it ended after %s; its token is valid for an hour", after)
		}
		s = subscribe(t, bearer(t.Context(), d.token(t)), conn, held, "default", "ROOTCA")
		d.anchors.add(t)
		only(t, s.next(), "ROOTCA") // and no other SVID
		if w.accepted.Load() != 1 {
			t.Error("the connection ended with its stream")
		}
		n := 0
		for range d.ledger.Events(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, SPIFFEID: mine}) {
			n++
		}
		if n != 1 {
			t.Errorf("%d SVIDs were issued", n)
		}
	})
}

// An SVID that is kept for a stream that comes back is its holder's only: another pod of the same account that names it gets its own, with a key of its own.
func TestWhoNamesTheSVIDOfAnotherGetsItsOwn(t *testing.T) {
	inBubble(t, doorOptions{privateKeys: true, patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn := w.dial(t, d)
		ctx, end := context.WithCancel(bearer(t.Context(), d.token(t)))
		s := subscribe(t, ctx, conn, "", "default")
		first := d.pair(t, s.next()["default"])
		s.ack()
		<-time.After(time.Second)
		end()
		<-time.After(time.Second)
		stranger := signToken(t, d.key, "RS256", "k1", with(goodClaims(), "kubernetes.io", map[string]any{"namespace": "ns1",
			"serviceaccount": map[string]string{"name": "sa1", "uid": "u-sa"}, "pod": map[string]string{"name": "p2", "uid": "u-pod2"}}))
		other := subscribe(t, bearer(t.Context(), stranger), conn, s.latest.VersionInfo, "default")
		if got := d.pair(t, other.next()["default"]); got.Equal(first) {
			t.Error("it has the SVID of another pod, and its key")
		}
		// Its holder needs no other, until then.
		again := subscribe(t, bearer(t.Context(), d.token(t)), conn, s.latest.VersionInfo, "default", "ROOTCA")
		if got := again.next(); got["default"] != nil && !d.pair(t, got["default"]).Equal(first) {
			t.Error("its holder got another")
		}
	})
}

// With a client certificate the connection ends, too: on the same one the client would come with the same certificate.
func TestAConnectionEndsWithItsClientCertificate(t *testing.T) {
	forever := defaultConnections
	forever.MaxAge = 0
	inBubble(t, doorOptions{connections: forever, patience: time.Hour, profiles: hourly()}, func(t *testing.T, d *door, w *wire) {
		made, leaf := d.clientCertificate(t, bearer(t.Context(), d.token(t)), pb.NewIstioCertificateServiceClient(w.dial(t, d)))
		conn := w.dialWith(t, d, made)
		one, two := subscribe(t, t.Context(), conn, "", "ROOTCA"), subscribe(t, t.Context(), conn, "", "ALL")
		before := w.accepted.Load()
		other := make(chan error)
		go func() { other <- two.ends() }()
		for _, err := range []error{one.ends(), <-other} {
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "come back with its successor") {
				t.Errorf("a stream ended with %v", err)
			}
		}
		if now := time.Now(); now.After(leaf.NotAfter) || now.Before(leaf.NotAfter.Add(-10*time.Minute)) {
			t.Errorf("they ended at %s, and the certificate at %s", now, leaf.NotAfter)
		}
		again := subscribe(t, t.Context(), conn, "", "ROOTCA") // at once, on the connection that is about to end
		if err := again.ends(); status.Code(err) != codes.Unavailable {
			t.Errorf("a stream on the connection that ends: %v", err)
		}
		<-time.After(time.Minute)
		only(t, subscribe(t, t.Context(), conn, "", "ROOTCA").next(), "ROOTCA")
		if got := w.accepted.Load(); got != before+1 {
			t.Errorf("%d connections more", got-before)
		}
	})
}

// An SVID is followed by the next at half of its life, of the same holder, which replaces it.
func TestAnSVIDIsRenewedAtHalfOfItsLife(t *testing.T) {
	inBubble(t, doorOptions{privateKeys: true, connections: lasting(), patience: time.Hour, profiles: hourly()}, func(t *testing.T, d *door, w *wire) {
		long := signToken(t, d.key, "RS256", "k1", with(goodClaims(), "exp", time.Now().Add(1000*time.Hour).Unix()))
		s := subscribe(t, bearer(t.Context(), long), w.dial(t, d), "", "default")
		first := d.pair(t, s.next()["default"])
		number, before := d.issue(t, first)
		s.ack()
		began := time.Now()
		for range 3 {
			next := d.pair(t, s.next()["default"])
			s.ack()
			if at := time.Since(began); at < 26*time.Minute || at > 34*time.Minute {
				t.Errorf("after %s of an hour", at)
			}
			began = time.Now()
			n, issue := d.issue(t, next)
			if issue.Replaces != number || issue.Holder != before.Holder || issue.Key == before.Key {
				t.Errorf("the ledger says %+v, after %d %+v", issue, number, before)
			}
			d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Retired })
			number, before = n, issue
		}
	})
}

// An SVID that is revoked is followed by none, and its stream ends; who comes back with a credential that still counts gets another, however soon that is.
func TestWhoseSVIDIsRevokedComesBackForAnotherOnce(t *testing.T) {
	inBubble(t, doorOptions{privateKeys: true, connections: lasting(), patience: time.Hour, profiles: hourly()}, func(t *testing.T, d *door, w *wire) {
		long := bearer(t.Context(), signToken(t, d.key, "RS256", "k1", with(goodClaims(), "exp", time.Now().Add(1000*time.Hour).Unix())))
		conn := w.dial(t, d)
		s := subscribe(t, long, conn, "", "default")
		first := d.pair(t, s.next()["default"])
		s.ack()
		if _, err := d.ca.Revoke(t.Context(), ledger.Serial(first.SerialNumber.Bytes()), "stolen", "test"); err != nil {
			t.Fatal(err)
		}
		if err := s.ends(); status.Code(err) != codes.Unauthenticated {
			t.Errorf("the stream ended with %v", err)
		}
		again := subscribe(t, long, conn, s.latest.VersionInfo, "default")
		if next := d.pair(t, again.next()["default"]); next.Equal(first) {
			t.Error("it has the revoked one again")
		}
	})
}

// hourly is a default profile whose certificates live for an hour.
func hourly() map[string]ca.ProfileConfig {
	c := ca.DefaultProfileConfig()
	c.DefaultTTL, c.MaxTTL = time.Hour, time.Hour
	return map[string]ca.ProfileConfig{ca.DefaultProfile: c}
}

func lasting() (c istio.Connections) {
	c = defaultConnections
	c.MaxAge = 0
	return c
}

// When the issuing CA is tainted, every SVID under it is replaced at once.
func TestSVIDsOfATaintedIssuerAreReplacedAtOnce(t *testing.T) {
	t.Parallel()
	d := openDoorWith(t, doorOptions{privateKeys: true})
	s := subscribe(t, bearer(t.Context(), d.token(t)), d.connect(t, nil), "", "default")
	first := d.pair(t, s.next()["default"])
	s.ack()
	tainted, _ := d.ca.Active()
	if err := d.ca.Taint(t.Context(), tainted, "lost", "test"); err != nil {
		t.Fatal(err)
	}
	next := d.pair(t, s.next()["default"])
	if next.Equal(first) || string(next.AuthorityKeyId) == string(first.AuthorityKeyId) {
		t.Error("the next SVID is under the same issuing CA")
	}
}

// While the ledger takes nothing an SVID cannot be renewed: its holder keeps the old one, bundles are served, and everything resumes by itself.
func TestAFailedRenewalKeepsTheOldSVIDAndHeals(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=40m")
	if !ok {
		return
	}
	short := ca.DefaultProfileConfig()
	short.MinTTL, short.DefaultTTL, short.Backdate = time.Second, 6*time.Second, 0
	d := openDoorWith(t, doorOptions{privateKeys: true, dir: dir, profiles: map[string]ca.ProfileConfig{ca.DefaultProfile: short}})
	ctx, conn := bearer(t.Context(), d.token(t)), d.connect(t, nil)
	s := subscribe(t, ctx, conn, "", "default")
	number, _ := d.issue(t, d.pair(t, s.next()["default"]))
	s.ack()
	d.awaitState(t, number, func(s ledger.IssueState) bool { return s.Confirmed })
	came := make(chan *x509.Certificate) // what is taken from now on
	go func() {
		defer close(came)
		for {
			got, err := s.receive()
			if err != nil {
				return
			}
			s.ack()
			block, _ := pem.Decode(got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return
			}
			select {
			case came <- leaf:
			case <-t.Context().Done():
				return
			}
		}
	}()
	ballast := machine.FillDisk(t, dir)
	for i, err := 0, error(nil); err == nil; i++ { // the file has some room of its own
		_, err = d.ledger.Append(t.Context(), &ledger.Token{ID: fmt.Sprint(i), SPIFFEID: mine, Expires: ledger.At(time.Now().Add(time.Hour)), By: strings.Repeat("x", 200)})
	}
	d.await(t, "an SDS stream does not get its SVID, and keeps the one that it has", "the disk is full")
	only(t, subscribe(t, ctx, conn, "", "ROOTCA").next(), "ROOTCA")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	healed := time.Now()
	for leaf := range came {
		if leaf.NotBefore.After(healed) {
			return
		}
	}
	t.Error("the stream ended instead of getting an SVID")
}

// A server that stops ends its streams in good order.
func TestStreamsEndInGoodOrderWhenTheCAStops(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	s := subscribe(t, bearer(t.Context(), d.token(t)), d.connect(t, nil), "", "ROOTCA")
	s.next()
	d.stop()
	if err := s.ends(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the server is stopping") {
		t.Error(err)
	}
}

// A storm of streams that come and go, clients that never read, never answer or refuse everything, leave nothing behind, and the others are served.
func TestAbuseOfSDSLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	d := openDoorWith(t, doorOptions{privateKeys: true})
	ctx := bearer(t.Context(), d.token(t))
	honest := subscribe(t, ctx, d.connect(t, nil), "", "ROOTCA")
	honest.next()
	honest.ack()
	before := runtime.NumGoroutine()

	storm, end := context.WithCancel(ctx)
	var conns []*grpc.ClientConn
	for i := range 16 {
		conn := d.connect(t, nil)
		conns = append(conns, conn)
		for j := range 15 { // a connection has no more than 16
			stream := subscribe(t, storm, conn, "", "ROOTCA", "ALL", fmt.Sprintf("nobody-%d-%d", i, j))
			if j%3 == 0 {
				continue // never reads
			}
			stream.next() // and never answers
			if j%3 == 1 {
				for range 20 {
					stream.nack("no")
				}
			}
		}
	}
	d.anchors.add(t)
	only(t, honest.next(), "ROOTCA")
	honest.ack()
	end()
	for _, conn := range conns {
		conn.Close()
	}
	d.anchors.add(t)
	only(t, honest.next(), "ROOTCA")
	deadline := time.After(time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		streams := 0
		for _, n := range d.envoys.Holdings() {
			streams += n
		}
		if now := runtime.NumGoroutine(); streams == 1 && now <= before+20 {
			break
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d streams and %d goroutines are left, of one and %d", streams, runtime.NumGoroutine(), before)
		}
	}
	if n := strings.Count(d.log.String(), "a client did not take its secrets"); n > 200 {
		t.Errorf("%d lines about refusals", n)
	}
}

// Who opens streams and takes them back, unseen, without end loses its connection, as with other calls: they are no good words between those.
func TestWhoTakesBackStreamsWithoutEndLosesItsConnection(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	conn := d.connect(t, nil)
	for range 110 {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := stream.RecvMsg(&discovery.DiscoveryResponse{}); status.Code(err) != codes.Canceled && status.Code(err) != codes.Unavailable {
			t.Fatalf("the client is told %v", err)
		}
	}
	d.await(t, "a connection was ended", "in vain")
	deadline, tick := time.After(time.Minute), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for d.gate.Counts().Arriving > 0 {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d of the streams are waited for still", d.gate.Counts().Arriving)
		}
	}
}

// deaf is a client's connection that can be cut: what it sends is lost, and nothing comes any more, as behind a broken network.
type deaf struct {
	net.Conn
	cut chan struct{}
}

func (c *deaf) Write(b []byte) (int, error) {
	select {
	case <-c.cut:
		return len(b), nil
	default:
		return c.Conn.Write(b)
	}
}

// A client that vanished without a word is found out, and its streams end with their connection.
func TestStreamsOfAClientThatVanishedEnd(t *testing.T) {
	inBubble(t, doorOptions{connections: lasting(), patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		cut := make(chan struct{})
		conn, err := grpc.NewClient("passthrough:///door", grpc.WithTransportCredentials(credentials.NewTLS(d.tls())),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				conn, err := w.DialContext(ctx)
				return &deaf{conn, cut}, err
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for range 10 {
			s := subscribe(t, bearer(t.Context(), d.token(t)), conn, "", "ROOTCA")
			s.next()
			s.ack()
		}
		<-time.After(time.Second)
		if n := d.envoys.Holdings()[sds.Holding{Incarnation: d.ca.Bundle().Incarnation().String(), Sequence: 1}]; n != 10 {
			t.Fatalf("%d streams: %v", n, d.envoys.Holdings())
		}
		close(cut)
		<-time.After(2 * time.Minute)
		if held := d.envoys.Holdings(); len(held) != 0 {
			t.Errorf("streams that are left: %v", held)
		}
	})
}
