package crash

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

func TestHealthAndMetricsSayWhatHappens(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	for path, want := range map[string]string{"/healthz": "ok\n", "/readyz": "ready\n"} {
		if code, body := k.Get(t, path); code != http.StatusOK || body != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	caller, key := k.Dial(t, nil), process.NewKey(t)
	process.Eventually(t, "gRPC health", func() error {
		state, err := caller.Health(t.Context())
		if err == nil && state != grpc_health_v1.HealthCheckResponse_SERVING {
			err = status.Error(codes.Unavailable, state.String())
		}
		return err
	})

	before := k.Metrics(t)
	token := cluster.Token(t, "default", "web")
	issued, err := caller.Issue(t.Context(), key.CSR, token, 100*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, refused := range []struct {
		csr, token string
		code       codes.Code
	}{{key.CSR, "nonsense", codes.Unauthenticated}, {key.CSR, "", codes.Unauthenticated}, {"no CSR", token, codes.InvalidArgument}} {
		if _, err := caller.Issue(t.Context(), refused.csr, refused.token, 0); status.Code(err) != refused.code {
			t.Errorf("the answer to %.10q with the token %.10q is %v", refused.csr, refused.token, err)
		}
	}
	after := k.Metrics(t)
	for name, more := range map[string]float64{
		`kedge_csr_requests_total{result="issued"}`:                              1,
		`kedge_csr_requests_total{result="unauthenticated"}`:                     2,
		`kedge_csr_requests_total{result="bad-csr"}`:                             1,
		`kedge_csr_duration_seconds_count`:                                       4,
		`kedge_certificates_issued_total{method="kubernetes",profile="default"}`: 1,
		`kedge_ttl_clamped_total`:                                                1,
		`kedge_ledger_number`:                                                    1,
		`kedge_live_certificates`:                                                1,
		`kedge_ledger_fault`:                                                     0,
		`kedge_ledger_commit_failures_total`:                                     0,
		`kedge_problems`:                                                         0,
		`citadel_server_csr_count`:                                               4,
		`citadel_server_success_cert_issuance_count`:                             1,
		`citadel_server_authentication_failure_count`:                            2,
		`citadel_server_csr_parsing_err_count`:                                   1,
	} {
		if got := after[name] - before[name]; got != more {
			t.Errorf("%s rose by %v, not %v", name, got, more)
		}
	}
	if got, want := after["citadel_server_cert_chain_expiry_timestamp"], float64(issued.Chain[0].NotAfter.Unix()); got != want {
		t.Errorf("citadel_server_cert_chain_expiry_timestamp is %v, not %v", got, want)
	}
	if after["citadel_server_root_cert_expiry_timestamp"] <= after["citadel_server_cert_chain_expiry_timestamp"] {
		t.Error("the root expires before the issuing CA, the metrics say")
	}
	if after["kedge_bundle_sequence"] != 1 {
		t.Errorf("kedge_bundle_sequence is %v", after["kedge_bundle_sequence"])
	}

	// Every metric that the guides name is there. A labelled one appears with its first event, and no signature has failed here, and nothing is wrong.
	page := process.Read(t, "../../docs/operations.md") + process.Read(t, "../../docs/sds.md")
	names := regexp.MustCompile(`\b(kedge_[a-z_]+|citadel_server_[a-z_]+[a-z])`).FindAllString(page, -1)
	if len(names) < 20 {
		t.Fatalf("the guide names only %d metrics: are they still found?", len(names))
	}
	for _, name := range names {
		if !after.Family(name) && name != "citadel_server_csr_sign_err_count" && name != "kedge_problem" {
			t.Errorf("a guide names %s, and /metrics does not have it", name)
		}
	}
	if _, err := caller.Issue(t.Context(), key.CSR, token, time.Second); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a second of lifetime: %v", err)
	}
	if final := k.Metrics(t); !final.Family("citadel_server_csr_sign_err_count") {
		t.Error("citadel_server_csr_sign_err_count is not there after a call that could not be signed")
	}
}

// receiver is an OTLP receiver.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	spans chan *tracepb.Span
}

func (r *receiver) Export(_ context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, resource := range request.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				r.spans <- span
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestEachCallIsATrace(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{spans: make(chan *tracepb.Span, 100)}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, r)
	go func() { _ = server.Serve(listener) }() // until Stop
	t.Cleanup(server.Stop)

	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "tracing: {endpoint: "+listener.Addr().String()+", insecure: true, sampleRatio: 1}\n")
	k.Env = []string{"OTEL_BSP_SCHEDULE_DELAY=50"} // milliseconds
	k.Start(t)
	if _, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Fatal(err)
	}
	var call, issue *tracepb.Span
	for deadline := time.After(process.Patience); call == nil || issue == nil; {
		select {
		case span := <-r.spans:
			switch span.Name {
			case "istio.v1.auth.IstioCertificateService/CreateCertificate":
				call = span
			case "issue":
				issue = span
			}
		case <-deadline:
			t.Fatalf("no trace of the call came: %v, %v", call, issue)
		}
	}
	if !slices.Equal(issue.ParentSpanId, call.SpanId) || !slices.Equal(issue.TraceId, call.TraceId) {
		t.Error("the span of issuing is not the child of the call's")
	}
}

// TestAReceiverOfTracesThatIsAwayHoldsNothingUp, neither a start, nor a call, nor a stop.
func TestAReceiverOfTracesThatIsAwayHoldsNothingUp(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // it accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "tracing: {endpoint: "+listener.Addr().String()+", insecure: true, sampleRatio: 1}\n")
	k.Start(t)
	if _, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Fatal(err)
	}
	k.Stop(t)
	if !strings.Contains(k.Log(), "the last traces were not sent") {
		t.Errorf("the log does not say that traces were lost:\n%s", k.Log())
	}
}

// TestATokenIssuerThatIsAway: its tokens are checked with the keys that were fetched last, also after a restart.
func TestATokenIssuerThatIsAway(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(cluster.JWKS)) })}
	go func() { _ = server.Serve(listener) }() // until Close
	t.Cleanup(func() { _ = server.Close() })

	never, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := never.Close(); err != nil {
		t.Fatal(err)
	}
	other := process.NewCluster(t)
	other.Issuer = "https://other.example"
	k := process.New(t, process.Ports+`
callers:
  tokenIssuers:
    - {name: cluster-1, kind: kubernetes, issuer: "`+cluster.Issuer+`", jwksURL: "http://`+listener.Addr().String()+`/keys"}
    - {name: never-there, kind: kubernetes, issuer: "`+other.Issuer+`", jwksURL: "http://`+never.Addr().String()+`/keys"}
`)
	k.Start(t)
	key := process.NewKey(t)
	if _, err := k.Dial(t, nil).Issue(t.Context(), key.CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	k.Stop(t)
	k.Start(t)
	caller := k.Dial(t, nil)
	if _, err := caller.Issue(t.Context(), key.CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Errorf("with the keys of before: %v", err)
	}
	if _, err := caller.Issue(t.Context(), key.CSR, other.Token(t, "default", "web"), 0); status.Code(err) != codes.Unavailable {
		t.Errorf("of an issuer that was never there: %v", err)
	}
	process.Eventually(t, "the problem to be told", func() error {
		code, body := k.Get(t, "/readyz")
		for _, name := range []string{"cluster-1", "never-there"} {
			if code != http.StatusOK || !regexp.MustCompile(`(?m)^problem: .*`+name).MatchString(body) {
				return status.Errorf(codes.NotFound, "%s: %d %s", name, code, body)
			}
		}
		return nil
	})
	if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, "cluster-1") || !strings.Contains(r.Stdout, "never-there") {
		t.Errorf("doctor: %d %s", r.Code, r.Stdout)
	}
	metrics := k.Metrics(t)
	if got := metrics["kedge_problems"]; got < 2 {
		t.Errorf("kedge_problems is %v", got)
	}
	if got := metrics[`kedge_problem{about="token issuer",file="",reason=""}`]; got != 1 { // of two issuers: Prometheus takes no sample twice
		t.Errorf("kedge_problem of token issuers is %v", got)
	}
}

// TestNothingInTheDataFolderIsForOthers, whatever the umask.
func TestNothingInTheDataFolderIsForOthers(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Through = []string{"sh", "-c", `umask 0; exec "$@"`, "sh"}
	k.Start(t)
	if _, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Fatal(err)
	}
	var files int
	err := filepath.WalkDir(k.Data, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[entry.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s has the mode %#o", path, info.Mode().Perm())
		}
		files++
		return nil
	})
	if err != nil || files < 8 {
		t.Errorf("%d files, %v", files, err)
	}
}
