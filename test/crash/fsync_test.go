package crash

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"

	"kedge/test/process"
)

// tracer is an strace that is attached to a CA.
type tracer struct{ stop func() }

// trace attaches strace to the running CA, and returns once it is attached. stop detaches it. All that it says is about faults that were asked for.
func trace(t *testing.T, k *process.Kedge, flags ...string) (*tracer, error) {
	t.Helper()
	command := exec.Command("strace", append([]string{"--follow-forks", "--output=/dev/null", "--attach=" + strconv.Itoa(k.PID()), "--trace=fdatasync"}, flags...)...)
	stderr, err := command.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	stop := sync.OnceFunc(func() {
		_ = command.Process.Signal(syscall.SIGINT) // it detaches; or it has ended with what it traced
		_ = command.Wait()
	})
	t.Cleanup(stop)
	lines := bufio.NewReader(stderr)
	first, err := lines.ReadString('\n')
	if err != nil || !strings.Contains(first, "attached") {
		rest, _ := io.ReadAll(lines) // best effort: it is for the error's text
		stop()
		return nil, fmt.Errorf("strace: %s%s (%w)", first, rest, errors.Join(err, errors.ErrUnsupported))
	}
	go func() { _, _ = io.Copy(io.Discard, lines) }() // ends with strace
	return &tracer{stop}, nil
}

// TestAFailedFsyncHealsByItself: those in the commit are refused, everything that was acknowledged is in the ledger, and the CA goes on.
func TestAFailedFsyncHealsByItself(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 100)

	watcher := k.Dial(t, nil)
	tracer, err := trace(t, k, "--inject=fdatasync:error=EIO")
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	process.Eventually(t, "a commit that fails", func() error {
		if k.Metrics(t)["kedge_ledger_commit_failures_total"] == 0 || l.refused.Load() == 0 {
			return errors.New("none has failed, or nobody was refused")
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
	if code, body := k.Get(t, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "input/output error") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if out := k.Must(t, "ledger", "list", "--limit", "3"); strings.Count(out, "\n") != 4 {
		t.Errorf("reading the ledger meanwhile:\n%s", out)
	}
	tracer.stop()
	k.Ready(t, process.Patience)
	l.await(t, 100)
	stop()
	if fault := k.Metrics(t)["kedge_ledger_fault"]; fault != 0 {
		t.Errorf("kedge_ledger_fault is %v after all is well", fault)
	}
	if log := k.Log(); !strings.Contains(log, "the ledger is faulted") || !strings.Contains(log, "the ledger is verified and can be written again") {
		t.Error("the log does not tell of the fault and its end")
	}
	l.check(t, k)
	k.Stop(t)
	k.Start(t)
	l.check(t, k)
	if code, body := k.Get(t, "/readyz"); code != http.StatusOK || body != "ready\n" {
		t.Errorf("/readyz: %d %s", code, body)
	}
}
