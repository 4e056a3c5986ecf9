package sds_test

import (
	"context"
	gotls "crypto/tls"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/issuer/sds"
)

func materials(own *sds.Bundle, svid *sds.SVID, others ...*sds.Bundle) *sds.Materials {
	m := &sds.Materials{ID: me, SVID: svid}
	if own != nil {
		m.Bundles = append([]*sds.Bundle{own}, others...)
	}
	return m
}

// Each name is answered as Istio's agent or SPIRE's does; what nobody knows ends no stream, and is not answered.
func TestNamesAreAnsweredAsIstiosAgentAndSPIREsDo(t *testing.T) {
	t.Parallel()
	own, theirs, mine := bundle(td, "a", 3), bundle(other, "z", 1), svid(77)
	_, client, _ := serve(t, sds.Options{Opener: newShelf(materials(own, mine, theirs))})
	s := stateOf(t, client).ask("file-root:/etc/ca.pem", "default", "ROOTCA", "ALL", me.String(), "spiffe://cluster.local", "spiffe://example.org", "",
		"spiffe://cluster.local/ns/ns1/sa/other", "spiffe://unknown.org", "file-cert:/a~/b", "root")
	got := s.next()
	has(t, got, "default", "ROOTCA", "ALL", me.String(), "spiffe://cluster.local", "spiffe://example.org")
	if rootsIn(got["ROOTCA"]) != own.PEM {
		t.Errorf("ROOTCA is %s", rootsIn(got["ROOTCA"]))
	}
	for _, name := range []string{"default", me.String()} {
		pair := got[name].GetTlsCertificate()
		made, err := gotls.X509KeyPair(pair.GetCertificateChain().GetInlineBytes(), pair.GetPrivateKey().GetInlineBytes())
		if err != nil || len(made.Certificate) != 2 || string(made.Certificate[0]) != string(mine.Chain[0].Raw) {
			t.Errorf("%s: %d certificates, %v", name, len(made.Certificate), err)
		}
		if !strings.HasPrefix(string(pair.GetPrivateKey().GetInlineBytes()), "-----BEGIN PRIVATE KEY-----") {
			t.Errorf("%s: the key is not PKCS #8", name)
		}
	}
	for name, want := range map[string][]*sds.Bundle{"ALL": {own, theirs}, "spiffe://cluster.local": {own}, "spiffe://example.org": {theirs}} {
		custom := got[name].GetValidationContext().GetCustomValidatorConfig()
		var config tls.SPIFFECertValidatorConfig
		if err := custom.GetTypedConfig().UnmarshalTo(&config); err != nil || custom.Name != "envoy.tls.cert_validator.spiffe" || len(config.TrustDomains) != len(want) {
			t.Fatalf("%s: %v %v", name, err, custom)
		}
		for i, one := range want {
			if d := config.TrustDomains[i]; d.Name != one.TrustDomain.Name() || string(d.TrustBundle.GetInlineBytes()) != one.PEM {
				t.Errorf("%s: the trust domain %s has the bundle %s", name, d.Name, d.TrustBundle.GetInlineBytes())
			}
		}
	}
}

// What changes is sent, and nothing else; the source hears what the client has.
func TestAChangeIsSentOnceAndItsAnswerIsHeard(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 1), nil))
	server, client, _ := serve(t, sds.Options{Opener: shelf})
	s := stateOf(t, client).ask("ROOTCA", "default")
	has(t, s.next(), "ROOTCA")
	s.ack()
	shelf.await(t, "the bundle", func() bool {
		return len(shelf.answers) == 1 && shelf.answers[0].Bundle.Sequence == 1 && shelf.answers[0].SVID == nil && shelf.answers[0].Reason == ""
	})
	first := svid(5)
	shelf.put(materials(bundle(td, "a", 1), first))
	has(t, s.next(), "default")
	s.ack()
	shelf.await(t, "the SVID", func() bool {
		return len(shelf.answers) == 2 && shelf.answers[1].SVID == first && shelf.answers[1].Bundle == nil // it says nothing of a bundle
	})
	shelf.put(materials(bundle(td, "a", 2), first))
	if got := s.next(); rootsIn(got["ROOTCA"]) != bundle(td, "a", 2).PEM || len(got) != 1 {
		t.Errorf("got %v", got)
	}
	s.ack()
	shelf.await(t, "the next bundle", func() bool { return len(shelf.answers) == 3 && shelf.answers[2].Bundle.Sequence == 2 })
	if held := server.Holdings(); held[sds.Holding{Incarnation: "a", Sequence: 2}] != 1 || len(held) != 1 {
		t.Errorf("streams by bundle: %v", held)
	}
	if w := shelf.wants; len(w) != 1 || w[0] != (sds.Wants{SVID: true, Bundle: true, Own: true}) {
		t.Errorf("wanted: %+v", w)
	}
}

// A client that does not take a secret is not sent it again, also not when it says so ten times; it is sent the next one. Its reason is heard once.
func TestWhatAClientDidNotTakeIsNotSentAgain(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 1), nil))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	s := stateOf(t, client).ask("ROOTCA")
	s.next()
	s.ack()
	shelf.put(materials(bundle(td, "a", 2), nil))
	refused := s.next()
	for range 10 {
		s.nack("x" + strings.Repeat("é", 400))
	}
	shelf.await(t, "the refusal", func() bool { return len(shelf.answers) == 2 })
	if a := shelf.answers[1]; a.Reason != "x"+strings.Repeat("é", 255)+"\ufffd" || a.Bundle.Sequence != 2 {
		t.Errorf("heard %+v", a)
	}
	shelf.put(materials(bundle(td, "a", 2), svid(1))) // a change that does not matter to it
	shelf.put(materials(bundle(td, "a", 3), nil))
	if got := s.next(); rootsIn(got["ROOTCA"]) != bundle(td, "a", 3).PEM || rootsIn(refused["ROOTCA"]) == rootsIn(got["ROOTCA"]) {
		t.Errorf("the next response is %v", got)
	}
	s.ack()
	shelf.await(t, "the next", func() bool { return len(shelf.answers) == 3 && shelf.answers[2].Reason == "" })
}

// A client that verifies by two names goes on with an older bundle by the one while it has the newest by the other: what is heard is the oldest.
func TestTheOldestBundleOfAStreamIsWhatCounts(t *testing.T) {
	t.Parallel()
	theirs := func(n uint64) *sds.Bundle { return bundle(other, "z", n) }
	shelf := newShelf(materials(bundle(td, "a", 1), nil, theirs(1)))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	s := stateOf(t, client).ask("ROOTCA", "ALL", "spiffe://example.org", "spiffe://nobody.example", "file-root:/x")
	s.next()
	s.ack()
	shelf.await(t, "the first", func() bool { return len(shelf.answers) == 1 && shelf.answers[0].Bundle.Sequence == 1 })
	shelf.put(materials(bundle(td, "a", 2), nil, theirs(1)))
	has(t, s.next(), "ROOTCA", "ALL")
	s.nack("no")
	shelf.await(t, "the refusal", func() bool { return len(shelf.answers) == 2 })
	shelf.put(materials(bundle(td, "a", 2), nil, theirs(2)))
	has(t, s.next(), "ALL", "spiffe://example.org")
	s.ack()
	shelf.await(t, "the answer", func() bool { return len(shelf.answers) == 3 && shelf.answers[2].Bundle.Sequence == 1 })

	fresh := stateOf(t, client).ask("ROOTCA", "ALL")
	fresh.next()
	fresh.nack("no")
	shelf.await(t, "the refusal of the first", func() bool { return len(shelf.answers) == 4 })
	shelf.put(materials(bundle(td, "a", 2), nil, theirs(3)))
	has(t, fresh.next(), "ALL")
	fresh.ack()
	shelf.await(t, "the answer of who has nothing by one name", func() bool {
		return len(shelf.answers) == 5 && shelf.answers[4].Reason == "" && shelf.answers[4].Bundle == nil
	})
}

// An answer to an older response, or to none, says nothing of the open one; and who names another version has not taken it.
func TestAnAnswerCountsForItsResponseOnly(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 1), nil))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	s := stateOf(t, client).ask("ROOTCA")
	s.next()
	old := s.latest
	s.ack()
	shelf.put(materials(bundle(td, "a", 2), nil))
	s.next()
	for _, nonce := range []string{old.Nonce, "", "guess"} {
		s.send(&discovery.DiscoveryRequest{VersionInfo: s.latest.VersionInfo, ResourceNames: s.names, ResponseNonce: nonce})
	}
	s.send(&discovery.DiscoveryRequest{VersionInfo: old.VersionInfo, ResourceNames: s.names, ResponseNonce: s.latest.Nonce})
	shelf.await(t, "the answer", func() bool { return len(shelf.answers) == 2 })
	if a := shelf.answers[1]; a.Bundle.Sequence != 2 || !strings.Contains(a.Reason, "another version") {
		t.Errorf("heard %+v", a)
	}
}

// A client that comes back and names what it has is sent nothing that it has; that counts as its word that it has it.
func TestWhoComesBackIsSentOnlyWhatItLacks(t *testing.T) {
	t.Parallel()
	names := []string{"ROOTCA", "default", "ALL", "file-root:/x"}
	mine, own := svid(9), bundle(td, "a", 4)
	shelf := newShelf(materials(own, mine))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	first := stateOf(t, client).ask(names...)
	has(t, first.next(), "ROOTCA", "default", "ALL")
	first.ack()
	shelf.await(t, "the answer", func() bool { return len(shelf.answers) == 1 })

	again := func(names ...string) *state {
		t.Helper()
		s := stateOf(t, client)
		s.took = first.took
		return s.ask(names...)
	}
	again(names...)
	shelf.await(t, "its word", func() bool {
		return len(shelf.answers) == 2 && shelf.answers[1].Bundle == own && shelf.answers[1].SVID == mine && len(shelf.answers[1].Names) == 3
	})
	if w := shelf.wants[len(shelf.wants)-1]; w.Holds != "09" {
		t.Errorf("the source was told %+v", w)
	}
	has(t, again("ROOTCA").next(), "ROOTCA") // which of them it has then is not known

	shelf.put(materials(own, svid(10)))
	has(t, again(names...).next(), "default")
	shelf.put(materials(bundle(td, "a", 5), mine))
	has(t, again(names...).next(), "ROOTCA", "ALL")
	shelf.put(materials(own, mine, bundle(other, "z", 1)))
	has(t, again(names...).next(), "ALL")

	// The nonce of an earlier stream means nothing on this one, and takes nothing from the request.
	nonce := stateOf(t, client)
	nonce.send(&discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}, VersionInfo: "1", ResponseNonce: "of-another-server"})
	has(t, nonce.next(), "ROOTCA")

	// A stranger's version is none.
	for _, version := range []string{"1", "....", strings.Repeat("a.", 3) + strings.Repeat("b", 5000), first.took + ".x"} {
		s := stateOf(t, client)
		s.took = version
		has(t, s.ask("ROOTCA").next(), "ROOTCA")
	}
}

// A stream never goes back to a bundle that is older than the one that it names, or was sent.
func TestAStreamNeverGoesBackToAnOlderBundle(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 7), nil))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	first := stateOf(t, client).ask("ROOTCA")
	first.next()
	first.ack()
	shelf.await(t, "the answer", func() bool { return len(shelf.answers) == 1 })
	// A replica that is behind, or the same server, put back: the stream that is open and one that comes back get the SVID, and no older bundle.
	shelf.put(materials(bundle(td, "a", 6), svid(1)))
	has(t, first.ask("ROOTCA", "default").next(), "default")
	first.ack()
	back := stateOf(t, client)
	back.took = first.took
	has(t, back.ask("ROOTCA", "ALL", "default").next(), "default")
	back.ack()
	shelf.put(materials(bundle(td, "a", 8), svid(1)))
	has(t, first.next(), "ROOTCA")
	has(t, back.next(), "ROOTCA", "ALL")
	// Numbers of another incarnation cannot be compared: what is served now counts.
	fresh := stateOf(t, client)
	fresh.took = first.took
	shelf.put(materials(bundle(td, "b", 2), svid(1)))
	has(t, fresh.ask("ROOTCA").next(), "ROOTCA")
}

func TestTheIncrementalProtocolDoesTheSame(t *testing.T) {
	t.Parallel()
	own, mine := bundle(td, "a", 4), svid(9)
	shelf := newShelf(materials(own, mine))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	open := func() (send func(*discovery.DeltaDiscoveryRequest), next func(...string) *discovery.DeltaDiscoveryResponse) {
		wire, err := client.DeltaSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return func(r *discovery.DeltaDiscoveryRequest) {
				t.Helper()
				r.TypeUrl = secretType
				if err := wire.Send(r); err != nil {
					t.Fatal(err)
				}
			}, func(names ...string) *discovery.DeltaDiscoveryResponse {
				t.Helper()
				response, err := wire.Recv()
				if err != nil {
					t.Fatal(err)
				}
				secrets := map[string]*tls.Secret{}
				for _, r := range response.Resources {
					one := &tls.Secret{}
					if err := r.Resource.UnmarshalTo(one); err != nil || one.Name != r.Name || r.Version == "" {
						t.Fatal(err, r)
					}
					secrets[r.Name] = one
				}
				has(t, secrets, names...)
				return response
			}
	}
	send, next := open()
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", "default", "nobody"}})
	versions := map[string]string{}
	response := next("ROOTCA", "default")
	for _, r := range response.Resources {
		versions[r.Name] = r.Version
	}
	send(&discovery.DeltaDiscoveryRequest{ResponseNonce: response.Nonce})
	shelf.await(t, "the answer", func() bool {
		return len(shelf.answers) == 1 && shelf.answers[0].Bundle == own && shelf.answers[0].SVID == mine
	})
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ALL"}, ResourceNamesUnsubscribe: []string{"default"}})
	response = next("ALL")
	send(&discovery.DeltaDiscoveryRequest{ResponseNonce: response.Nonce, ErrorDetail: status.New(codes.InvalidArgument, "no validator").Proto()})
	shelf.await(t, "the refusal", func() bool { return len(shelf.answers) == 2 && shelf.answers[1].Reason == "no validator" })
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}}) // what is asked for again is sent again
	response = next("ROOTCA")
	send(&discovery.DeltaDiscoveryRequest{ResponseNonce: response.Nonce})
	shelf.put(materials(bundle(td, "a", 5), svid(10)))
	next("ROOTCA", "ALL") // and not default, which it wants no longer

	send, next = open()
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", "default"}, InitialResourceVersions: versions})
	next("ROOTCA", "default")
	shelf.put(materials(bundle(td, "a", 4), mine))
	send, next = open()
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", "default", "ALL"}, InitialResourceVersions: versions})
	next("ALL")
	shelf.put(materials(bundle(td, "a", 3), mine))
	send, next = open()
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", "default", "ALL", me.String()}, InitialResourceVersions: versions})
	next(me.String()) // nothing that is older than what it names
}

func TestAFetchAnswersOnceThereIsEverything(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(nil, nil))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	go shelf.put(materials(bundle(td, "a", 1), nil))
	shelfHas := func() { shelf.put(materials(bundle(td, "a", 1), svid(3))) }
	go func() {
		shelf.await(t, "the wish", func() bool { return len(shelf.wants) == 1 && shelf.wants[0].SVID })
		shelfHas()
	}()
	got, err := client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA", "default", "nobody"}})
	if err != nil || len(got.Resources) != 2 || got.VersionInfo == "" || got.TypeUrl != secretType {
		t.Errorf("got %v, %v", got, err)
	}
	if len(shelf.answers) != 0 {
		t.Errorf("a fetch was taken for an answer: %+v", shelf.answers)
	}
}

// ends waits for the end of a stream.
func ends(t *testing.T, s *state) error {
	t.Helper()
	for {
		if _, err := s.wire.Recv(); err != nil {
			return err
		}
	}
}

func TestWhatIsWrongIsRefusedBeforeAnybodyIsAsked(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 1), nil))
	_, client, _ := serve(t, sds.Options{Opener: shelf})
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprintf("n%d", i)
	}
	long := make([]string, 9)
	for i := range long {
		long[i] = fmt.Sprint(i) + strings.Repeat("a", 2047)
	}
	for name, r := range map[string]*discovery.DiscoveryRequest{
		"another type":       {TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster", ResourceNames: []string{"ROOTCA"}},
		"ten thousand names": {ResourceNames: many},
		"a long name":        {ResourceNames: []string{strings.Repeat("a", 2049)}},
		"long names":         {ResourceNames: long},
	} {
		s := stateOf(t, client)
		s.send(r)
		if err := ends(t, s); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := client.FetchSecrets(t.Context(), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s, fetched: %v", name, err)
		}
	}
	if shelf.opened != 0 {
		t.Errorf("%d callers were looked at", shelf.opened)
	}
	// Of a hundred that are added one after the other the next is too many, and of eight long ones.
	for _, names := range [][]string{many[:101], long} {
		wire, err := client.DeltaSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if err := wire.Send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{name}}); err != nil {
				break
			}
		}
		if _, err = wire.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
	}
}

// Acknowledgements that cannot be recorded fail in any order; the one that says most is not lost.
func TestOfWhatCouldNotBeRecordedTheNewestIsTriedAgain(t *testing.T) {
	t.Parallel()
	for _, order := range [][]uint64{{0, 5, 6}, {6, 5, 0}, {5, 6, 0}, {6, 0, 5}} {
		if got := sds.Kept(order...); got != 6 {
			t.Errorf("failed in the order %d: the bundle %d is tried again", order, got)
		}
	}
}

// Something is always due when there are very many streams: to look at them takes a bounded part of the time, and is not put off for long.
func TestLookingAtTheStreamsTakesASmallPartOfTheTime(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ due, took, want time.Duration }{
		{0, 10 * time.Microsecond, 20 * time.Millisecond},
		{-time.Hour, 0, 20 * time.Millisecond},
		{300 * time.Millisecond, time.Millisecond, 300 * time.Millisecond},
		{0, 30 * time.Millisecond, 600 * time.Millisecond},
		{0, time.Minute, time.Second},
		{time.Hour, 0, time.Second},
	} {
		if got := sds.Rest(c.due, c.took); got != c.want {
			t.Errorf("something is due in %s, and the last look took %s: the next is in %s, and should be in %s", c.due, c.took, got, c.want)
		}
	}
}

func TestAStreamEndsWithWhatItsSourceSays(t *testing.T) {
	t.Parallel()
	shelf := newShelf(materials(bundle(td, "a", 1), nil))
	server, client, _ := serve(t, sds.Options{Opener: shelf})
	shelf.refuses = status.Error(codes.PermissionDenied, "no")
	if err := ends(t, stateOf(t, client).ask("ROOTCA")); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	shelf.refuses = nil
	s := stateOf(t, client).ask("ROOTCA")
	s.next()
	shelf.err = status.Error(codes.Unauthenticated, "expired")
	close(shelf.ended)
	if err := ends(t, s); status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	shelf.await(t, "the end", func() bool { return shelf.closed == 1 })
	if held := server.Holdings(); len(held) != 0 {
		t.Errorf("it still counts: %v", held)
	}
}

func TestAServerThatStopsEndsItsStreams(t *testing.T) {
	t.Parallel()
	ending, end := context.WithCancel(t.Context())
	_, client, _ := serve(t, sds.Options{Opener: newShelf(materials(bundle(td, "a", 1), nil)), Ending: ending})
	silent, open := stateOf(t, client), stateOf(t, client).ask("ROOTCA")
	open.next()
	end()
	for _, s := range []*state{silent, open} {
		if err := ends(t, s); status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	}
}

// Of many streams only so many are sent a change at a time; who does not answer gives its turn to others, and its stream is ended some time later.
func TestAChangeIsSentToAFewAtATimeAndTheSilentHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(materials(bundle(td, "a", 1), nil))
		_, client, _ := serve(t, sds.Options{Opener: shelf, Pushes: 2, Patience: time.Minute})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		all := make([]*state, 6)
		came := make(chan int, len(all))
		ended := make(chan error, len(all))
		for i := range all {
			wire, err := client.StreamSecrets(ctx)
			if err != nil {
				t.Fatal(err)
			}
			all[i] = &state{t: t, wire: wire}
			all[i].ask("ROOTCA").next() // the first takes no turn
			all[i].ack()
			go func() {
				if r, err := wire.Recv(); err == nil {
					all[i].latest = r
					came <- i
				}
				_, err := wire.Recv()
				ended <- err
			}()
		}
		shelf.await(t, "all", func() bool { return len(shelf.answers) == len(all) })
		shelf.put(materials(bundle(td, "a", 2), nil))
		synctest.Wait()
		if n := len(came); n != 2 {
			t.Fatalf("%d streams were sent the change at once", n)
		}
		one := <-came
		all[one].ack() // its turn goes to the next at once
		synctest.Wait()
		if n := len(came); n != 2 {
			t.Fatalf("%d more were sent it after one answer", n)
		}
		<-time.After(250 * time.Millisecond) // the two that are silent hold up nobody longer than this
		synctest.Wait()
		if n := len(came); n != 4 {
			t.Fatalf("%d more were sent it after a quarter of a second", n)
		}
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if n := len(ended); n != len(all)-1 {
			t.Fatalf("%d streams were ended, and %d did not answer", n, len(all)-1)
		}
		for range len(all) - 1 {
			if err := <-ended; status.Code(err) != codes.DeadlineExceeded {
				t.Error(err)
			}
		}
	})
}

// A client that talks without end is looked at now and then, and the others as ever.
func TestAFloodOfRequestsIsSlowedDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(materials(bundle(td, "a", 1), nil))
		_, client, _ := serve(t, sds.Options{Opener: shelf})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		wire, err := client.DeltaSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan struct{}, 10_000)
		go func() {
			for {
				r, err := wire.Recv()
				if err != nil {
					return
				}
				answered <- struct{}{}
				_ = wire.Send(&discovery.DeltaDiscoveryRequest{ResponseNonce: r.Nonce, ResourceNamesSubscribe: []string{"ROOTCA"}}) // and once more
			}
		}()
		if err := wire.Send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		before := len(answered)
		if before > 300 {
			t.Fatalf("%d requests were answered at once", before)
		}
		<-time.After(10 * time.Second)
		synctest.Wait()
		if more := len(answered) - before; more < 40 || more > 60 {
			t.Errorf("%d more were answered in ten seconds", more)
		}
		other, err := client.StreamSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		s := &state{t: t, wire: other}
		s.ask("ROOTCA").next()
	})
}

// A client that opens a stream and never reads what comes, nor what comes on the connection after it, holds no goroutine and no stream for longer than it may be silent.
func TestAClientThatNeverReadsIsEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		large := bundle(td, "a", 1)
		large.PEM = strings.Repeat(large.PEM, 1000) // much more than a client takes unread
		shelf := newShelf(materials(large, nil))
		server, client, _ := serve(t, sds.Options{Opener: shelf})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for range 10 {
			wire, err := client.StreamSecrets(ctx)
			if err != nil {
				t.Fatal(err)
			}
			(&state{t: t, wire: wire}).ask("ROOTCA", "ALL")
		}
		synctest.Wait()
		if n := server.Holdings()[sds.Holding{}]; n != 10 {
			t.Fatalf("%d streams", n)
		}
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if held := server.Holdings(); len(held) != 0 || shelf.closed != 10 {
			t.Errorf("streams that are left: %v; %d were ended", held, shelf.closed)
		}
	})
}
