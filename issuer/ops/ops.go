// Package ops is the door for whoever operates the CA: /healthz, /readyz and /metrics over plain HTTP.
package ops

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	probeLimit = 3 * time.Second // how long one probe of readiness may take
	probeAge   = time.Second     // how long its outcome serves further calls: each probe costs a signature and an fsync
)

// Readiness answers whether the CA can sign and record now.
type Readiness struct {
	Probe func(context.Context) error

	mu       sync.Mutex
	at       time.Time
	err      error
	draining bool
}

// Drain makes the CA unready for good: it is about to stop.
func (r *Readiness) Drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// Check probes, at most once a second however many ask.
func (r *Readiness) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return fmt.Errorf("stopping")
	}
	if !r.at.IsZero() && time.Since(r.at) < probeAge {
		return r.err
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit) // its outcome is everybody's, so it does not end with one caller
	defer cancel()
	r.err, r.at = r.Probe(ctx), time.Now()
	return r.err
}

// NewServer makes the HTTP server. problems lists what is wrong though the CA goes on; /readyz shows it below its verdict.
func NewServer(ready *Readiness, problems func() []error, metrics prometheus.Gatherer) *http.Server {
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
