package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"kedge/ca"
	"kedge/ca/ledger"
)

func keysOfEveryKind(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"P-256": newKey(t), "P-384": p384, "RSA-2048": rsa2048}
}

func TestEveryCertificateIsAnSVIDForGoSpiffeAndForOpenSSL(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	for kind, key := range keysOfEveryKind(t) {
		t.Run(kind, func(t *testing.T) {
			issued, err := f.ca.Issue(t.Context(), f.caller("/ns/default/sa/web"), ca.Request{CSR: newCSR(t, key, nil), Delivery: ledger.DeliveryResponse})
			if err != nil {
				t.Fatal(err)
			}
			pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			chain := strings.Join(issued.Chain, "")
			svid, err := x509svid.Parse([]byte(chain), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
			if err != nil {
				t.Fatalf("go-spiffe: %v", err)
			}
			if svid.ID.String() != "spiffe://cluster.local/ns/default/sa/web" {
				t.Errorf("SPIFFE ID %s", svid.ID)
			}
			checkLeaf(t, svid.Certificates[0], kind)
			dir := t.TempDir()
			write := func(name, text string) string {
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				return path
			}
			leaf, roots := write("leaf.pem", issued.Chain[0]), write("roots.pem", issued.Bundle.PEM)
			out, err := exec.Command("openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", roots, "-untrusted", write("chain.pem", chain), leaf).CombinedOutput()
			if err != nil {
				t.Errorf("openssl: %v\n%s", err, out)
			}
		})
	}
}

// checkLeaf holds a leaf against X509-SVID 4 and RFC 5280.
func checkLeaf(t *testing.T, leaf *x509.Certificate, kind string) {
	t.Helper()
	if leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Error("basicConstraints does not say cA=false")
	}
	want := x509.KeyUsageDigitalSignature
	if strings.HasPrefix(kind, "RSA") {
		want |= x509.KeyUsageKeyEncipherment
	}
	if leaf.KeyUsage != want {
		t.Errorf("keyUsage %b, want %b", leaf.KeyUsage, want)
	}
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("extKeyUsage %v", leaf.ExtKeyUsage)
	}
	if len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.Subject.String() != "" {
		t.Errorf("names: %v %v %v %q", leaf.URIs, leaf.DNSNames, leaf.IPAddresses, leaf.Subject)
	}
	for _, extension := range leaf.Extensions {
		switch extension.Id.String() {
		case "2.5.29.17", "2.5.29.15": // SAN with an empty subject; keyUsage
			if !extension.Critical {
				t.Errorf("extension %s is not critical", extension.Id)
			}
		}
	}
	if octets := leaf.SerialNumber.Bytes(); len(octets) != 20 || octets[0] != 0x01 {
		t.Errorf("serial %x", octets)
	}
}

func TestOnlyThePublicKeyIsTakenFromACSR(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caTrue, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	csr := newCSR(t, key, &x509.CertificateRequest{
		Subject:     pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}},
		DNSNames:    []string{"istiod.istio-system.svc", "*"},
		IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}, EmailAddresses: []string{"root@example.org"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/kube-system/sa/admin"}, {Scheme: "spiffe", Host: "other", Path: "/x"}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: caTrue}},
	})
	issued, err := f.ca.Issue(t.Context(), f.caller("/ns/default/sa/web"), ca.Request{CSR: csr, Delivery: ledger.DeliveryResponse})
	if err != nil {
		t.Fatal(err)
	}
	leaf := parse(t, issued.DER)
	checkLeaf(t, leaf, "P-256")
	if leaf.URIs[0].String() != "spiffe://cluster.local/ns/default/sa/web" {
		t.Errorf("URI %s", leaf.URIs[0])
	}
	if !key.Public().(*ecdsa.PublicKey).Equal(leaf.PublicKey) {
		t.Error("another key")
	}
}

func TestWhatIsIssuedIsInTheLedgerAsItIs(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	issued := f.mustIssue(t, f.caller("/ns/default/sa/web"), time.Hour)
	event, err := f.ledger.Event(t.Context(), issued.Number)
	if err != nil {
		t.Fatal(err)
	}
	got, leaf := event.Body.(*ledger.Issue), parse(t, issued.DER)
	if got.Certificate != ledger.Hash(sha256.Sum256(issued.DER)) || got.Key != ledger.Hash(sha256.Sum256(leaf.RawSubjectPublicKeyInfo)) {
		t.Error("the hashes are not the certificate's")
	}
	if got.Serial.String() != ledger.Serial(leaf.SerialNumber.Bytes()).String() || got.SPIFFEID != leaf.URIs[0].String() {
		t.Errorf("serial %s, SPIFFE ID %s", got.Serial, got.SPIFFEID)
	}
	if got.NotAfter.Time() != leaf.NotAfter || got.NotBefore.Time() != leaf.NotBefore {
		t.Errorf("validity %s %s", got.NotBefore, got.NotAfter)
	}
	log := f.ledger.Head().Log
	if string(got.Serial[1:4]) != string(log[:3]) {
		t.Errorf("serial %s does not carry the log %s", got.Serial, log)
	}
	if got.Bundle != 1 || got.Proofs[0].Method != ca.MethodKubernetes || got.Holder.Kind != "pod" || got.Peer == "" || got.RequestID != "test" {
		t.Errorf("event %+v", got)
	}
}

func TestMoreThanTheMaximumIsClampedAndLessThanTheMinimumRefused(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/default/sa/web")
	issued := f.mustIssue(t, caller, 48*time.Hour)
	if issued.ClampedFrom != 48*time.Hour || issued.NotAfter.Sub(f.clock.clock().Wall()) > 24*time.Hour {
		t.Errorf("clamped from %s, not after %s", issued.ClampedFrom, issued.NotAfter)
	}
	if _, err := f.issue(t, caller, time.Minute); !errors.Is(err, ca.ErrInvalid) {
		t.Errorf("a minute: %v", err)
	}
	if _, err := f.issue(t, caller, -time.Second); !errors.Is(err, ca.ErrInvalid) {
		t.Errorf("negative: %v", err)
	}
}

func TestTheBackdateScalesWithTheLifetime(t *testing.T) {
	f := newFixture(t)
	f.profile.MinTTL = 10 * time.Second
	f.mustOpen(t)
	f.clock.pass(time.Hour)
	for ttl, most := range map[time.Duration]time.Duration{24 * time.Hour: time.Minute, 100 * time.Second: 10 * time.Second, 10 * time.Second: time.Second} {
		issued := f.mustIssue(t, f.caller("/ns/default/sa/web"), ttl)
		now := f.clock.clock().Wall().Truncate(time.Second)
		if got := now.Sub(issued.NotBefore); got != most {
			t.Errorf("ttl %s: backdated by %s, want %s", ttl, got, most)
		}
	}
}

func TestNothingOutlivesItsIssuerAndTooShortIsUnavailable(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/default/sa/web")
	chainEnds := time.Time{}
	all, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if a.Role == ledger.RoleIssuing {
			chainEnds = a.NotAfter
		}
	}
	f.clock.pass(chainEnds.Sub(f.clock.clock().Wall()) - time.Hour)
	issued := f.mustIssue(t, caller, 0)
	if !issued.NotAfter.Equal(chainEnds) {
		t.Errorf("not after %s, the chain ends at %s", issued.NotAfter, chainEnds)
	}
	f.clock.pass(56 * time.Minute)
	if _, err := f.issue(t, caller, 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("four minutes before the end: %v", err)
	}
	f.clock.jump(-30 * 24 * time.Hour)
	if _, err := f.issue(t, caller, 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("before the issuing CA's notBefore: %v", err)
	}
}

func TestOnlyIdentitiesOfTheTrustDomainWithAPathAreGranted(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	for _, path := range []string{"/kedge/throwaway", "/kedge"} {
		if _, err := f.issue(t, f.caller(path), 0); !errors.Is(err, ca.ErrDenied) {
			t.Errorf("%s: %v", path, err)
		}
	}
	bare := f.caller("/x")
	bare.ID = td.ID()
	if _, err := f.issue(t, bare, 0); !errors.Is(err, ca.ErrDenied) {
		t.Errorf("no path: %v", err)
	}
	if _, err := f.issue(t, ca.Caller{ID: f.caller("/x").ID}, 0); !errors.Is(err, ca.ErrUnauthenticated) {
		t.Errorf("no proof: %v", err)
	}
}

func TestALineageOlderThanTheProfileAllowsMustShowATokenAgain(t *testing.T) {
	f := newFixture(t)
	f.profile.MaxLineageAge = 24 * time.Hour
	f.mustOpen(t)
	first := ledger.Proof{Method: ca.MethodJoinToken, Time: ledger.At(f.clock.clock().Wall())}
	caller := f.caller("/ns/default/sa/vm")
	caller.Proofs = []ledger.Proof{{Method: ca.MethodClientCertificate, Time: first.Time}}
	caller.First = &first
	issued := f.mustIssue(t, caller, 0)
	event, err := f.ledger.Event(t.Context(), issued.Number)
	if err != nil {
		t.Fatal(err)
	}
	if got := event.Body.(*ledger.Issue).FirstProof; got == nil || *got != first {
		t.Errorf("first proof %+v", got)
	}
	f.clock.pass(25 * time.Hour)
	if _, err := f.issue(t, caller, 0); !errors.Is(err, ca.ErrDenied) {
		t.Errorf("after 25 hours: %v", err)
	}
	caller.First = nil
	if _, err := f.issue(t, caller, 0); !errors.Is(err, ca.ErrDenied) {
		t.Errorf("unknown lineage: %v", err)
	}
}

func TestThePresentedCertificateIsConfirmedOnceAndItsPredecessorRetired(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/default/sa/vm")
	first := f.mustIssue(t, caller, 0)
	present := func(issued *ca.Issued) *ca.Issued {
		next := caller
		next.Presented = &ca.Presented{Number: issued.Number, Serial: issued.Serial}
		next.Replaces = issued.Number
		return f.mustIssue(t, next, 0)
	}
	second := present(first)
	third := present(second) // confirms the second, which retires the first
	if fourth := present(second); fourth.Number != third.Number+1 {
		t.Errorf("the second was confirmed again: numbers %d and %d", third.Number, fourth.Number)
	}
	state, err := f.ledger.IssueState(first.Number)
	if err != nil || !state.Retired || !state.Confirmed {
		t.Errorf("first: %+v %v", state, err)
	}
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v %v", report.Problems, err)
	}
}

// Between the check of a client certificate and the record of what it asked for, its join token may be redeemed by somebody else.
func TestACertificateThatIsSupersededWhileItAsksGetsNothing(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	caller := f.caller("/ns/edge/sa/vm")
	if _, err := f.ledger.Append(t.Context(), &ledger.Token{ID: "t", SPIFFEID: caller.ID.String(), Expires: ledger.At(f.clock.clock().Wall().Add(time.Hour)), By: "x"}); err != nil {
		t.Fatal(err)
	}
	byToken := caller
	byToken.JoinToken = "t"
	first := f.mustIssue(t, byToken, 0)
	connection := []*x509.Certificate{parse(t, first.DER)} // what was found of its certificate is remembered
	proven, err := f.ca.ClientCertificates().Verify(t.Context(), connection)
	if err != nil {
		t.Fatal(err)
	}
	second := f.mustIssue(t, byToken, 0)
	renewing := caller
	renewing.Presented, renewing.Replaces = &ca.Presented{Number: proven.Number, Serial: proven.Serial}, proven.Number
	if _, err := f.issue(t, renewing, 0); !errors.Is(err, ca.ErrUnauthenticated) || !errors.Is(err, ledger.ErrSuperseded) {
		t.Errorf("error %v", err)
	}
	if head := f.ledger.Head().Number; head != second.Number {
		t.Errorf("something was recorded: %d events after %d", head, second.Number)
	}
	if _, err := f.ca.ClientCertificates().Verify(t.Context(), connection); !errors.Is(err, ca.ErrUnauthenticated) || !strings.Contains(err.Error(), `token "t"`) {
		t.Errorf("once more: %v", err)
	}
	if _, err := f.present(t, first); !errors.Is(err, ca.ErrUnauthenticated) || !strings.Contains(err.Error(), "is superseded") {
		t.Errorf("over a connection of its own: %v", err)
	}
	if _, err := f.present(t, second); err != nil {
		t.Error(err)
	}
}

func TestASignedCertificateIsRecordedOnce(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	granted, err := f.ca.Grant(f.caller("/ns/default/sa/web"), "")
	if err != nil {
		t.Fatal(err)
	}
	requested, err := granted.ReadCSR(newCSR(t, newKey(t), nil))
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := requested.Prepare(0)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := prepared.Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signed.Record(t.Context(), ledger.DeliveryResponse, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := signed.Record(t.Context(), ledger.DeliveryResponse, ""); err == nil {
		t.Error("it was recorded twice")
	}
	again, err := prepared.Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Record(t.Context(), ledger.DeliveryResponse, ""); err != nil {
		t.Errorf("signing anew gives another serial: %v", err)
	}
}

// FuzzReadCSR: whatever is sent, the answer is a request's key or a clear refusal.
func FuzzReadCSR(f *testing.F) {
	good := newCSR(f, newKey(f), nil)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"))
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		pub, _, err := ca.ParseCSR(text, profile.AllowsKey)
		if err == nil && profile.AllowsKey(pub) != nil {
			t.Error("a key came through that the profile does not allow")
		}
		if err != nil && !errors.Is(err, ca.ErrCSR) {
			t.Errorf("the error is of another kind: %v", err)
		}
	})
}
