package istio_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
)

// badCall is a call that is wrong in one way. A zero field is as it is in a good call.
type badCall struct {
	csr      string
	tokens   []string // whole authorization headers
	noToken  bool
	validity int64
	metadata map[string]*structpb.Value
}

// promise is a row of docs/refusals.md: what a caller gets to see.
type promise struct {
	code codes.Code
	says string // is part of the status message
}

// readPromises reads tables of docs/refusals.md: | `case` | code | text |. Those of SDS are apart.
func readPromises(t *testing.T, sds bool) map[string]promise {
	t.Helper()
	page, err := os.ReadFile("../../docs/refusals.md")
	if err != nil {
		t.Fatal(err)
	}
	csr, rest, _ := strings.Cut(string(page), "\n## SDS\n")
	streams, rest, found := strings.Cut(rest, "\n## ")
	if !found {
		t.Fatal("docs/refusals.md has no part about SDS")
	}
	part := csr + rest
	if sds {
		part = streams
	}
	row := regexp.MustCompile(`(?m)^\| ([^|]+) \| (\w+) \| (.*) \|$`)
	names := map[string]codes.Code{}
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		names[c.String()] = c
	}
	promises := map[string]promise{}
	for _, cells := range row.FindAllStringSubmatch(part, -1) {
		code, ok := names[cells[2]]
		if !ok {
			continue // the heading
		}
		if _, twice := promises[cells[1]]; twice {
			t.Errorf("docs/refusals.md has %q twice", cells[1])
		}
		promises[cells[1]] = promise{code, strings.Trim(cells[3], "`")}
	}
	return promises
}

var requestID = regexp.MustCompile(`request id \w{16}`)

// maxText is how many octets of text a refusal may have, whatever was sent.
const maxText = 1000

// TestEachBadInputGetsTheCodeAndTheTextThatTheDocsPromise holds docs/refusals.md against the door, row by row, both ways.
func TestEachBadInputGetsTheCodeAndTheTextThatTheDocsPromise(t *testing.T) {
	strict := ca.DefaultProfileConfig()
	strict.OverMax = ca.OverMaxRefuse
	private := ca.DefaultProfileConfig()
	private.Identities = []string{"ns/other/sa/*"}
	d := openDoor(t, map[string]ca.ProfileConfig{"strict": strict, "private": private})
	api, promises, calls := d.api(t, nil), readPromises(t, false), badCalls(t, d)
	good := csrFor(t, newKey(t), nil)
	var issued uint64
	for name := range promises {
		if _, ok := calls[name]; !ok {
			t.Errorf("docs/refusals.md promises something for %q, which is not tested", name)
		}
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			want, ok := promises[name]
			if !ok {
				t.Fatal("docs/refusals.md does not say what happens")
			}
			ctx := t.Context()
			tokens := call.tokens
			if tokens == nil && !call.noToken {
				tokens = []string{"Bearer " + d.token(t)}
			}
			for _, token := range tokens {
				ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
			}
			request := &pb.IstioCertificateRequest{Csr: call.csr, ValidityDuration: call.validity}
			if call.csr == "" && !strings.HasPrefix(name, "an empty CSR") {
				request.Csr = good
			}
			if call.metadata != nil {
				request.Metadata = &structpb.Struct{Fields: call.metadata}
			}
			_, err := api.CreateCertificate(ctx, request)
			if status.Code(err) != want.code {
				t.Fatalf("code %s, promised is %s: %v", status.Code(err), want.code, err)
			}
			if err == nil {
				issued++
				return
			}
			message := status.Convert(err).Message()
			if !strings.Contains(message, want.says) {
				t.Errorf("it says %q, promised is %q", message, want.says)
			}
			switch id := requestID.FindString(message); {
			case id == "": // gRPC itself refused it
			case !strings.Contains(d.log.String(), `"msg":"certificate refused","request_id":"`+id[len("request id "):]+`"`):
				t.Errorf("the log has no line for %q", message)
			}
			if opaque := regexp.MustCompile(`^[a-z ]+; the CA's log says why \(request id \w{16}\)$`); !opaque.MatchString(message) &&
				(want.code == codes.Unauthenticated || want.code == codes.PermissionDenied) {
				t.Errorf("it says more than it should: %q", message)
			}
			if len(message) > maxText {
				t.Errorf("it says %d octets: that is no text for people, and the caller's own words: %.300q", len(message), message)
			}
			for _, token := range tokens {
				if secret := strings.TrimPrefix(token, "Bearer "); len(secret) > 20 && strings.Contains(d.log.String()+message, secret) {
					t.Error("the token is in the log or in the answer")
				}
			}
		})
	}
	for line := range strings.Lines(d.log.String()) {
		if len(line) > 2*maxText {
			t.Errorf("the log has a line of %d octets: %.300s", len(line), line)
		}
	}
	report, err := d.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("the ledger does not verify: %v %v", err, report.Problems)
	}
	var recorded uint64
	for event, err := range d.ledger.Events(t.Context(), filterIssues) {
		if err != nil {
			t.Fatal(err)
		}
		_ = event
		recorded++
	}
	if recorded != issued+1 { // and the serving certificate
		t.Errorf("%d certificates are recorded, %d were given away", recorded, issued+1)
	}
}

// A token issuer that hangs, and callers with tokens of it, keep no working place from the callers of others.
func TestAnIssuerThatHangsHoldsUpOnlyItsOwnCallers(t *testing.T) {
	const most = 3
	hang, asked := make(chan struct{}), make(chan struct{}, 1)
	issuer := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-hang
	}))
	t.Cleanup(issuer.Close)
	t.Cleanup(func() { close(hang) })
	const name = "https://hanging.example"
	d := openDoorWith(t, doorOptions{calls: most, issuers: []authn.IssuerConfig{{Name: "hanging", Kind: authn.KindKubernetes, Issuer: name, Audiences: []string{"istio-ca"},
		JWKSURL: issuer.URL}}})
	<-asked
	api, csr := d.api(t, nil), csrFor(t, newKey(t), nil)
	token := signToken(t, must(rsa.GenerateKey(rand.Reader, 2048)), jose.RS256, "k1", with(goodClaims(), "iss", name))
	ctx, cancel := context.WithCancel(t.Context())
	var held sync.WaitGroup
	var ended atomic.Int64
	for range 5 * most {
		held.Go(func() {
			defer ended.Add(1)
			_, err := api.CreateCertificate(bearer(ctx, token), &pb.IstioCertificateRequest{Csr: csr})
			if code := status.Code(err); code != codes.Canceled && code != codes.Unavailable {
				t.Errorf("a caller of the issuer that hangs: %v", err)
			}
		})
	}
	others := d.api(t, nil)
	for range 5 * most {
		if _, err := others.CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csr}); err != nil {
			t.Errorf("a caller of another issuer: %v", err)
		}
	}
	if n := ended.Load(); n != 0 {
		t.Errorf("the callers of another issuer were served only after %d of those that are held up", n)
	}
	cancel()
	held.Wait()
}

// Whoever waits for the ledger has its place, and not the processor: what others send is checked meanwhile.
func TestWhoWaitsForTheLedgerHoldsUpNoCheck(t *testing.T) {
	hang := make(chan struct{})
	var hangs atomic.Bool
	d := openDoorWith(t, doorOptions{onCommit: func(ledger.Commit) {
		if hangs.Load() {
			<-hang
		}
	}})
	hangs.Store(true)
	release := sync.OnceFunc(func() { close(hang) })
	t.Cleanup(release)
	api, csr := d.api(t, nil), csrFor(t, newKey(t), nil)
	turns := runtime.GOMAXPROCS(0)
	var waiting sync.WaitGroup
	for range turns {
		waiting.Go(func() {
			if _, err := api.CreateCertificate(bearer(t.Context(), d.token(t)), &pb.IstioCertificateRequest{Csr: csr}); err != nil {
				t.Errorf("once the ledger answers again: %v", err)
			}
		})
	}
	for entered := 0; entered < turns; runtime.Gosched() {
		families, err := d.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() == "kedge_csr_wait_seconds" {
				entered = int(family.GetMetric()[0].GetHistogram().GetSampleCount())
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // less than the others' time
	defer cancel()
	if _, err := d.api(t, nil).CreateCertificate(bearer(ctx, "garbage"), &pb.IstioCertificateRequest{Csr: csr}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a bad token while the ledger hangs: %v", err)
	}
	release()
	waiting.Wait()
}

// TestAFloodOfUnknownKeyIDsIsRefusedAndHoldsNobodyUp: those who have a good token get their certificates meanwhile, and the issuer is asked once.
func TestAFloodOfUnknownKeyIDsIsRefusedAndHoldsNobodyUp(t *testing.T) {
	const flood, good = 400, 20
	key, stranger := must(rsa.GenerateKey(rand.Reader, 2048)), must(rsa.GenerateKey(rand.Reader, 2048))
	jwks := must(json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "RS256", Use: "sig"}}}))
	var asked atomic.Int64
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = w.Write(jwks)
	}))
	t.Cleanup(issuer.Close)
	const name = "https://flooded.example"
	d := openDoorWith(t, doorOptions{issuers: []authn.IssuerConfig{{Name: "flooded", Kind: authn.KindKubernetes, Issuer: name, Audiences: []string{"istio-ca"},
		JWKSURL: issuer.URL, RefreshInterval: time.Hour, MinRefetch: time.Hour}}})
	api, csr := d.api(t, nil), csrFor(t, newKey(t), nil)
	claims := with(goodClaims(), "iss", name)
	first := signToken(t, key, jose.RS256, "k1", claims)
	ask := func(token string) error {
		_, err := api.CreateCertificate(bearer(t.Context(), token), &pb.IstioCertificateRequest{Csr: csr})
		return err
	}
	if err := ask(first); err != nil { // and the keys are there
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range flood {
		token := signToken(t, stranger, jose.RS256, fmt.Sprintf("unknown-%d", i), claims)
		all.Go(func() {
			if err := ask(token); status.Code(err) != codes.Unauthenticated {
				t.Errorf("an unknown key id: %v", err)
			}
		})
		if i%(flood/good) == 0 {
			all.Go(func() {
				if err := ask(first); err != nil {
					t.Errorf("a good token in the flood: %v", err)
				}
			})
		}
	}
	all.Wait()
	if got := asked.Load(); got != 1 {
		t.Errorf("the issuer was asked %d times for its keys, want once", got)
	}
	if got := strings.Count(d.log.String(), "is not among the issuer's 1 keys"); got != flood {
		t.Errorf("the log has %d of %d reasons", got, flood)
	}
}

func badCalls(t *testing.T, d *door) map[string]badCall {
	t.Helper()
	key := newKey(t)
	good := csrFor(t, key, nil)
	der := func(text string) []byte { block, _ := pem.Decode([]byte(text)); return block.Bytes }
	wrap := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	request := "CERTIFICATE REQUEST"
	flipped := bytes.Clone(der(good))
	flipped[len(flipped)-3] ^= 1
	var names []string
	var ids []*url.URL
	for i := range 10_000 {
		names = append(names, fmt.Sprintf("n%04d", i))
		ids = append(ids, &url.URL{Scheme: "spiffe", Host: "cluster.local", Path: fmt.Sprintf("/ns/n%d/sa/s", i)})
	}
	bearer := func(token string) []string { return []string{"Bearer " + token} }
	sign := func(change string, value any) []string {
		return bearer(signToken(t, d.key, jose.RS256, "k1", with(goodClaims(), change, value)))
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	publicPEM, err := x509.MarshalPKIXPublicKey(d.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	goodToken := d.token(t)
	parts := strings.Split(goodToken, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1] + "."
	text := func(name, value string) map[string]*structpb.Value {
		return map[string]*structpb.Value{name: structpb.NewStringValue(value)}
	}
	return map[string]badCall{
		"an empty CSR":                          {},
		"a CSR that is not PEM":                 {csr: "hello"},
		"nonsense in a PEM block":               {csr: wrap(request, []byte("hello"))},
		"a CSR that claims two gigabytes":       {csr: wrap(request, []byte("\x30\x84\x7f\xff\xff\xff"))},
		"a SAN that cannot be read":             {csr: sanCSR(t, key, "spiffe://%zz/"+strings.Repeat("\x01", 8000))},
		"a PEM block of another type":           {csr: wrap("CERTIFICATE", der(good))},
		"a truncated CSR":                       {csr: wrap(request, der(good)[:60])},
		"a PEM block that is cut off":           {csr: good[:len(good)/2]},
		"two CSRs":                              {csr: good + good},
		"a CSR of more than 16 KiB":             {csr: wrap(request, make([]byte, 15_000))},
		"a CSR with ten thousand SANs":          {csr: csrFor(t, key, &x509.CertificateRequest{DNSNames: names})},
		"a message of more than 256 KiB":        {csr: csrFor(t, key, &x509.CertificateRequest{URIs: ids})},
		"a CSR whose signature is not good":     {csr: wrap(request, flipped)},
		"a CSR signed with SHA-1":               {csr: sha1CSR(t)},
		"an RSA key of 1024 bits":               {csr: rsaCSR(t, 1024, 65537)},
		"an RSA key of 16384 bits":              {csr: rsaCSR(t, 16384, 65537)},
		"an RSA key with the exponent 3":        {csr: rsaCSR(t, 2048, 3)},
		"a P-224 key":                           {csr: ecCSR(t, elliptic.P224())},
		"a P-521 key":                           {csr: ecCSR(t, elliptic.P521())},
		"an RSA key with an even modulus":       {csr: unsignedCSR(t, &rsa.PublicKey{N: modulus(2048, 0), E: 65537})},
		"a DSA key":                             {csr: oddKeyCSR(t, oidDSA, []*big.Int{modulus(2048, 1), modulus(256, 1), big.NewInt(2)}, must(asn1.Marshal(big.NewInt(4))))},
		"an X25519 key":                         {csr: oddKeyCSR(t, oidX25519, nil, make([]byte, 32))},
		"a key of an unknown algorithm":         {csr: oddKeyCSR(t, oidMLDSA, nil, make([]byte, 1312))},
		"a point that is not on its curve":      {csr: oddKeyCSR(t, oidEC, oidP256, append([]byte{4}, make([]byte, 64)...))},
		"a curve of one's own":                  {csr: oddKeyCSR(t, oidEC, []int{1, 2, 3}, append([]byte{4}, make([]byte, 64)...))},
		"an Ed25519 key":                        {csr: ed25519CSR(t)},
		"hostile SANs, subject and extensions":  {csr: hostileCSR(t, key)},
		"a validity of 0":                       {validity: 0},
		"a negative validity":                   {validity: -1},
		"the most negative validity":            {validity: math.MinInt64},
		"the largest validity":                  {validity: math.MaxInt64},
		"a validity below minTTL":               {validity: 299},
		"a validity above maxTTL":               {validity: 86401},
		"a validity above maxTTL, with refuse":  {validity: 86401, metadata: text("CertSigner", "strict")},
		"an unknown profile":                    {metadata: text("CertSigner", "nobody")},
		"a profile for others":                  {metadata: text("CertSigner", "private")},
		"a CertSigner that is not a string":     {metadata: map[string]*structpb.Value{"CertSigner": structpb.NewNumberValue(1)}},
		"ImpersonatedIdentity":                  {metadata: text("ImpersonatedIdentity", "spiffe://cluster.local/ns/x/sa/y")},
		"ImpersonatedIdentity as a list":        {metadata: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewListValue(&structpb.ListValue{})}},
		"no credentials":                        {noToken: true},
		"two authorization headers":             {tokens: []string{"Bearer " + goodToken, "Bearer " + goodToken}},
		"another scheme":                        {tokens: []string{"Basic dXNlcjpwYXNz"}},
		"a token that is not a JWT":             {tokens: bearer("hello")},
		"a truncated token":                     {tokens: bearer(goodToken[:len(goodToken)-40])},
		"a token of more than 16 KiB":           {tokens: bearer(goodToken + strings.Repeat("A", 16<<10))},
		"headers of more than 32 KiB":           {tokens: bearer(strings.Repeat("A", 40<<10))},
		"alg none":                              {tokens: bearer(none)},
		"HS256 with the public key":             {tokens: bearer(signToken(t, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicPEM}), jose.HS256, "k1", goodClaims()))},
		"a token in JSON serialization":         {tokens: bearer(`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`)},
		"an encrypted token":                    {tokens: bearer(goodToken + ".x.y")},
		"a token that brings its own key":       {tokens: bearer(signWith(t, stranger, &jose.SignerOptions{EmbedJWK: true}))},
		"a token with critical parameters":      {tokens: bearer(signWith(t, d.key, (&jose.SignerOptions{}).WithHeader("crit", []string{"b64"})))},
		"a token of another type":               {tokens: bearer(signWith(t, d.key, (&jose.SignerOptions{}).WithType("logout+jwt")))},
		"a token whose claims are not JSON":     {tokens: bearer(parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte("hello")) + "." + parts[2])},
		"a token signed with another key":       {tokens: bearer(signToken(t, stranger, jose.RS256, "k1", goodClaims()))},
		"an unknown key id":                     {tokens: bearer(signToken(t, stranger, jose.RS256, "k2", goodClaims()))},
		"an unknown issuer":                     {tokens: sign("iss", "https://other.example")},
		"a wrong audience":                      {tokens: sign("aud", []string{"vault"})},
		"no audience":                           {tokens: sign("aud", nil)},
		"an expired token":                      {tokens: sign("exp", time.Now().Add(-time.Hour).Unix())},
		"a token without expiry":                {tokens: sign("exp", nil)},
		"a token with an absurd expiry":         {tokens: sign("exp", 1e300)},
		"a token that was issued in the future": {tokens: sign("iat", time.Now().Add(time.Hour).Unix())},
		"a token without a subject":             {tokens: sign("sub", nil)},
		"a token that is not valid yet":         {tokens: sign("nbf", time.Now().Add(time.Hour).Unix())},
		"a subject that is no service account":  {tokens: sign("sub", "system:node:node-a")},
		"a subject with a path in it":           {tokens: bearer(signToken(t, d.key, jose.RS256, "k1", with(with(goodClaims(), "sub", "system:serviceaccount:..:a/b"), "kubernetes.io", nil)))},
		"a subject that contradicts its claims": {tokens: sign("sub", "system:serviceaccount:ns1:sa2")},
		"a join token of another CA":            {tokens: bearer(signToken(t, newKey(t), jose.ES256, "k9", with(goodClaims(), "iss", "kedge")))},
	}
}

// rsaCSR makes a request whose modulus nobody can factor into the caller's key: the size is judged before the signature.
func rsaCSR(t *testing.T, bits, exponent int) string {
	t.Helper()
	return unsignedCSR(t, &rsa.PublicKey{N: modulus(bits, 12345678901), E: exponent})
}

func modulus(bits int, rest int64) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.Add(n, big.NewInt(rest))
}

// unsignedCSR makes a request for a key without its private half, with a signature that is not good.
func unsignedCSR(t *testing.T, pub crypto.PublicKey) string {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return spkiCSR(t, spki)
}

// oddKeyCSR makes a request for a key of an algorithm of which crypto/x509 makes none.
func oddKeyCSR(t *testing.T, algorithm asn1.ObjectIdentifier, parameters any, key []byte) string {
	t.Helper()
	identifier := pkix.AlgorithmIdentifier{Algorithm: algorithm}
	if parameters != nil {
		der, err := asn1.Marshal(parameters)
		if err != nil {
			t.Fatal(err)
		}
		identifier.Parameters.FullBytes = der
	}
	spki, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{identifier, asn1.BitString{Bytes: key, BitLength: 8 * len(key)}})
	if err != nil {
		t.Fatal(err)
	}
	return spkiCSR(t, spki)
}

var (
	oidEC     = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidP256   = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidDSA    = asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}
	oidX25519 = asn1.ObjectIdentifier{1, 3, 101, 110}
	oidMLDSA  = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 17}
)

func spkiCSR(t *testing.T, spki []byte) string {
	t.Helper()
	info, err := asn1.Marshal(struct {
		Version    int
		Subject    pkix.RDNSequence
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}{0, nil, asn1.RawValue{FullBytes: spki}, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true}})
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		Info      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: info}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue},
		asn1.BitString{Bytes: make([]byte, 256), BitLength: 2048}})
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func ecCSR(t *testing.T, curve elliptic.Curve) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return csrFor(t, key, nil)
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func ed25519CSR(t *testing.T) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return csrFor(t, key, nil)
}

// sha1CSR names SHA-1 as the algorithm of its signature; whether that is good is not even looked at.
func sha1CSR(t *testing.T) string {
	t.Helper()
	block, _ := pem.Decode([]byte(csrFor(t, newKey(t), nil)))
	sha256, sha1 := []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}, []byte{0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01}
	var csr struct {
		Info      asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(block.Bytes, &csr); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(csr.Algorithm.FullBytes, sha256) {
		t.Fatal("the CSR is not signed with ECDSA and SHA-256")
	}
	csr.Algorithm = asn1.RawValue{FullBytes: append([]byte{0x30, byte(len(sha1))}, sha1...)}
	der, err := asn1.Marshal(csr)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// sanCSR makes a request with one URI as it is.
func sanCSR(t *testing.T, key crypto.Signer, uri string) string {
	t.Helper()
	names := must(asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}}))
	return csrFor(t, key, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: names}}})
}

// signWith makes a token with good claims and an odd header.
func signWith(t *testing.T, key *rsa.PrivateKey, options *jose.SignerOptions) string {
	t.Helper()
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, options))
	return must(jwt.Signed(signer).Claims(goodClaims()).Serialize())
}

func hostileCSR(t *testing.T, key crypto.Signer) string {
	t.Helper()
	caTrue, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	return csrFor(t, key, &x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "istiod.istio-system.svc\x00.example.org", Organization: []string{strings.Repeat("x", 4000)}},
		DNSNames:        []string{"*", "kubernetes.default.svc"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/kube-system/sa/admin"}, {Scheme: "javascript", Opaque: "alert(1)"}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: caTrue}},
	})
}
