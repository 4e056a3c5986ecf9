package istio_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/ca/ledger"
)

func TestTheChainIsLeafFirstOneCertificateAnElementAndTheBundleLast(t *testing.T) {
	d := openDoor(t, nil)
	api := d.api(t, nil)
	var bundles []string
	for range 2 {
		answer, err := api.CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil), ValidityDuration: 3600})
		if err != nil {
			t.Fatal(err)
		}
		chain := answer.GetCertChain()
		if len(chain) != 3 {
			t.Fatalf("%d elements", len(chain))
		}
		for i, element := range chain[:2] {
			block, rest := pem.Decode([]byte(element))
			if block == nil || len(rest) > 0 {
				t.Fatalf("element %d is not exactly one PEM block", i)
			}
		}
		if uri := firstCertificate(t, chain[0]).URIs[0].String(); uri != "spiffe://cluster.local/ns/ns1/sa/sa1" {
			t.Errorf("the first element is %s", uri)
		}
		bundles = append(bundles, chain[2])
	}
	if bundles[0] != bundles[1] || bundles[0] != d.ca.Bundle().PEM {
		t.Error("the bundle's bytes differ between calls")
	}
}

func firstCertificate(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatal("no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestEveryAnswerIsAnSVIDForGoSpiffeAndForOpenSSL: what the CSR API hands out, for each kind of key that istio-agents make and each that the default
// policy allows at its ends.
func TestEveryAnswerIsAnSVIDForGoSpiffeAndForOpenSSL(t *testing.T) {
	d := openDoor(t, nil)
	api := d.api(t, nil)
	generate := map[string]func() (crypto.Signer, error){
		"P-256":    func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
		"P-384":    func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) },
		"RSA-2048": func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
		"RSA-4096": func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 4096) },
	}
	for kind, generate := range generate {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			key, err := generate()
			if err != nil {
				t.Fatal(err)
			}
			answer, err := api.CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
			if err != nil {
				t.Fatal(err)
			}
			chain := answer.GetCertChain()
			leaf, between, roots := chain[0], strings.Join(chain[1:len(chain)-1], ""), chain[len(chain)-1]
			pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			svid, err := x509svid.Parse([]byte(leaf+between), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
			if err != nil {
				t.Fatalf("go-spiffe: %v", err)
			}
			bundle, err := x509bundle.Parse(td, []byte(roots))
			if err != nil {
				t.Fatalf("go-spiffe: %v", err)
			}
			if id, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil || id.String() != "spiffe://cluster.local/ns/ns1/sa/sa1" {
				t.Errorf("go-spiffe: %s %v", id, err)
			}
			dir := t.TempDir()
			for name, text := range map[string]string{"leaf": leaf, "between": between, "roots": roots} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, purpose := range []string{"sslclient", "sslserver"} {
				command := exec.Command("openssl", "verify", "-x509_strict", "-check_ss_sig", "-purpose", purpose, "-CAfile", "roots", "-untrusted", "between", "leaf")
				command.Dir = dir
				if out, err := command.CombinedOutput(); err != nil || string(out) != "leaf: OK\n" {
					t.Errorf("openssl, %s: %v\n%s", purpose, err, out)
				}
			}
		})
	}
}

func TestMoreThanTheMaximumIsClampedAndCounted(t *testing.T) {
	d := openDoor(t, nil)
	answer, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil), ValidityDuration: 90 * 86400})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(firstCertificate(t, answer.GetCertChain()[0]).NotAfter); left > 24*time.Hour {
		t.Errorf("valid for %s", left)
	}
	if err := testutil.GatherAndCompare(d.registry, strings.NewReader(`
# HELP kedge_ttl_clamped_total SVIDs that were given the profile's maximum TTL because more was asked for.
# TYPE kedge_ttl_clamped_total counter
kedge_ttl_clamped_total 1
# HELP citadel_server_success_cert_issuance_count The number of certificates issuances that have succeeded.
# TYPE citadel_server_success_cert_issuance_count counter
citadel_server_success_cert_issuance_count 1
`), "kedge_ttl_clamped_total", "citadel_server_success_cert_issuance_count"); err != nil {
		t.Error(err)
	}
}

func TestCertSignerPicksTheProfile(t *testing.T) {
	short := ca.DefaultProfileConfig()
	short.DefaultTTL, short.MaxTTL = time.Hour, time.Hour
	d := openDoor(t, map[string]ca.ProfileConfig{"short": short})
	request := &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil), ValidityDuration: 86400,
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"CertSigner": structpb.NewStringValue("short")}}}
	answer, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), d.token(t)), request)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(firstCertificate(t, answer.GetCertChain()[0]).NotAfter); left > time.Hour {
		t.Errorf("valid for %s", left)
	}
	request.Metadata.Fields["CertSigner"] = structpb.NewStringValue("")
	if _, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), d.token(t)), request); err != nil {
		t.Errorf("the agent always sends it, mostly empty: %v", err)
	}
}

// svid gets one with a token, as a TLS certificate.
func (d *door) svid(t *testing.T) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	answer, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
	if err != nil {
		t.Fatal(err)
	}
	certificate := &tls.Certificate{PrivateKey: key}
	for _, element := range answer.GetCertChain()[:2] {
		block, _ := pem.Decode([]byte(element))
		certificate.Certificate = append(certificate.Certificate, block.Bytes)
	}
	return certificate
}

func (d *door) newest(t *testing.T) *ledger.Issue {
	t.Helper()
	for event, err := range d.ledger.Events(t.Context(), ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}, Newest: true, Limit: 1}) {
		if err != nil {
			t.Fatal(err)
		}
		return event.Body.(*ledger.Issue)
	}
	t.Fatal("the ledger has no issue")
	return nil
}

func TestAClientCertificateRenewsAndItsLineageTravels(t *testing.T) {
	d := openDoor(t, nil)
	certificate := d.svid(t)
	first := d.newest(t)
	for range 2 {
		key := newKey(t)
		answer, err := d.api(t, certificate).CreateCertificate(t.Context(), &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
		if err != nil {
			t.Fatal(err)
		}
		renewed := d.newest(t)
		if renewed.Proofs[0].Method != ca.MethodClientCertificate || renewed.FirstProof == nil || *renewed.FirstProof != first.Proofs[0] {
			t.Errorf("proofs %+v, first %+v", renewed.Proofs, renewed.FirstProof)
		}
		if renewed.Holder != first.Holder || renewed.Replaces == 0 {
			t.Errorf("holder %+v, replaces %d", renewed.Holder, renewed.Replaces)
		}
		certificate = &tls.Certificate{PrivateKey: key}
		for _, element := range answer.GetCertChain()[:2] {
			block, _ := pem.Decode([]byte(element))
			certificate.Certificate = append(certificate.Certificate, block.Bytes)
		}
	}
}

func TestARevokedCertificateAuthenticatesNobodyOnAConnectionThatIsOpenAlready(t *testing.T) {
	d := openDoor(t, nil)
	api := d.api(t, d.svid(t))
	first := d.newest(t)
	if _, err := api.CreateCertificate(t.Context(), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ca.Revoke(t.Context(), first.Serial, "test", "test"); err != nil {
		t.Fatal(err)
	}
	_, err := api.CreateCertificate(t.Context(), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)})
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(d.log.String(), "is revoked") {
		t.Error("the log does not say why")
	}
}

func TestATokenCountsWhenTheCertificateDoesNotAndTheOtherWayRound(t *testing.T) {
	d, other := openDoor(t, nil), openDoor(t, nil)
	stranger := other.svid(t)
	if _, err := d.api(t, stranger).CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Errorf("a good token with a certificate of a root that is not trusted: %v", err)
	}
	if !strings.Contains(d.log.String(), "the client certificate does not count, the token does") {
		t.Error("the log does not say so")
	}
	if _, err := d.api(t, d.svid(t)).CreateCertificate(bearer(t.Context(), "garbage"), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Errorf("a good certificate with a bad token: %v", err)
	}
	if !strings.Contains(d.log.String(), "the token does not count, the client certificate does") {
		t.Error("the log does not say so")
	}
	different := signToken(t, d.key, "RS256", "k1", with(with(goodClaims(), "sub", "system:serviceaccount:ns1:other"), "kubernetes.io", nil))
	_, err := d.api(t, d.svid(t)).CreateCertificate(bearer(t.Context(), different), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a token and a certificate of different identities: %v", err)
	}
}

// joinToken makes one that the ledger knows.
func (d *door) joinToken(t *testing.T, reusable bool) string {
	t.Helper()
	token, record, err := d.join.Create(spiffeid.RequireFromString("spiffe://cluster.local/ns/edge/sa/vm"), time.Minute, reusable)
	if err != nil {
		t.Fatal(err)
	}
	record.By = "test"
	if _, err := d.ledger.Append(t.Context(), &record); err != nil {
		t.Fatal(err)
	}
	return token
}

func TestAJoinTokenMayBeRedeemedAgainThreeTimesUntilItsSVIDIsConfirmed(t *testing.T) {
	d := openDoor(t, nil)
	redeem := func(token string) (*tls.Certificate, error) {
		key := newKey(t)
		answer, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), token), &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode([]byte(answer.GetCertChain()[0]))
		return &tls.Certificate{PrivateKey: key, Certificate: [][]byte{block.Bytes}}, nil
	}
	token := d.joinToken(t, false)
	for try := range 4 {
		if _, err := redeem(token); err != nil {
			t.Fatalf("try %d: %v", try+1, err)
		}
		if issue := d.newest(t); (issue.Replaces != 0) != (try > 0) {
			t.Errorf("try %d replaces number %d", try+1, issue.Replaces)
		}
	}
	if _, err := redeem(token); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the fifth time: %v", err)
	}
	token = d.joinToken(t, false)
	certificate, err := redeem(token)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.api(t, certificate).CreateCertificate(t.Context(), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(token); status.Code(err) != codes.Unauthenticated {
		t.Errorf("after its SVID was confirmed: %v", err)
	}
	token = d.joinToken(t, true)
	for range 6 {
		if _, err := redeem(token); err != nil {
			t.Errorf("a reusable one: %v", err)
		}
	}
}

// Two parties with one token: who comes second has what counts. When the first did get its response, showing it is loud and leads nowhere.
func TestASVIDWhoseJoinTokenWasRedeemedAgainRenewsNothing(t *testing.T) {
	d := openDoor(t, nil)
	type svid struct {
		*tls.Certificate
		serial string
	}
	ask := func(with *tls.Certificate, token string) (svid, error) {
		t.Helper()
		key, ctx := newKey(t), t.Context()
		if token != "" {
			ctx = bearer(ctx, token)
		}
		answer, err := d.api(t, with).CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
		if err != nil {
			return svid{}, err
		}
		block, _ := pem.Decode([]byte(answer.GetCertChain()[0]))
		return svid{&tls.Certificate{PrivateKey: key, Certificate: [][]byte{block.Bytes}}, d.newest(t).Serial.String()}, nil
	}
	redeem := func(token string) svid {
		t.Helper()
		got, err := ask(nil, token)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	loud := func(reason string) bool {
		for line := range strings.Lines(d.log.String()) {
			if strings.Contains(line, `"level":"ERROR"`) && strings.Contains(line, reason) {
				return true
			}
		}
		return false
	}

	token := d.joinToken(t, false)
	first, second := redeem(token), redeem(token)
	if _, err := ask(first.Certificate, ""); status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), "superseded") {
		t.Errorf("the first, after the token was redeemed again: %v", err)
	}
	if !loud("client certificate "+first.serial+" of spiffe://cluster.local/ns/edge/sa/vm, number") || !loud("two parties used one token") {
		t.Error("the log does not say so loudly")
	}
	if _, err := ask(second.Certificate, ""); err != nil {
		t.Errorf("the second: %v", err)
	}
	if _, err := ask(first.Certificate, token); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the first with the token, after the second was seen to be held: %v", err)
	}

	token = d.joinToken(t, false)
	first = redeem(token)
	if _, err := ask(first.Certificate, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(nil, token); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the token, after the first was seen to be held: %v", err)
	}

	token = d.joinToken(t, true)
	first, second = redeem(token), redeem(token)
	for _, one := range []svid{first, second} {
		if _, err := ask(one.Certificate, ""); err != nil {
			t.Errorf("of a reusable token: %v", err)
		}
	}
	if report, err := d.ledger.Verify(t.Context()); err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v, %v", report.Problems, err)
	}
}

// A token comes with the SVID that it got, as from an agent that keeps both: the certificate does not count, and the log is loud though the token does.
func TestASupersededSVIDIsLoudThoughTheTokenCounts(t *testing.T) {
	d := openDoor(t, nil)
	token := d.joinToken(t, false)
	var first *tls.Certificate
	for range 2 {
		key := newKey(t)
		answer, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), token), &pb.IstioCertificateRequest{Csr: csrFor(t, key, nil)})
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			block, _ := pem.Decode([]byte(answer.GetCertChain()[0]))
			first = &tls.Certificate{PrivateKey: key, Certificate: [][]byte{block.Bytes}}
		}
	}
	if _, err := d.api(t, first).CreateCertificate(bearer(t.Context(), token), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(d.log.String()) {
		if strings.Contains(line, `"level":"ERROR"`) && strings.Contains(line, "the client certificate does not count, the token does") && strings.Contains(line, "two parties") {
			return
		}
	}
	t.Errorf("the log does not say so loudly:\n%s", d.log)
}

func TestAJoinTokenThatTheLedgerDoesNotKnowIsRefused(t *testing.T) {
	d := openDoor(t, nil)
	token, _, err := d.join.Create(spiffeid.RequireFromString("spiffe://cluster.local/ns/edge/sa/vm"), time.Minute, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), token), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("error %v", err)
	}
}

func TestTheSameRequestIDIsInTheAnswerTheLogAndTheLedger(t *testing.T) {
	d := openDoor(t, nil)
	var header metadata.MD
	if _, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}, grpc.Header(&header)); err != nil {
		t.Fatal(err)
	}
	id := header.Get("x-request-id")
	if len(id) != 1 || d.newest(t).RequestID != id[0] || !strings.Contains(d.log.String(), `"request_id":"`+id[0]+`"`) {
		t.Errorf("header %v, ledger %q", id, d.newest(t).RequestID)
	}
	if _, err := d.api(t, nil).CreateCertificate(bearer(t.Context(), "garbage"), &pb.IstioCertificateRequest{}, grpc.Header(&header)); err == nil ||
		!strings.Contains(err.Error(), header.Get("x-request-id")[0]) {
		t.Errorf("refusal %v, header %v", err, header)
	}
}

func TestHealthAndReflectionAnswer(t *testing.T) {
	d := openDoor(t, nil)
	conn, err := grpc.NewClient(d.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: d.roots, ServerName: "localhost", MinVersion: tls.VersionTLS12})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	health, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || health.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health %v %v", health, err)
	}
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil || !strings.Contains(answer.String(), "istio.v1.auth.IstioCertificateService") {
		t.Errorf("reflection %v %v", answer, err)
	}
}

func TestTheServerSpeaksTLS12WithGCMAnd13AndNothingOlder(t *testing.T) {
	d := openDoor(t, nil)
	dial := func(config *tls.Config) (tls.ConnectionState, error) {
		config.RootCAs, config.ServerName, config.NextProtos = d.roots, "localhost", []string{"h2"}
		conn, err := tls.Dial("tcp", d.address, config)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer conn.Close()
		return conn.ConnectionState(), nil
	}
	if state, err := dial(&tls.Config{}); err != nil || state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 {
		t.Errorf("by default: version %x, curve %v, %v", state.Version, state.CurveID, err)
	}
	if state, err := dial(&tls.Config{MaxVersion: tls.VersionTLS12}); err != nil || !strings.Contains(tls.CipherSuiteName(state.CipherSuite), "GCM") {
		t.Errorf("TLS 1.2: %s %v", tls.CipherSuiteName(state.CipherSuite), err)
	}
	for _, curve := range []tls.CurveID{tls.CurveP256, tls.CurveP384} {
		if _, err := dial(&tls.Config{CurvePreferences: []tls.CurveID{curve}}); err != nil {
			t.Errorf("%v: %v", curve, err)
		}
	}
	if _, err := dial(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	if _, err := dial(&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}); err == nil {
		t.Error("CBC is spoken")
	}
}
