// Package ops is the door for whoever operates the CA: /healthz, /readyz and /metrics over plain HTTP.
package ops

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kedge/ca"
)

const (
	probeLimit = 3 * time.Second // how long one probe of readiness may take
	hangLimit  = 4 * time.Second // how long anybody waits for one that does not heed that
	probeAge   = time.Second     // how long its outcome serves further calls: each probe costs a signature and an fsync
)

// Readiness answers whether the CA can sign and record now.
type Readiness struct {
	Probe func(context.Context) error

	mu       sync.Mutex
	at       time.Time     // when the last probe ended …
	err      error         // … with this outcome
	probing  chan struct{} // closed when the probe that is under way has ended; nil: none is
	draining bool
}

// Drain makes the CA unready for good: it is about to stop.
func (r *Readiness) Drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// Check probes, at most once a second however many ask. A probe that does not end, since the disk hangs, is an answer as well.
func (r *Readiness) Check() error {
	if probing := r.begin(); probing != nil {
		timer := time.NewTimer(hangLimit)
		defer timer.Stop()
		select {
		case <-probing:
		case <-timer.C:
			return fmt.Errorf("a probe signature and a durable write to the ledger take longer than %s: the disk or the key store hangs", hangLimit)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return errors.New("stopping")
	}
	return r.err
}

// begin returns the probe to wait for; nil when the last one was just now.
func (r *Readiness) begin() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.probing == nil && !r.draining && (r.at.IsZero() || time.Since(r.at) >= probeAge) {
		r.probing = make(chan struct{})
		go r.probe(r.probing)
	}
	return r.probing
}

// probe has one outcome for everybody who waits, so it ends with none of them.
func (r *Readiness) probe(done chan<- struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	err := r.Probe(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.at, r.probing = err, time.Now(), nil
	close(done)
}

// NewServer makes the HTTP server. problems lists what is wrong though the CA goes on; /readyz shows it below its verdict.
func NewServer(ready *Readiness, problems func() []ca.Problem, metrics prometheus.Gatherer) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := ready.Check(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, "not ready: %v\n", err)
		} else {
			fmt.Fprintln(w, "ready")
		}
		for _, problem := range problems() {
			fmt.Fprintf(w, "problem: %v\n", problem)
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
}
