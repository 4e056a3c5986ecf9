package ops_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/ca"
	"kedge/issuer/ops"
)

// desk is the operations port over a CA that is as ready as a test says. The tests run in bubbles of synctest, where seconds pass at once.
type desk struct {
	*http.Server
	*ops.Readiness
	problems []ca.Problem
	outcome  atomic.Pointer[error] // of the next probes
	probes   atomic.Int64
}

func newDesk() *desk {
	d := &desk{}
	d.Readiness = &ops.Readiness{Probe: func(context.Context) error {
		d.probes.Add(1)
		if err := d.outcome.Load(); err != nil {
			return *err
		}
		return nil
	}}
	d.Server = ops.NewServer(d.Readiness, func() []ca.Problem { return d.problems }, prometheus.NewRegistry())
	return d
}

func (d *desk) fail(err error) { d.outcome.Store(&err) }

func (d *desk) get(path string) (code int, body string) {
	answer := httptest.NewRecorder()
	d.Handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, path, nil))
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err.Error()
	}
	return answer.Code, string(text)
}

// says makes sure of an answer.
func (d *desk) says(t *testing.T, path string, code int, body string) {
	t.Helper()
	if gotCode, gotBody := d.get(path); gotCode != code || gotBody != body {
		t.Errorf("%s: %d %q, not %d %q", path, gotCode, gotBody, code, body)
	}
}

func TestReadyzIsNegativeForAKeyThatDoesNotSign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk()
		d.says(t, "/readyz", http.StatusOK, "ready\n")
		d.fail(errors.New("the key of the issuing CA 0123 does not sign: the token is gone"))
		<-time.After(time.Second) // the outcome before serves for that long
		d.says(t, "/readyz", http.StatusServiceUnavailable, "not ready: the key of the issuing CA 0123 does not sign: the token is gone\n")
		d.says(t, "/healthz", http.StatusOK, "ok\n")
		d.fail(nil)
		<-time.After(time.Second)
		d.says(t, "/readyz", http.StatusOK, "ready\n")
	})
}

func TestReadyzListsWhatIsWrongThoughTheCAGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk()
		d.problems = []ca.Problem{{About: "issuing CA", Err: errors.New("the vault is sealed")}, {About: "clock", Err: errors.New("it jumped")}}
		const problems = "problem: issuing CA: the vault is sealed\nproblem: clock: it jumped\n"
		d.says(t, "/readyz", http.StatusOK, "ready\n"+problems)
		d.fail(errors.New("the disk is full"))
		<-time.After(time.Second)
		d.says(t, "/readyz", http.StatusServiceUnavailable, "not ready: the disk is full\n"+problems)
	})
}

func TestManyWhoAskShareOneProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk()
		for range 3 {
			before := d.probes.Load()
			var asking sync.WaitGroup
			for range 100 {
				asking.Go(func() { d.says(t, "/readyz", http.StatusOK, "ready\n") })
			}
			asking.Wait()
			if n := d.probes.Load() - before; n != 1 {
				t.Errorf("%d probes were made at one moment", n)
			}
			<-time.After(time.Second)
		}
	})
}

func TestAProbeThatHangsIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var probes atomic.Int64
		release := make(chan struct{})
		ready := &ops.Readiness{Probe: func(context.Context) error { // of a disk that hangs: its end does not come with the context's
			probes.Add(1)
			<-release
			return nil
		}}
		for range 10 {
			if err := ready.Check(); err == nil {
				t.Error("it is ready while nothing can be written")
			}
		}
		if n := probes.Load(); n != 1 {
			t.Errorf("%d probes hang", n)
		}
		close(release)
		synctest.Wait()
		if err := ready.Check(); err != nil {
			t.Errorf("when the disk works again: %v", err)
		}
	})
}

func TestWhatStopsIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk()
		d.says(t, "/readyz", http.StatusOK, "ready\n")
		d.Drain()
		d.says(t, "/readyz", http.StatusServiceUnavailable, "not ready: stopping\n")
	})
}
