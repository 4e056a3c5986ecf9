package istio_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
	"kedge/issuer/gate"
	"kedge/issuer/istio"
	"kedge/issuer/metrics"
	"kedge/issuer/reception"
	"kedge/issuer/sds"
	"kedge/issuer/serving"
	"kedge/plugins/file"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

const tokenIssuer = "https://issuer.example"

// lines is a log that tests read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed by the next line; nil: nobody waits
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
	return l.text.Write(p)
}

// next is closed once there is more than there is now.
func (l *lines) next() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return l.more
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// door is the CSR API of a whole CA on a loopback port, and a client's connection to it.
type door struct {
	address  string
	roots    *x509.CertPool
	key      *rsa.PrivateKey // of the token issuer
	join     *authn.JoinTokens
	ledger   *ledger.Ledger
	ca       *ca.CA
	log      *lines
	registry *prometheus.Registry
	envoys   *sds.Server
	gate     *gate.Gate
	anchors  *anchors
	stop     context.CancelFunc // of the streams
}

// anchors are trust anchors that a test adds.
type anchors struct {
	mu      sync.Mutex
	all     []*x509.Certificate
	changed chan struct{}
}

func (a *anchors) Anchors(context.Context) ([]*x509.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all), nil
}

func (a *anchors) Changed() <-chan struct{} { return a.changed }

// add makes a new root, which the CA trusts from its next look on.
func (a *anchors) add(t testing.TB) *x509.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "next"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	a.all = append(a.all, root)
	a.mu.Unlock()
	a.changed <- struct{}{}
	return root
}

// doorOptions say in what a door differs from others. A zero field is as it mostly is.
type doorOptions struct {
	profiles    map[string]ca.ProfileConfig // added to the default one
	issuers     []authn.IssuerConfig        // added to the one whose tokens door.token makes
	connections istio.Connections
	listener    net.Listener
	onCommit    func(ledger.Commit)
	calls       int           // that are worked on at once; 0: the gate's own
	patience    time.Duration // with half-sent requests; 0: the gate's own
	privateKeys bool          // of SDS
	dir         string        // of the CA; "": any
	clock       *ca.Clock     // of the CA; nil: the machine's
}

// openDoor opens everything. profiles are added to the default one.
func openDoor(t testing.TB, profiles map[string]ca.ProfileConfig) *door {
	t.Helper()
	return openDoorWith(t, doorOptions{profiles: profiles})
}

// defaultConnections are those of the configuration's defaults.
var defaultConnections = istio.Connections{
	MaxAge: 30 * time.Minute, MaxAgeGrace: 30 * time.Second, MinPing: 5 * time.Second, Ping: time.Minute, PingTimeout: 20 * time.Second, Reflection: true,
}

func openDoorWith(t testing.TB, o doorOptions) *door {
	t.Helper()
	if o.connections == (istio.Connections{}) {
		o.connections = defaultConnections
	}
	d := &door{log: &lines{}, registry: prometheus.NewRegistry(), roots: x509.NewCertPool()}
	log := slog.New(slog.NewJSONHandler(d.log, nil))
	dir := cmp.Or(o.dir, t.TempDir())
	d.anchors = &anchors{changed: make(chan struct{}, 1)}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	d.ledger, err = ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: "0.1.0", Retention: time.Hour, Logger: log, OnCommit: o.onCommit})
	must(err)
	t.Cleanup(func() { d.ledger.Close() })
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: td.Name()})
	must(err)
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")})
	must(err)
	clock := ca.SystemClock()
	if o.clock != nil {
		clock = *o.clock
	}
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), clock, time.Time{})
	must(err)
	made := map[string]*ca.Profile{}
	made[ca.DefaultProfile], err = ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	must(err)
	for name, config := range o.profiles {
		made[name], err = ca.NewProfile(name, config)
		must(err)
	}
	d.ca, err = ca.Open(t.Context(), ca.Options{TrustDomain: td, Ledger: d.ledger, Root: root, Anchors: d.anchors, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys,
		Profiles: made, IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256, Clock: clock, Guarded: guarded, Logger: log})
	must(err)
	d.roots.AppendCertsFromPEM([]byte(d.ca.Bundle().PEM))

	d.key, err = rsa.GenerateKey(rand.Reader, 2048)
	must(err)
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: d.key.Public(), KeyID: "k1", Algorithm: "RS256", Use: "sig"}}})
	must(err)
	must(os.WriteFile(filepath.Join(dir, "jwks.json"), jwks, 0o600))
	_, joinKey, err := keys.Create(t.Context(), ca.P256)
	must(err)
	d.join, err = authn.NewJoinTokens(authn.JoinOptions{TrustDomain: td, Key: joinKey, Identities: []string{"ns/*/sa/*"}, MaxTTL: time.Hour, Ledger: d.ledger})
	must(err)
	callers, err := authn.New(authn.Options{TrustDomain: td, Join: d.join, Skew: time.Second, Certificates: d.ca.ClientCertificates(), Logger: log,
		Issuers: append([]authn.IssuerConfig{{Name: "main", Kind: authn.KindKubernetes, Issuer: tokenIssuer, Audiences: []string{"istio-ca"}, JWKSFile: filepath.Join(dir, "jwks.json")}},
			o.issuers...)})
	must(err)
	background, cancel := context.WithCancel(context.Background())
	fetching := make(chan error, 1)
	go func() { fetching <- callers.Run(background) }()
	running := make(chan error, 1)
	go func() { running <- d.ca.Run(background) }()
	t.Cleanup(func() { cancel(); <-fetching; <-running })
	certificate, err := serving.New(t.Context(), d.ca, []string{"localhost", "127.0.0.1"}, time.Hour, log)
	must(err)
	renewing := make(chan error, 1)
	go func() { renewing <- certificate.Run(background) }()
	t.Cleanup(func() { cancel(); <-renewing })
	counters := metrics.New(d.registry)
	crowd := gate.New(gate.Options{Calls: o.calls, Patience: o.patience, Work: istio.IsCSR, Streams: sds.IsSDS, Logger: log, Metrics: counters})
	d.gate = crowd
	desk := &reception.Desk{Callers: callers, Metrics: counters, Log: log, Gate: crowd, Waiting: time.Minute}
	streams := sds.NewCallers(sds.CallersOptions{Desk: desk, CA: d.ca, PrivateKeys: o.privateKeys, Timeout: 10 * time.Second})
	ending, stop := context.WithCancel(context.Background())
	d.stop = stop
	d.envoys = sds.New(sds.Options{Opener: streams, Ending: ending, Logger: log, Metrics: counters})
	o.connections.SDS = d.envoys
	looking := make(chan error, 1)
	go func() { looking <- streams.Run(background) }()
	server, _ := istio.NewGRPCServer(&istio.Server{CA: d.ca, Desk: desk,
		Tracer: noop.NewTracerProvider().Tracer(""), Timeout: 10 * time.Second}, certificate.TLS(), o.connections)
	if o.listener == nil {
		o.listener, err = net.Listen("tcp", "127.0.0.1:0")
		must(err)
	}
	d.address = o.listener.Addr().String()
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(crowd.Listener(o.listener)) }()
	t.Cleanup(func() { stop(); server.Stop(); <-ended; cancel(); <-looking })
	return d
}

// tls is what a client needs to know of the door.
func (d *door) tls() *tls.Config {
	return &tls.Config{RootCAs: d.roots, ServerName: "localhost", MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
}

// connect makes a connection of its own, with a client certificate or without.
func (d *door) connect(t testing.TB, certificate *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := d.tls()
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	conn, err := grpc.NewClient(d.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// api connects to the door, with a client certificate or without.
func (d *door) api(t testing.TB, certificate *tls.Certificate) pb.IstioCertificateServiceClient {
	t.Helper()
	return pb.NewIstioCertificateServiceClient(d.connect(t, certificate))
}

var filterIssues = ledger.Filter{Types: []ledger.Type{ledger.TypeIssue}}

// goodClaims are those of a Kubernetes service account token.
func goodClaims() map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": tokenIssuer, "aud": []string{"istio-ca"}, "sub": "system:serviceaccount:ns1:sa1", "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{"namespace": "ns1", "serviceaccount": map[string]string{"name": "sa1", "uid": "u-sa"}, "pod": map[string]string{"name": "p1", "uid": "u-pod"}},
	}
}

// with changes a claim; nil removes it.
func with(claims map[string]any, name string, value any) map[string]any {
	if value == nil {
		delete(claims, name)
	} else {
		claims[name] = value
	}
	return claims
}

func signToken(t testing.TB, key any, algorithm jose.SignatureAlgorithm, kid string, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (d *door) token(t testing.TB) string {
	t.Helper()
	return signToken(t, d.key, jose.RS256, "k1", goodClaims())
}

func bearer(ctx context.Context, tokens ...string) context.Context {
	for _, token := range tokens {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	return ctx
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrFor(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) string {
	t.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
