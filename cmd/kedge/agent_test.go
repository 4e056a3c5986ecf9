package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
	"kedge/test/machine"
	"kedge/test/process"
)

// shortLived is a CA whose SVIDs live for some seconds.
const shortLived = process.Ports + "profiles: {default: {minTTL: 1s, defaultTTL: 8s, maxTTL: 1h, backdate: 0s}}\n"

// beside is an agent under test.
type beside struct {
	dir   string // for its files
	front *front
	root  string // file
}

// newBeside starts nothing yet: the agent will find the CA behind a front, which hangs up until led.
func newBeside(t *testing.T, k *process.Kedge) *beside {
	t.Helper()
	b := &beside{dir: shortTempDir(t), front: newFront(t)}
	b.root = filepath.Join(b.dir, "root.pem")
	process.Write(t, b.root, process.Read(t, k.Status(t).RootFile))
	return b
}

// shortTempDir is a folder in which sockets can be: their paths are short.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ka")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// token writes a token that the CA made, and names its file.
func (b *beside) token(t *testing.T, k *process.Kedge, identity string) string {
	t.Helper()
	path := filepath.Join(b.dir, strings.ReplaceAll(identity, "/", "-"))
	process.Write(t, path, k.Must(t, "token", "create", "--reusable", "--ttl", "1h", "--identity", identity))
	return path
}

func (b *beside) socket(name string) string { return filepath.Join(b.dir, name) }

// source is an X509Source of go-spiffe's at a socket of the agent.
func (b *beside) source(t *testing.T, name string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), process.Patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+b.socket(name))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() }) // a second time when the test closed it
	return source
}

// launch runs an agent with a configuration.
func (b *beside) launch(t *testing.T, yaml string) *verb {
	t.Helper()
	path := filepath.Join(b.dir, "agent.yaml")
	process.Write(t, path, yaml)
	return launch(t, nil, "agent", "--config", path)
}

// issues are the certificates that the ledger has for an identity.
func issues(t *testing.T, k *process.Kedge, identity string) (all []*ledger.Issue) {
	t.Helper()
	for _, event := range k.Export(t) {
		if event.Issue != nil && event.Issue.SPIFFEID == "spiffe://cluster.local/"+identity {
			all = append(all, event.Issue)
		}
	}
	return all
}

// TestX509SourcesSpeakThroughRenewalsAndRestarts: two programs with go-spiffe's X509Source, each at a socket of its own with an identity of its own, speak mTLS
// with a new connection for each request, while SVIDs of seconds are renewed, the CA restarts, and the agent is killed and comes back. None fails.
func TestX509SourcesSpeakThroughRenewalsAndRestarts(t *testing.T) {
	t.Parallel()
	k := process.New(t, shortLived)
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	yaml := fmt.Sprintf(`
server: %s
rootFile: root.pem
workloads:
- {name: client, tokenFile: %s, sockets: [{path: client.sock}]}
- {name: server, tokenFile: %s, sockets: [{path: server.sock}]}
`, b.front.address, b.token(t, k, "ns/default/sa/client"), b.token(t, k, "ns/default/sa/server"))
	agent := b.launch(t, yaml)
	agent.awaitLog(t, `"socket":"`+b.socket("server.sock"))
	client, server := b.source(t, "client.sock"), b.source(t, "server.sock")
	wire := newEcho(t, client, server)

	renewed := func(since int) { // more SVIDs come, and requests go on meanwhile
		t.Helper()
		for len(issues(t, k, "ns/default/sa/client")) < since+2 {
			wire.request(t)
		}
	}
	renewed(1)
	serial := func() string {
		svid, err := client.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return svid.Certificates[0].SerialNumber.String()
	}
	before := serial()
	for serial() == before {
		wire.request(t)
	}
	k.Stop(t)
	b.front.lead("")
	wire.request(t)
	k.Start(t)
	b.front.lead(k.Status(t).CSRAddress)
	renewed(len(issues(t, k, "ns/default/sa/client")))

	agent.kill()
	wire.request(t)
	agent = b.launch(t, yaml) // in the place of the sockets that are left
	agent.awaitLog(t, `"socket":"`+b.socket("server.sock"))
	before = serial()
	for serial() == before {
		wire.request(t)
	}
	agent.signal(t, syscall.SIGTERM)
	agent.wait(t, 0)
	wire.request(t)
	b.launch(t, yaml)
	before = serial()
	for serial() == before {
		wire.request(t)
	}
	if wire.requests < 20 {
		t.Errorf("there were only %d requests", wire.requests)
	}
}

// echo is a server and a client that speak mTLS.
type echo struct {
	listener net.Listener
	client   *tls.Config
	requests int
}

func newEcho(t *testing.T, client, server *workloadapi.X509Source) *echo {
	t.Helper()
	id := func(name string) spiffeid.ID {
		return spiffeid.RequireFromString("spiffe://cluster.local/ns/default/sa/" + name)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(id("client"))))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return // it is closed
			}
			_, _ = io.Copy(conn, conn) // the client sees what comes of it
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
	})
	return &echo{listener: l, client: tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(id("server")))}
}

// request must succeed.
func (e *echo) request(t *testing.T) {
	t.Helper()
	e.requests++
	conn, err := tls.Dial("tcp", e.listener.Addr().String(), e.client.Clone())
	if err != nil {
		t.Fatalf("request %d: %v", e.requests, err)
	}
	defer conn.Close()
	answer := make([]byte, 5)
	if _, err = conn.Write([]byte("hello")); err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if string(answer) != "hello" {
		t.Fatalf("request %d: the answer is %q, %v", e.requests, answer, err)
	}
}

// TestTwoIdentitiesOnTwoSocketsDoNotMix, and nobody else gets in.
func TestTwoIdentitiesOnTwoSocketsDoNotMix(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	agent := b.launch(t, fmt.Sprintf(`
server: %s
rootFile: root.pem
operations: {listen: "127.0.0.1:0"}
workloads:
- {name: one, tokenFile: %s, sockets: [{path: one.sock}, {path: again/one.sock}], files: {dir: one}}
- {name: two, tokenFile: %s, sockets: [{path: two.sock}], files: {dir: two}}
`, b.front.address, b.token(t, k, "ns/default/sa/one"), b.token(t, k, "ns/default/sa/two")))
	agent.awaitLog(t, `"address":"`)
	for socket, want := range map[string]string{"one.sock": "one", "again/one.sock": "one", "two.sock": "two"} {
		svid, err := b.source(t, socket).GetX509SVID()
		if err != nil || svid.ID.Path() != "/ns/default/sa/"+want {
			t.Errorf("%s: %v %v", socket, svid, err)
		}
	}
	process.Eventually(t, "the files", func() error {
		_, err := os.Stat(filepath.Join(b.dir, "two", "key.pem"))
		return err
	})
	for _, dir := range []string{"one", "two"} {
		if svid, err := x509svid.Load(filepath.Join(b.dir, dir, istio.ChainFile), filepath.Join(b.dir, dir, istio.KeyFile)); err != nil || svid.ID.Path() != "/ns/default/sa/"+dir {
			t.Errorf("the files of %s: %v %v", dir, svid, err)
		}
	}
	if n := len(issues(t, k, "ns/default/sa/one")); n != 1 {
		t.Errorf("for two sockets and files there are %d certificates", n)
	}
	said := process.Read(t, agent.log)
	if !strings.Contains(said, fmt.Sprintf("uid %d", os.Getuid())) || !strings.Contains(said, fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("the log does not say who connected:\n%s", said)
	}
	_, address, _ := strings.Cut(said, `"address":"`)
	address, _, _ = strings.Cut(address, `"`)
	get := func(path string) string {
		_, body, err := process.Fetch("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	metrics := get("/metrics")
	for _, want := range []string{`kedge_agent_svids_issued_total{workload="one"} 1`, `kedge_agent_bundle_sequence{workload="two"} 1`, `kedge_agent_connections{socket="` + b.socket("two.sock") + `",workload="two"}`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s:\n%s", want, metrics)
		}
	}
	if ready := get("/readyz"); ready != "ready\n" {
		t.Errorf("it says %q", ready)
	}
	second := launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", b.token(t, k, "ns/default/sa/thief"), "--socket", b.socket("two.sock"))
	if said := second.wait(t, 1); !strings.Contains(said, "is served by another process") {
		t.Errorf("a second agent on the socket says %s", said)
	}
}

// TestTheSocketsAreUpBeforeTheCAIs: a workload is told to come back, by the codes that the SPIFFE specification names, and has its SVID once the CA is there.
func TestTheSocketsAreUpBeforeTheCAIs(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	b := newBeside(t, k)
	token := b.token(t, k, "ns/default/sa/web")
	good := process.Read(t, token)
	process.Write(t, token, "nonsense")
	agent := launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", token, "--socket", b.socket("s"))
	agent.awaitLog(t, `"socket":"`+b.socket("s"))
	api := dialWorkload(t, b.socket("s"))
	with := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	first := func(ctx context.Context) error {
		stream, err := api.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	for header, want := range map[string]codes.Code{"": codes.InvalidArgument, "false": codes.InvalidArgument, "TRUE": codes.InvalidArgument, "true": codes.Unavailable} {
		ctx := t.Context()
		if header != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", header)
		}
		if err := first(ctx); status.Code(err) != want {
			t.Errorf("the header %q: %v", header, err)
		}
	}
	if _, err := api.FetchJWTSVID(with, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}}); status.Code(err) != codes.Unimplemented {
		t.Errorf("FetchJWTSVID: %v", err)
	}
	if _, err := api.ValidateJWTSVID(t.Context(), &workloadpb.ValidateJWTSVIDRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID without the header: %v", err)
	}
	bundles, err := api.FetchJWTBundles(with, &workloadpb.JWTBundlesRequest{})
	if err == nil {
		_, err = bundles.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("FetchJWTBundles: %v", err)
	}
	b.front.lead(k.Status(t).CSRAddress)
	process.Eventually(t, "the refusal", func() error {
		if err := first(with); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("it is %w", err)
		}
		return nil
	})
	process.Write(t, token, good)
	svid, err := b.source(t, "s").GetX509SVID()
	if err != nil || svid.ID.Path() != "/ns/default/sa/web" {
		t.Errorf("%v %v", svid, err)
	}
	x509Bundles, err := api.FetchX509Bundles(with, &workloadpb.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if message, err := x509Bundles.Recv(); err != nil || len(message.GetBundles()["spiffe://cluster.local"]) == 0 {
		t.Errorf("the bundles are %v, %v", message, err)
	}
}

func dialWorkload(t *testing.T, socket string) workloadpb.SpiffeWorkloadAPIClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return workloadpb.NewSpiffeWorkloadAPIClient(conn)
}

// TestAnAgentThatRestartsWithStateHasNothingIssuedAnew: the ledger has one certificate, however often the agent is killed.
func TestAnAgentThatRestartsWithStateHasNothingIssuedAnew(t *testing.T) {
	t.Parallel()
	memory, err := os.MkdirTemp("/dev/shm", "kedge-agent-test-")
	if err != nil {
		machine.Impossible(t, "there is no tmpfs at /dev/shm", err)
		return
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(memory); err != nil {
			t.Error(err)
		}
	})
	k := process.New(t, "")
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	token := filepath.Join(b.dir, "token")
	process.Write(t, token, k.Must(t, "token", "create", "--identity", "ns/default/sa/web")) // which serves once
	serials := map[string]bool{}
	for range 3 {
		agent := launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", token, "--socket", b.socket("s"), "--state", filepath.Join(memory, "state"))
		agent.awaitLog(t, `"socket":"`+b.socket("s"))
		svid, err := b.source(t, "s").GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		serials[svid.Certificates[0].SerialNumber.String()] = true
		agent.kill()
	}
	if n := len(issues(t, k, "ns/default/sa/web")); n != 1 || len(serials) != 1 {
		t.Errorf("the ledger has %d certificates, and there were %d", n, len(serials))
	}
	// A folder on a disk is no place for keys.
	agent := launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", token, "--socket", b.socket("t"), "--state", "/etc/kedge-agent-state")
	if said := agent.wait(t, 1); !strings.Contains(said, "the state folder /etc/kedge-agent-state is not in memory") {
		t.Errorf("it says %s", said)
	}
	if _, err := os.Stat("/etc/kedge-agent-state"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
}

// TestATokenThatTheKubeletReplacesIsShown: the volume's ..data is exchanged, and the next renewal is on the word of the new token.
func TestATokenThatTheKubeletReplacesIsShown(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, shortLived+cluster.Configuration(t, k.Dir))
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	volume := filepath.Join(b.dir, "volume")
	if err := os.Mkdir(volume, 0o700); err != nil {
		t.Fatal(err)
	}
	process.Mount(t, volume, map[string]string{"token": cluster.Token(t, "default", "web")})
	launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", filepath.Join(volume, "token"), "--socket", b.socket("s"))
	b.source(t, "s")
	shown := func() (n int) {
		for _, issue := range issues(t, k, "ns/default/sa/web") {
			if slices.ContainsFunc(issue.Proofs, func(p ledger.Proof) bool { return p.Method == ca.MethodKubernetes }) {
				n++
			}
		}
		return n
	}
	process.Eventually(t, "renewals by the SVID alone", func() error {
		if n := shown(); n != 1 {
			t.Fatalf("the token was shown %d times", n)
		}
		if n := len(issues(t, k, "ns/default/sa/web")); n < 3 {
			return fmt.Errorf("there are %d certificates", n)
		}
		return nil
	})
	process.Mount(t, volume, map[string]string{"token": cluster.Token(t, "default", "web") + "\n"})
	process.Eventually(t, "a renewal by the new token", func() error {
		if n := shown(); n < 2 {
			return fmt.Errorf("tokens were shown %d times", n)
		}
		return nil
	})
}

// envoy is a stream to the SDS of an agent, as an Envoy has one for its trust bundle. It acknowledges when it is told to.
type envoy struct {
	stream secret.SecretDiscoveryService_DeltaSecretsClient
	latest *discovery.DeltaDiscoveryResponse
}

func (b *beside) envoy(t *testing.T, socket string, names ...string) *envoy {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+b.socket(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := secret.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: sds.SecretType, ResourceNamesSubscribe: names}); err != nil {
		t.Fatal(err)
	}
	return &envoy{stream: stream}
}

// next waits for the next response, and returns its secrets by their names.
func (e *envoy) next(t *testing.T) map[string]*envoytls.Secret {
	t.Helper()
	response, err := e.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	e.latest = response
	all := map[string]*envoytls.Secret{}
	for _, resource := range response.Resources {
		all[resource.Name] = new(envoytls.Secret)
		if err := resource.Resource.UnmarshalTo(all[resource.Name]); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// take acknowledges the latest response.
func (e *envoy) take(t *testing.T) {
	t.Helper()
	if err := e.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: sds.SecretType, ResponseNonce: e.latest.Nonce}); err != nil {
		t.Fatal(err)
	}
}

// TestTheLedgerKnowsWhichTrustBundleTheConsumersOfAnAgentHave: the CA learns that the SVID has arrived at once, and of a trust bundle only when the last consumer has it.
func TestTheLedgerKnowsWhichTrustBundleTheConsumersOfAnAgentHave(t *testing.T) {
	t.Parallel()
	k := process.New(t, process.Ports+"root: {anchorsFile: anchors.pem}\n")
	anchors := filepath.Join(k.Dir, "anchors.pem")
	root, _ := newRoot(t, "of before")
	process.Write(t, anchors, inPEM(root.Raw))
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	agent := b.launch(t, fmt.Sprintf(`
server: %s
rootFile: root.pem
consumerGrace: 0s
workloads: [{tokenFile: %s, sockets: [{path: s}], files: {dir: svid, rereadAfter: 0s}}]
`, b.front.address, b.token(t, k, "ns/default/sa/web")))
	agent.awaitLog(t, "an SVID was issued")
	issued := issues(t, k, "ns/default/sa/web")
	if len(issued) != 1 || issued[0].Delivery != ledger.DeliverySDS || issued[0].Held != 0 {
		t.Fatalf("the ledger has %+v", issued)
	}
	// confirmed is the newest bundle that the ledger knows of the SVID's holder, and whether it knows of the SVID.
	confirmed := func() (bundle uint64, any bool) {
		for _, event := range k.Export(t) {
			if c := event.Confirm; c != nil && string(c.Serial) == string(issued[0].Serial) {
				bundle, any = max(bundle, c.Bundle), true
			}
		}
		return bundle, any
	}
	await := func(bundle uint64) {
		t.Helper()
		process.Eventually(t, fmt.Sprintf("the ledger to know of bundle %d", bundle), func() error {
			if got, any := confirmed(); !any || got != bundle {
				return fmt.Errorf("it knows of %d, and of the SVID: %t", got, any)
			}
			return nil
		})
	}
	now := k.Status(t).Bundle
	await(now) // nobody but the files

	proxy, source := b.envoy(t, "s", sds.NameSVID, sds.NameBundle), b.source(t, "s")
	secrets := proxy.next(t)
	if len(secrets) != 2 || len(secrets[sds.NameSVID].GetTlsCertificate().GetPrivateKey().GetInlineBytes()) == 0 {
		t.Errorf("the first response has %v", secrets)
	}
	proxy.take(t)
	next, _ := newRoot(t, "to come")
	process.Write(t, anchors, inPEM(root.Raw)+inPEM(next.Raw))
	secrets = proxy.next(t)
	if text := string(secrets[sds.NameBundle].GetValidationContext().GetTrustedCa().GetInlineBytes()); !strings.Contains(text, inPEM(next.Raw)) {
		t.Errorf("the next response has %s", text)
	}
	process.Eventually(t, "the X509Source to have the new root", func() error {
		bundle, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("cluster.local"))
		if err == nil && !bundle.HasX509Authority(next) {
			err = errors.New("it has not")
		}
		return err
	})
	process.Eventually(t, "the files to have the new root", func() error {
		if text := process.Read(t, filepath.Join(b.dir, "svid", istio.RootFile)); !strings.Contains(text, inPEM(next.Raw)) {
			return errors.New("they have not")
		}
		return nil
	})
	if got, _ := confirmed(); got != now {
		t.Errorf("a consumer has not acknowledged the trust bundle, and the ledger knows of bundle %d", got)
	}
	proxy.take(t)
	await(now + 1)
	if n := len(issues(t, k, "ns/default/sa/web")); n != 1 {
		t.Errorf("a new trust bundle made %d SVIDs", n)
	}
	if n := strings.Count(process.Read(t, agent.log), "the CA has a new trust bundle"); n != 1 {
		t.Errorf("there was one new trust bundle, and %d were taken: what comes with the SVID has the same number as what comes on the stream", n)
	}
	k.Stop(t)
	if strings.Contains(k.Log(), "refused") {
		t.Errorf("something was refused:\n%s", k.Log())
	}
}

// TestARenewalLosesNothingOfWhatTheLedgerKnowsOfAnAgent: the next SVID begins under the trust bundle that was acknowledged for the one before, and retires it.
func TestARenewalLosesNothingOfWhatTheLedgerKnowsOfAnAgent(t *testing.T) {
	t.Parallel()
	k := process.New(t, shortLived)
	k.Start(t)
	b := newBeside(t, k)
	b.front.lead(k.Status(t).CSRAddress)
	b.launch(t, fmt.Sprintf("server: %s\nrootFile: root.pem\nconsumerGrace: 0s\nworkloads: [{tokenFile: %s, sockets: [{path: s}]}]\n",
		b.front.address, b.token(t, k, "ns/default/sa/web")))
	process.Eventually(t, "an SVID that retires one", func() error {
		issued := map[uint64]*ledger.Issue{}
		for _, event := range k.Export(t) {
			if event.Issue != nil && event.Issue.SPIFFEID == "spiffe://cluster.local/ns/default/sa/web" {
				issued[event.Number] = event.Issue
			}
			if c := event.Confirm; c != nil && c.Retires != 0 && issued[c.Number].Held == 1 && issued[c.Number].Replaces == c.Retires {
				return nil
			}
		}
		return fmt.Errorf("there is none among %d", len(issued))
	})
}

// TestAnEnvoyWaitsAtTheSocketForItsSecrets: the stream is open before the CA is there.
func TestAnEnvoyWaitsAtTheSocketForItsSecrets(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	b := newBeside(t, k)
	agent := launch(t, nil, "agent", "--server", b.front.address, "--root", b.root, "--token-file", b.token(t, k, "ns/default/sa/web"), "--socket", b.socket("s"))
	agent.awaitLog(t, `"socket":"`+b.socket("s"))
	proxy := b.envoy(t, "s", "spiffe://cluster.local/ns/default/sa/web", "spiffe://cluster.local")
	agent.awaitLog(t, "there is no good new SVID")
	b.front.lead(k.Status(t).CSRAddress)
	for got := 0; got < 2; proxy.take(t) {
		got += len(proxy.next(t))
	}
}
