package crash

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"

	"kedge/test/process"
)

// TestADiskThatHangsHealsByItself: callers are refused when their time is over, readiness tells why, reading goes on, and once the disk answers again so does
// the CA.
func TestADiskThatHangsHealsByItself(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, `
csr: {listen: "127.0.0.1:0", callTimeout: 1s}
operations: {listen: "127.0.0.1:0"}
`+cluster.Configuration(t, k.Dir))
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	watcher := k.Dial(t, nil)

	tracer, err := trace(t, k, "--inject=fdatasync:delay_enter=60000000") // microseconds
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	process.Eventually(t, "callers that are refused", func() error {
		if n := l.refused.Load(); n < workers {
			return fmt.Errorf("%d were", n)
		}
		return nil
	})
	process.Eventually(t, "/readyz to tell of the disk", func() error {
		code, body := k.Get(t, "/readyz")
		if code != http.StatusServiceUnavailable || !strings.Contains(body, "has been under way for") || !strings.Contains(body, "the disk is slow or hangs") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	process.Eventually(t, "gRPC health to say what /readyz says", func() error {
		state, err := watcher.Health(t.Context())
		if err == nil && state != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			err = errors.New(state.String())
		}
		return err
	})
	during := k.Metrics(t)
	if refused, fault := during[`kedge_csr_requests_total{result="unavailable"}`], during["kedge_ledger_fault"]; refused == 0 || fault != 0 {
		t.Errorf("the metrics tell of %v calls that were refused, and kedge_ledger_fault is %v", refused, fault)
	}
	if !strings.Contains(k.Log(), "the disk is slow or hangs") {
		t.Error("the log does not tell of the disk")
	}
	if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, "the disk is slow or hangs") {
		t.Errorf("doctor: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := k.Must(t, "ledger", "list", "--limit", "3"); strings.Count(out, "\n") != 4 {
		t.Errorf("reading the ledger meanwhile:\n%s", out)
	}

	tracer.stop()
	k.Ready(t, process.Patience)
	l.await(t, 50)
	stop()
	if slow := func(m process.Metrics) float64 {
		return m["kedge_ledger_commit_duration_seconds_count"] - m[`kedge_ledger_commit_duration_seconds_bucket{le="1.024"}`]
	}; slow(k.Metrics(t)) == slow(during) {
		t.Error("the metrics do not show a slow commit")
	}
	l.check(t, k)
}
