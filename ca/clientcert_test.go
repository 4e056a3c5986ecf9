package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"
	"weak"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// callers is a verifier over a real ledger, with an issuing CA of our own (active) under a root, and one of somebody else under the same root.
type callers struct {
	now      time.Time
	root     signingCA
	own      signingCA
	stranger signingCA // under the same root, on no list
	foreign  signingCA // on the list
	book     *ledger.Ledger
	verifier *ClientCertificates
}

type signingCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

var callersTD = spiffeid.RequireTrustDomainFromString("example.org")

func newCallers(t testing.TB) *callers {
	t.Helper()
	c := &callers{now: time.Now().Truncate(time.Second)}
	c.root = c.newCA(t, "root", signingCA{}, nil)
	c.own = c.newCA(t, "own", c.root, nil)
	c.stranger = c.newCA(t, "stranger", c.root, nil)
	c.foreign = c.newCA(t, "foreign", signingCA{}, nil)
	book, err := ledger.Open(t.TempDir(), ledger.Options{TrustDomain: callersTD.Name(), ProgramVersion: "0.1.0", Retention: time.Hour,
		Now: func() time.Time { return c.now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { book.Close() })
	c.book = book
	c.verifier = NewClientCertificates(callersTD, book, func() time.Time { return c.now })
	c.append(t, &ledger.Authority{ID: AuthorityID(c.root.cert), TrustDomain: callersTD.Name(), To: ledger.StateActive, Record: &ledger.Founded{Kind: "x509",
		Role: ledger.RoleRoot, Key: keyID(c.root.cert), Certificate: c.root.cert.Raw, Coverage: ledger.Coverage{Kind: "complete"}}})
	c.append(t, &ledger.Authority{ID: AuthorityID(c.own.cert), TrustDomain: callersTD.Name(), To: ledger.StatePrepared, Record: &ledger.Founded{Kind: "x509",
		Role: ledger.RoleIssuing, Key: keyID(c.own.cert), Certificate: c.own.cert.Raw, Chain: [][]byte{c.own.cert.Raw}, Root: AuthorityID(c.root.cert),
		KeyRef: "k", Coverage: ledger.Coverage{Kind: "complete"}}})
	c.append(t, &ledger.Authority{ID: AuthorityID(c.own.cert), TrustDomain: callersTD.Name(), From: ledger.StatePrepared, To: ledger.StateActive})
	c.append(t, &ledger.Bundle{TrustDomain: callersTD.Name(), Sequence: 1, Floor: 1, SHA256: sha256.Sum256([]byte("b")), Roots: [][]byte{c.root.cert.Raw}})
	c.count([]*authority{c.authority(c.own, false)}, c.foreign.cert)
	return c
}

// count makes these the authorities whose leaves may be callers, as a CA does with what its ledger says.
func (c *callers) count(own []*authority, others ...*x509.Certificate) {
	var records []ledger.AuthorityRecord
	for _, a := range own {
		records = append(records, a.record)
	}
	c.verifier.setAuthorities(own, others, taintedKeys(records))
}

func (c *callers) append(t testing.TB, event ledger.Body) uint64 {
	t.Helper()
	number, err := c.book.Append(t.Context(), event)
	if err != nil {
		t.Fatal(err)
	}
	return number
}

// authority is one of which the ledger knows nothing but what it is told: its coverage is foreign.
func (c *callers) authority(of signingCA, tainted bool) *authority {
	record := ledger.AuthorityRecord{ID: AuthorityID(of.cert), Tainted: tainted}
	record.Key, record.Coverage = keyID(of.cert), ledger.Coverage{Kind: "foreign"}
	return &authority{cert: of.cert, record: record}
}

func (c *callers) newCA(t testing.TB, name string, parent signingCA, key crypto.Signer) signingCA {
	t.Helper()
	if key == nil {
		key = newECKey(t)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: c.now.Add(-time.Hour), NotAfter: c.now.Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	signer, issuer := parent.key, parent.cert
	if signer == nil {
		signer, issuer = key, template
	}
	return signingCA{c.sign(t, template, issuer, key.Public(), signer), key}
}

func (c *callers) sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newECKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// template is a good leaf, signed a moment ago.
func (c *callers) template(t testing.TB) *x509.Certificate {
	t.Helper()
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = 1
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), NotBefore: c.now.Add(-time.Minute), NotAfter: c.now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{mustURL(t, "spiffe://example.org/ns/prod/sa/web")},
	}
}

func mustURL(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (c *callers) leaf(t testing.TB, by signingCA, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := c.template(t)
	if change != nil {
		change(template)
	}
	return c.sign(t, template, by.cert, newECKey(t).Public(), by.key)
}

// record puts the leaf into the ledger, as issuing it would.
func (c *callers) record(t testing.TB, leaf *x509.Certificate, change func(*ledger.Issue)) uint64 {
	t.Helper()
	issue := &ledger.Issue{Serial: leaf.SerialNumber.Bytes(), Certificate: sha256.Sum256(leaf.Raw), SPIFFEID: "spiffe://example.org/ns/prod/sa/web",
		NotBefore: ledger.At(leaf.NotBefore), NotAfter: ledger.At(leaf.NotAfter), Authority: AuthorityID(c.own.cert), Chain: ledger.ChainHash([][]byte{c.own.cert.Raw}),
		Bundle: 1, Delivery: ledger.DeliveryResponse, Proofs: []ledger.Proof{{Method: MethodKubernetes, Issuer: "k", Subject: "s", Time: ledger.At(c.now)}},
		Holder: ledger.Holder{Kind: "pod", ID: "uid-1"}}
	if change != nil {
		change(issue)
	}
	return c.append(t, issue)
}

func (c *callers) verify(leaf ...*x509.Certificate) (ClientCertificate, error) {
	return c.verifier.Verify(context.Background(), leaf)
}

func (c *callers) refused(t *testing.T, reason string, leaf ...*x509.Certificate) {
	t.Helper()
	got, err := c.verify(leaf...)
	if err == nil {
		t.Fatalf("accepted as %s; want a refusal about %q", got.ID, reason)
	}
	if !errors.Is(err, ErrUnauthenticated) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), reason) {
		t.Errorf("refused with %q; want it unauthenticated, about %q", err, reason)
	}
	if len(err.Error()) > 3000 {
		t.Errorf("the reason has %d octets", len(err.Error()))
	}
}

func TestAnOwnCertificateProvesWhatTheLedgerSaysOfIt(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, nil)
	number := c.record(t, leaf, nil)
	got, err := c.verify(leaf, c.own.cert)
	if err != nil {
		t.Fatal(err)
	}
	serial := ledger.Serial(leaf.SerialNumber.Bytes())
	want := ClientCertificate{
		ID:     spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/web"),
		Proof:  ledger.Proof{Method: MethodClientCertificate, Issuer: AuthorityID(c.own.cert).String(), Subject: serial.String(), Time: ledger.At(c.now)},
		First:  &ledger.Proof{Method: MethodKubernetes, Issuer: "k", Subject: "s", Time: ledger.At(c.now)},
		Holder: ledger.Holder{Kind: "pod", ID: "uid-1"}, Number: number, Serial: serial, Own: true, Until: leaf.NotAfter,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestTheFirstProofTravelsAlongTheLineage(t *testing.T) {
	c := newCallers(t)
	began := &ledger.Proof{Method: MethodJoinToken, Issuer: "kedge", Subject: "jti", Time: ledger.At(c.now.Add(-time.Hour))}
	byCertificate := []ledger.Proof{{Method: MethodClientCertificate, Issuer: "a", Subject: "01", Time: ledger.At(c.now)}}
	for name, test := range map[string]struct {
		change func(*ledger.Issue)
		want   *ledger.Proof
	}{
		"of a successor": {func(i *ledger.Issue) { i.Proofs, i.FirstProof = byCertificate, began }, began},
		"of one whose own beginning was not known": {func(i *ledger.Issue) { i.Proofs = byCertificate }, nil},
	} {
		leaf := c.leaf(t, c.own, nil)
		c.record(t, leaf, test.change)
		got, err := c.verify(leaf)
		if err != nil || !reflect.DeepEqual(got.First, test.want) {
			t.Errorf("%s: got %+v (%v), want %+v", name, got.First, err, test.want)
		}
	}
}

func TestACertificateThatTheLedgerDoesNotKnowHasNoKnownBeginning(t *testing.T) {
	c := newCallers(t)
	for name, by := range map[string]signingCA{"own": c.own, "on the list": c.foreign} {
		leaf := c.leaf(t, by, nil)
		got, err := c.verify(leaf)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		serial := ledger.Serial(leaf.SerialNumber.Bytes())
		if got.First != nil || got.Number != 0 || got.Own != (name == "own") || got.Holder != (ledger.Holder{Kind: "lineage", ID: serial.String()}) {
			t.Errorf("%s: got %+v", name, got)
		}
		if got.Proof.Issuer != AuthorityID(by.cert).String() {
			t.Errorf("%s: proven by %s", name, got.Proof.Issuer)
		}
	}
}

// Under an issuing CA of which the ledger knows every certificate, one that it does not know was made by a thief, or the ledger was put back.
func TestAnUnrecordedCertificateIsRefusedWhereTheLedgerKnowsEveryOne(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, nil)
	with := func(coverage ledger.Coverage) *authority {
		a := c.authority(c.own, false)
		a.record.Coverage = coverage
		return a
	}
	renewed := c.authority(c.newCA(t, "own", c.root, c.own.key), false) // the same key, and unknown leaves
	for name, test := range map[string]struct {
		own    []*authority
		counts bool
	}{
		"all":                              {[]*authority{with(ledger.Coverage{Kind: "complete"})}, false},
		"since before it was issued":       {[]*authority{with(ledger.Coverage{Kind: "since", Since: ledger.At(leaf.NotBefore)})}, false},
		"since after it was issued":        {[]*authority{with(ledger.Coverage{Kind: "since", Since: ledger.At(leaf.NotBefore) + 1})}, true},
		"none":                             {[]*authority{with(ledger.Coverage{Kind: "foreign"})}, true},
		"all, but not of one with its key": {[]*authority{with(ledger.Coverage{Kind: "complete"}), renewed}, true},
	} {
		c.count(test.own)
		_, err := c.verify(leaf)
		if test.counts && err != nil {
			t.Errorf("it knows %s: %v", name, err)
		}
		if !test.counts && (!errors.Is(err, ErrUnauthenticated) || !strings.Contains(err.Error(), "is not in the ledger, which has every certificate of the issuing CA")) {
			t.Errorf("it knows %s: %v", name, err)
		}
	}
	c.count([]*authority{with(ledger.Coverage{Kind: "complete"})})
	c.record(t, leaf, nil)
	if _, err := c.verify(leaf); err != nil {
		t.Errorf("once it is recorded: %v", err)
	}
}

func TestCertificatesThatAreNoCallersLeafAreRefused(t *testing.T) {
	c := newCallers(t)
	for reason, change := range map[string]func(*x509.Certificate){
		"expired":               func(l *x509.Certificate) { l.NotBefore, l.NotAfter = c.now.Add(-2*time.Hour), c.now.Add(-time.Second) },
		"not yet valid":         func(l *x509.Certificate) { l.NotBefore = c.now.Add(time.Minute) },
		"trust domain example.": func(l *x509.Certificate) { l.URIs = []*url.URL{mustURL(t, "spiffe://example.com/ns/prod/sa/web")} },
		"has 2 URI SANs": func(l *x509.Certificate) {
			l.URIs = append(l.URIs, mustURL(t, "spiffe://example.org/ns/prod/sa/other"))
		},
		"has 0 URI SANs":             func(l *x509.Certificate) { l.URIs, l.DNSNames = nil, []string{"web.example.org"} },
		"not that of a workload":     func(l *x509.Certificate) { l.URIs = []*url.URL{mustURL(t, "spiffe://example.org")} },
		"is not a SPIFFE ID":         func(l *x509.Certificate) { l.URIs = []*url.URL{mustURL(t, "https://example.org/ns/prod/sa/web")} },
		`"spiffe://example.org/../x`: func(l *x509.Certificate) { l.URIs = []*url.URL{mustURL(t, "spiffe://example.org/../x")} },
		"has 3000 octets": func(l *x509.Certificate) {
			l.URIs = []*url.URL{mustURL(t, "spiffe://example.org/"+strings.Repeat("a", 3000-len("spiffe://example.org/")))}
		},
		"lacks clientAuth":       func(l *x509.Certificate) { l.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"extKeyUsage lacks":      func(l *x509.Certificate) { l.ExtKeyUsage = nil },
		"is a CA certificate":    func(l *x509.Certificate) { l.IsCA = true },
		"lacks digitalSignature": func(l *x509.Certificate) { l.KeyUsage = x509.KeyUsageKeyEncipherment },
		"has keyCertSign":        func(l *x509.Certificate) { l.KeyUsage |= x509.KeyUsageCertSign },
		"unhandled critical": func(l *x509.Certificate) {
			l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		},
	} {
		t.Run(reason, func(t *testing.T) {
			c.refused(t, reason, c.leaf(t, c.own, change))
			c.refused(t, reason, c.leaf(t, c.foreign, change))
		})
	}
}

func TestOnlyDirectLeavesOfListedIssuingCAsCount(t *testing.T) {
	c := newCallers(t)
	c.refused(t, "none of the issuing CAs that count", c.leaf(t, c.stranger, nil), c.stranger.cert, c.root.cert)
	c.refused(t, "none of the issuing CAs that count", c.leaf(t, c.root, nil), c.root.cert)
	below := c.newCA(t, "below", c.own, nil)
	c.refused(t, "none of the issuing CAs that count", c.leaf(t, below, nil), below.cert, c.own.cert)
	impostor := c.newCA(t, "own", signingCA{}, nil) // has the name, and not the key
	c.refused(t, "does not verify under the issuing CA", c.leaf(t, impostor, nil), impostor.cert)

	c.count([]*authority{c.authority(c.own, false)})
	c.refused(t, "none of the issuing CAs that count", c.leaf(t, c.foreign, nil))
	c.refused(t, "none of the issuing CAs that count", func() *x509.Certificate { c.count(nil); return c.leaf(t, c.own, nil) }())
}

func TestNothingCountsUnderAnIssuingCAThatHasExpired(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, func(l *x509.Certificate) { l.NotAfter = c.now.Add(72 * time.Hour) })
	c.now = c.now.Add(49 * time.Hour)
	c.refused(t, "does not verify under the issuing CA", leaf)
}

func TestTaintedAuthoritiesAuthenticateNobody(t *testing.T) {
	c := newCallers(t)
	renewed := c.newCA(t, "own", c.root, c.own.key)   // the same name and key
	renamed := c.newCA(t, "other", c.root, c.own.key) // the same key under another name
	for name, own := range map[string][]*authority{
		"it":                               {c.authority(c.own, true)},
		"one that shares its key and name": {c.authority(renewed, true), c.authority(c.own, false)},
		"one that shares its key":          {c.authority(c.own, false), c.authority(renamed, true)},
	} {
		c.count(own, c.own.cert) // a list does not help it
		leaf := c.leaf(t, c.own, nil)
		if _, err := c.verify(leaf); err == nil || !errors.Is(err, ErrUnauthenticated) || !strings.Contains(err.Error(), "tainted") {
			t.Errorf("%s is tainted: %v", name, err)
		}
	}
	// What is removed, and what a root's taint reaches, is in the ledger alone.
	root, leaf := ledger.Hash{1}, c.leaf(t, c.own, nil)
	record := func(change func(*ledger.AuthorityRecord)) ledger.AuthorityRecord {
		r := c.authority(c.own, false).record
		change(&r)
		return r
	}
	for name, records := range map[string][]ledger.AuthorityRecord{
		"a removed one that shares its key": {record(func(r *ledger.AuthorityRecord) { r.ID, r.State, r.Tainted = ledger.Hash{2}, ledger.StateRemoved, true })},
		"its root":                          {{ID: root, Tainted: true}, record(func(r *ledger.AuthorityRecord) { r.Root = root })},
	} {
		c.verifier.setAuthorities([]*authority{c.authority(c.own, false)}, nil, taintedKeys(records))
		if _, err := c.verify(leaf); err == nil || !errors.Is(err, ErrUnauthenticated) || !strings.Contains(err.Error(), "tainted") {
			t.Errorf("%s is tainted: %v", name, err)
		}
	}
	c.count([]*authority{c.authority(c.own, false), c.authority(c.stranger, true)})
	if _, err := c.verify(c.leaf(t, c.own, nil)); err != nil {
		t.Errorf("another authority's taint counts against it: %v", err)
	}
}

func TestAuthoritiesThatShareAKeyAreToldApartByTheLedger(t *testing.T) {
	c := newCallers(t)
	renewed := c.newCA(t, "own", c.root, c.own.key)
	c.count([]*authority{c.authority(renewed, false), c.authority(c.own, false)}, c.own.cert)
	leaf := c.leaf(t, c.own, nil)
	number := c.record(t, leaf, nil)
	got, err := c.verify(leaf)
	if err != nil || !got.Own || got.Number != number || got.Proof.Issuer != AuthorityID(c.own.cert).String() {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestARevokedCertificateAuthenticatesNobody(t *testing.T) {
	c := newCallers(t)
	for _, by := range []signingCA{c.own, c.foreign} {
		leaf := c.leaf(t, by, nil)
		if _, err := c.verify(leaf); err != nil {
			t.Fatal(err)
		}
		c.append(t, &ledger.Revoke{Serial: leaf.SerialNumber.Bytes(), NotAfter: ledger.At(leaf.NotAfter), By: "admin"})
		c.refused(t, "is revoked", leaf)
	}
}

// TestWhatWasFoundOfACertificateCountsAsLongAsItHolds shows one and the same certificate again and again, as a TLS connection does.
func TestWhatWasFoundOfACertificateCountsAsLongAsItHolds(t *testing.T) {
	c := newCallers(t)
	began, own := c.now, []*authority{c.authority(c.own, false)}
	leaf := c.leaf(t, c.own, func(l *x509.Certificate) { l.NotAfter = began.Add(72 * time.Hour) }) // its issuer has 48
	c.record(t, leaf, nil)
	good := func() {
		t.Helper()
		got, err := c.verify(leaf)
		if err != nil || got.Proof.Time != ledger.At(c.now) {
			t.Fatalf("at %s: got %+v, %v", c.now, got, err)
		}
	}
	good()
	found, _ := c.verifier.judged.Load(weak.Make(leaf))
	c.now = began.Add(time.Hour)
	c.count(own, c.foreign.cert) // as with every new trust bundle
	good()
	if again, _ := c.verifier.judged.Load(weak.Make(leaf)); again == nil || again != found {
		t.Error("it was judged anew, though no issuing CA had changed")
	}

	c.now = began.Add(49 * time.Hour)
	c.refused(t, "does not verify under the issuing CA", leaf)
	c.now = began.Add(-2 * time.Minute) // before the leaf
	c.refused(t, "does not verify under the issuing CA", leaf)
	c.now = began
	good()
	c.count(nil)
	c.refused(t, "none of the issuing CAs that count", leaf)
	c.count([]*authority{c.authority(c.own, true)})
	c.refused(t, "is tainted", leaf)
	c.count(own)
	good()
	c.append(t, &ledger.Revoke{Serial: leaf.SerialNumber.Bytes(), NotAfter: ledger.At(leaf.NotAfter), By: "admin"})
	c.refused(t, "is revoked", leaf)
}

func TestWhatWasFoundOfACertificateGoesWithIt(t *testing.T) {
	c := newCallers(t)
	if _, err := c.verify(c.leaf(t, c.own, nil)); err != nil {
		t.Fatal(err)
	}
	for there := true; there; { // until the test's own time is up
		runtime.GC()
		there = false
		c.verifier.judged.Range(func(any, any) bool { there = true; return false })
	}
}

// BenchmarkAClientCertificate is of one that a connection shows for the first time, and again.
func BenchmarkAClientCertificate(b *testing.B) {
	c := newCallers(b)
	leaf := c.leaf(b, c.own, nil)
	c.record(b, leaf, nil)
	for _, name := range []string{"first", "again"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if name == "first" {
					c.verifier.judged.Clear()
				}
				if _, err := c.verify(leaf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestACertificateThatIsNotTheRecordedOneIsRefused(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, nil)
	c.record(t, leaf, nil)
	forged := c.leaf(t, c.own, func(l *x509.Certificate) { l.SerialNumber = leaf.SerialNumber })
	c.refused(t, "somebody else signs with the key of an issuing CA", forged)
	if _, err := c.verify(leaf); err != nil {
		t.Error(err)
	}
}

func TestMonstersAreRefusedBeforeTheyCostAnything(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, nil)
	c.refused(t, "there are 0 certificates")
	c.refused(t, "there are 11 certificates", leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf, leaf)
	for bits, reason := range map[int]string{16384: "RSA of 16384 bits", 1024: "RSA of 1024 bits"} {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
		if err != nil {
			t.Fatal(err)
		}
		n.SetBit(n, bits-1, 1).SetBit(n, 0, 1)
		c.refused(t, reason, c.sign(t, c.template(t), c.own.cert, &rsa.PublicKey{N: n, E: 65537}, c.own.key))
	}
}

func TestAnUnreadableLedgerMakesACallerWait(t *testing.T) {
	c := newCallers(t)
	leaf := c.leaf(t, c.own, nil)
	c.record(t, leaf, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := c.verifier.Verify(ctx, []*x509.Certificate{leaf})
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnauthenticated) || !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if err := c.book.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.verify(leaf); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnauthenticated) {
		t.Errorf("closed: %v", err)
	}
}
