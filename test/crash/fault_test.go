package crash

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"

	"kedge/test/process"
)

// TestAnIssuingCAThatIsNearlyOverIssuesNothing rather than ever shorter certificates, and a renewal ends that.
func TestAnIssuingCAThatIsNearlyOverIssuesNothing(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, strings.ReplaceAll(shortLives, "minTTL: 1s", "minTTL: 4s")+cluster.Configuration(t, k.Dir))
	k.Start(t)
	caller, key, token := k.Dial(t, nil), process.NewKey(t), cluster.Token(t, "default", "web")
	issue := func() error {
		issued, err := caller.Issue(t.Context(), key.CSR, token, 0)
		if err == nil {
			err = issued.VerifyAt(issued.Leaf.NotAfter)
		}
		return err
	}
	if err := issue(); err != nil {
		t.Fatal(err)
	}
	rootKey := filepath.Join(k.Data, "root", "root-key.pem")
	if err := os.Rename(rootKey, rootKey+".away"); err != nil {
		t.Fatal(err)
	}
	process.Eventually(t, "the issuing CA to be nearly over", func() error {
		switch err := issue(); {
		case err == nil:
			return errors.New("it still issues")
		case status.Code(err) != codes.Unavailable:
			t.Fatalf("a caller is told: %v", err)
		}
		return nil
	})
	if log := k.Log(); !regexp.MustCompile(`"result":"unavailable","reason":"the issuing CA \w+ ends at \S+: the \S+ that are left are less than the minimum of 4s"`).MatchString(log) {
		t.Errorf("the log does not say why:\n%s", log)
	}
	process.Eventually(t, "/readyz to say so", func() error {
		code, body := k.Get(t, "/readyz")
		if code != http.StatusServiceUnavailable || !strings.Contains(body, "that are left are less than the minimum of 4s") || !strings.Contains(body, "has lost its key") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, "has lost its key") {
		t.Errorf("doctor: %d %s", r.Code, r.Stdout)
	}
	if err := os.Rename(rootKey+".away", rootKey); err != nil {
		t.Fatal(err)
	}
	process.Eventually(t, "a certificate under a new issuing CA", func() error {
		caller = k.Dial(t, nil) // the serving certificate was over too
		return issue()
	})
	k.Ready(t, process.Patience)
}

// TestAFreshTokenBearsTheClockOut: what a clock that ran ahead holds up goes on with the first token of a token issuer.
func TestAFreshTokenBearsTheClockOut(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	k.Stop(t)
	process.Write(t, filepath.Join(k.Data, "clock.json"), `{"boot": "another", "elapsed_ns": 1, "guarded": "2020-01-01T00:00:00Z"}`)
	k.Start(t)
	if code, body := k.Get(t, "/readyz"); code != http.StatusOK || !regexp.MustCompile(`(?m)^problem: clock: this machine's clock says .* but only 2020-`).MatchString(body) {
		t.Errorf("/readyz: %d %s", code, body)
	}
	caller, key := k.Dial(t, nil), process.NewKey(t)
	if _, err := caller.Issue(t.Context(), key.CSR, cluster.Token(t, "default", "web"), 0); err != nil {
		t.Fatal(err)
	}
	if code, body := k.Get(t, "/readyz"); code != http.StatusOK || body != "ready\n" {
		t.Errorf("/readyz after a fresh token: %d %s", code, body)
	}
}

// begin begins a call whose request is still to come.
func begin(t *testing.T, caller *process.Caller, token string) grpc.ClientStream {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+token)
	stream, err := caller.Conn.NewStream(ctx, &grpc.StreamDesc{}, pb.IstioCertificateService_CreateCertificate_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := caller.Health(t.Context()); err != nil { // the server reads a connection in order: it has taken up the call before this one
		t.Fatal(err)
	}
	return stream
}

// TestWhileItStopsItIsNotReadyAndWhatIsUnderWayIsAnswered: the disk is slowed down, so that a call is surely under way. One that is half sent is given up.
func TestWhileItStopsItIsNotReadyAndWhatIsUnderWayIsAnswered(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	ops, token := k.Status(t).OpsAddress, cluster.Token(t, "default", "web")
	half, stranger := begin(t, k.Dial(t, nil), token), k.Dial(t, nil)
	tracer, err := trace(t, k, "--inject=fdatasync:delay_enter=3000000") // microseconds
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	left, answered, key := make(chan struct{}, 2), make(chan error, 1), process.NewKey(t)
	caller := k.Dial(t, nil, grpc.WithStatsHandler(sent{left}))
	go func() {
		_, err := caller.Issue(context.Background(), key.CSR, token, 0)
		answered <- err
	}()
	<-left
	if _, err := caller.Health(t.Context()); err != nil { // the server reads a connection in order: it has taken up the call before this one
		t.Fatal(err)
	}
	k.Terminate(t)
	process.Eventually(t, "/readyz to say that it stops", func() error {
		code, body, err := process.Fetch("http://" + ops + "/readyz")
		if err == nil && (code != http.StatusServiceUnavailable || !strings.HasPrefix(body, "not ready: stopping\n")) {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	if _, err := stranger.Issue(t.Context(), key.CSR, token, 0); status.Code(err) != codes.Unavailable {
		t.Errorf("who comes now is told: %v", err)
	}
	if err := half.RecvMsg(&pb.IstioCertificateResponse{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a call whose request never came: %v", err)
	}
	if err := <-answered; err != nil {
		t.Errorf("a call that was under way: %v", err)
	}
	tracer.stop()
	if code := k.Wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if strings.Contains(k.Log(), "cut off") {
		t.Errorf("something was cut off:\n%s", k.Log())
	}
}

// TestACallThatTakesTooLongIsCutOffWhenItStops.
func TestACallThatTakesTooLongIsCutOffWhenItStops(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	process.Write(t, k.Config, strings.Replace(process.Read(t, k.Config), "csr: {", "csr: {callTimeout: 5m, maxConnectionAgeGrace: 10m, ", 1))
	k.Start(t)
	tracer, err := trace(t, k, "--inject=fdatasync:delay_enter=300000000") // microseconds: longer than anybody waits
	if err != nil {
		process.Impossible(t, "strace cannot attach", err)
		return
	}
	left, answered := make(chan struct{}, 2), make(chan error, 1)
	caller := k.Dial(t, nil, grpc.WithStatsHandler(sent{left}))
	key, token := process.NewKey(t), cluster.Token(t, "default", "web")
	go func() {
		_, err := caller.Issue(context.Background(), key.CSR, token, 0)
		answered <- err
	}()
	<-left
	if _, err := caller.Health(t.Context()); err != nil { // it has been taken up
		t.Fatal(err)
	}
	k.Terminate(t)
	if err := <-answered; status.Code(err) != codes.Unavailable {
		t.Errorf("the call that took too long: %v", err)
	}
	if !strings.Contains(k.Log(), "calls were cut off, since they took too long") {
		t.Errorf("the log does not say that a call was cut off:\n%s", k.Log())
	}
	tracer.stop()
	if code := k.Wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
