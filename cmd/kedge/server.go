package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"kedge/ca"
	"kedge/ca/atomicfile"
	"kedge/ca/ledger"
	"kedge/ca/pemfile"
	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
	"kedge/issuer/authn"
	"kedge/issuer/gate"
	"kedge/issuer/istio"
	"kedge/issuer/metrics"
	"kedge/issuer/ops"
	"kedge/issuer/reception"
	"kedge/issuer/sds"
	"kedge/issuer/serving"
)

// stopLimit is how long calls in flight may take when the CA stops.
const stopLimit = 20 * time.Second

// How long to wait until the file of root certificates is tried again: after the first failure, and at most.
const (
	rootsRetry    = time.Second
	maxRootsRetry = 10 * time.Second
)

// httpStopLimit is how long answers to admins and to monitoring may still take after that.
const httpStopLimit = 2 * time.Second

// maxMonitors is how many connections health and metrics may have at once.
const maxMonitors = 128

// server is a running CA with all its doors.
type server struct {
	config  *config.Config
	log     *slog.Logger
	level   *slog.LevelVar
	started time.Time

	dataDir string // absolute
	ca      *ca.CA
	mark    *highWater
	authn   *authn.Authenticator
	serving *serving.Certificate
	ready   *ops.Readiness
	gate    *gate.Gate
	grpc    *grpc.Server
	health  *health.Server
	http    []*http.Server
	csrAddr string
	opsAddr string
	closers []func() error // in the order in which they were added; run in the opposite one
	cancel  context.CancelFunc
	// endStreams ends what would otherwise hold up a stop: see istio.Connections.
	endStreams context.CancelFunc
	running    sync.WaitGroup
	failures   chan error // of what should run until the end
}

// errStopped says that the CA was told to stop before it had started.
var errStopped = errors.New("stopped before the CA had started")

// startServer brings the CA up, in the order in which one thing needs the other. What was opened is closed again when something fails, or
// when ctx ends: then the error is errStopped. What ends by itself, such as a full disk, fails no start: every door opens, and readiness says what is
// wrong.
func startServer(ctx context.Context, c *config.Config, log *slog.Logger, level *slog.LevelVar, began time.Time) (*server, error) {
	s := &server{config: c, log: log, level: level, started: began, failures: make(chan error, 1)}
	switch err := s.start(ctx); {
	case errors.Is(err, errStopped):
		return nil, cmp.Or(s.close(), err)
	case err != nil:
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// start looks at ctx between its steps, and finishes what it has begun: a root that was made and not recorded would be one whose past the ledger
// does not know.
func (s *server) start(ctx context.Context) (err error) {
	step := context.WithoutCancel(ctx)
	if ctx.Err() != nil {
		return errStopped
	}
	if s.dataDir, err = filepath.Abs(s.config.DataDir); err != nil {
		return fmt.Errorf("finding the data folder: %w", err)
	}
	if err := makeDataFolder(s.dataDir); err != nil {
		return err
	}
	release, err := ledger.Lock(s.dataDir)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, release)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	counters := metrics.New(registry)
	if err := s.openCA(step, counters); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errStopped
	}
	join, err := s.openAuthn(step)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errStopped
	}
	s.gate = gate.New(gate.Options{Connections: s.config.CSR.MaxConnections, Patience: s.config.CSR.SlowClientTimeout.Std(), Work: istio.IsCSR, Streams: sds.IsSDS,
		Logger: s.log, Metrics: counters})
	return s.open(step, counters, registry, join)
}

// openCA opens the ledger, the root and the key store, and the CA over them.
func (s *server) openCA(ctx context.Context, counters *metrics.Metrics) error {
	c := s.config
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	book, err := ledger.Open(s.dataDir, ledger.Options{TrustDomain: td.Name(), ProgramVersion: version, Retention: c.Ledger.Retention.Std(),
		ArchiveDir: c.Ledger.ArchiveDir, Logger: s.log, OnCommit: counters.Commit})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, book.Close)
	if s.mark, err = openHighWater(c.HighWaterFile(), s.dataDir, book, s.log); err != nil {
		return err
	}
	s.closers = append(s.closers, func() error { s.mark.save(); return nil })
	from, err := openOrigins(c, folders{keys: filepath.Join(s.dataDir, "keys"), tokens: caTokens(s.dataDir)}, s.log)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, from.close)
	profiles, err := c.SigningProfiles()
	if err != nil {
		return err
	}
	var others []*x509.Certificate
	for i, path := range c.Callers.ClientCertificates.OtherIssuers {
		certs, err := pemfile.ReadCertificates(path)
		if err != nil {
			return fmt.Errorf("callers.clientCertificates.otherIssuers[%d]: %w", i, err)
		}
		others = append(others, certs...)
	}
	clock := ca.SystemClock()
	guarded, err := ca.OpenGuardedClock(filepath.Join(s.dataDir, "clock.json"), clock, lastEvent(book))
	if err != nil {
		return err
	}
	s.ca, err = ca.Open(ctx, ca.Options{
		TrustDomain: td, Ledger: book, Root: from.root, Anchors: from.anchors, RootCoverage: from.coverage, ForeignWindow: c.Root.ForeignWindow.Std(),
		Keys: from.keys, Profiles: profiles,
		IssuingLifetime: c.IssuingCA.Lifetime.Std(), IssuingKey: ca.KeySpec(c.IssuingCA.KeyType), OtherIssuers: others,
		Clock: clock, Guarded: guarded, Logger: s.log,
	})
	if err != nil {
		return err
	}
	return from.recorded()
}

// open starts every door.
func (s *server) open(ctx context.Context, counters *metrics.Metrics, registry *prometheus.Registry, join *authn.JoinTokens) error {
	c := s.config
	tracing, err := openTracing(ctx, c.Tracing, s.log)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, tracing.close)
	if s.serving, err = serving.New(ctx, s.ca, c.CSR.ServerNames, c.CSR.ServerCertificateTTL.Std(), s.log); err != nil {
		return err
	}
	if err := atomicfile.Clean(s.rootFile()); err != nil {
		return err
	}
	s.noteRoots()
	var streams context.Context
	streams, s.endStreams = context.WithCancel(context.WithoutCancel(ctx))
	desk := &reception.Desk{Callers: s.authn, Metrics: counters, Log: s.log, Gate: s.gate, Waiting: c.CSR.WaitTimeout.Std()}
	door := &istio.Server{CA: s.ca, Desk: desk, Tracer: tracing.tracer, Timeout: c.CSR.CallTimeout.Std()}
	callers := sds.NewCallers(sds.CallersOptions{Desk: desk, CA: s.ca, PrivateKeys: c.SDS.PrivateKeys, Timeout: c.CSR.CallTimeout.Std()})
	counters.ExpectSDS(sds.Kinds, sds.Resources)
	envoys := sds.New(sds.Options{Opener: callers, Ending: streams, Logger: s.log, Metrics: counters})
	s.grpc, s.health = istio.NewGRPCServer(door, s.serving.TLS(), istio.Connections{
		MaxAge: c.CSR.MaxConnectionAge.Std(), MaxAgeGrace: c.CSR.MaxConnectionAgeGrace.Std(), MinPing: c.CSR.KeepaliveMinTime.Std(),
		Ping: c.CSR.KeepaliveTime.Std(), PingTimeout: c.CSR.KeepaliveTimeout.Std(), Reflection: c.CSR.Reflection, Stats: tracing.stats,
		Streams: streams, SDS: envoys,
	})
	registry.MustRegister(metrics.Collector{CA: s.ca, Problems: s.problems, Gate: s.gate, Serving: s.serving.NotAfter,
		SDS: func() metrics.SDS { return callers.Stand(envoys) }})
	csr, err := listen("csr.listen", c.CSR.Listen, s.log)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, csr.Close)
	operations, err := listen("operations.listen", c.Operations.Listen, s.log)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, operations.Close)
	socket, err := admin.Listen(filepath.Join(s.dataDir, "admin.sock"))
	if err != nil {
		return err
	}
	s.csrAddr, s.opsAddr = csr.Addr().String(), operations.Addr().String()
	s.ready = &ops.Readiness{Probe: s.probe}

	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	s.run("authorities", func() error { return s.ca.Run(background) })
	s.run("high-water mark", func() error { return s.mark.run(background) })
	s.run("token issuers", func() error { return s.authn.Run(background) })
	s.run("serving certificate", func() error { return s.serving.Run(background) })
	s.run("root certificate file", func() error { return s.keepRoots(background) })
	s.run("SDS", func() error { return callers.Run(background) })
	s.run("gRPC health", func() error { return s.keepHealth(background) })
	s.run("CSR API", func() error { return s.grpc.Serve(s.gate.Listener(csr)) })
	monitors := gate.New(gate.Options{Connections: maxMonitors, Logger: s.log})
	s.serveHTTP("health and metrics", ops.NewServer(s.ready, s.problems, registry), monitors.Listener(operations))
	admins := &admin.Server{CA: s.ca, Join: join, Level: s.level, Log: s.log, Status: s.status, Version: version}
	s.serveHTTP("admin socket", admins.HTTP(), socket)
	return nil
}

// run starts something that ends only with the server.
func (s *server) run(what string, f func() error) {
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		if err := f(); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, context.Canceled) {
			select {
			case s.failures <- fmt.Errorf("%s: %w", what, err):
			default:
				s.log.Error("failed while stopping", "what", what, "error", err)
			}
		}
	}()
}

func (s *server) serveHTTP(what string, h *http.Server, l net.Listener) {
	h.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)
	s.http = append(s.http, h)
	s.run(what, func() error { return h.Serve(l) })
}

// wait runs until ctx ends or something fails that must not, and then stops in good order: unready first, then the calls in flight
// are answered, then everything else.
func (s *server) wait(ctx context.Context) error {
	var failed error
	select {
	case <-ctx.Done():
		s.log.Info("stopping: calls in flight are answered")
	case failed = <-s.failures:
		s.log.Error("stopping: something failed that the CA cannot do without", "error", failed)
	}
	s.ready.Drain()
	s.health.Shutdown()
	s.gate.Drain()
	s.endStreams()
	stopped := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(stopped)
	}()
	timer := time.NewTimer(stopLimit)
	select {
	case <-stopped:
	case <-timer.C:
		s.log.Warn("calls were cut off, since they took too long", "limit", stopLimit)
		s.grpc.Stop()
		<-stopped
	}
	timer.Stop()
	err := errors.Join(failed, s.close())
	s.log.Info("stopped")
	return err
}

// close ends everything that was started.
func (s *server) close() error {
	var errs []error
	for _, end := range []context.CancelFunc{s.cancel, s.endStreams} {
		if end != nil {
			end()
		}
	}
	limit, cancel := context.WithTimeout(context.Background(), httpStopLimit)
	defer cancel()
	for _, h := range s.http {
		if h.Shutdown(limit) != nil { // somebody reads very slowly
			errs = append(errs, h.Close())
		}
	}
	s.running.Wait()
	for i := len(s.closers) - 1; i >= 0; i-- {
		if err := s.closers[i](); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// rootFile is where the trust bundle stands for whoever needs it on this machine.
func (s *server) rootFile() string { return filepath.Join(s.dataDir, "root-cert.pem") }

func (s *server) writeRoots() error {
	text := []byte(s.ca.Bundle().PEM)
	if before, err := os.ReadFile(s.rootFile()); err == nil && string(before) == string(text) {
		return nil
	}
	return atomicfile.Write(s.rootFile(), text)
}

// noteRoots makes sure that the file holds the bundle of now. That it does not is a problem.
func (s *server) noteRoots() error {
	err := s.writeRoots()
	if err != nil {
		err = fmt.Errorf("agents on this machine do not get the trust bundle of now: %w", err)
	}
	s.ca.Note("root certificate file", err)
	return err
}

// keepRoots writes the file anew when the bundle changes, and after a failure until it works.
func (s *server) keepRoots(ctx context.Context) error {
	for wait := rootsRetry; ; {
		changed := s.ca.Changed()
		var again <-chan time.Time // never, unless it failed
		if s.noteRoots() == nil {
			wait = rootsRetry
		} else {
			again, wait = time.After(wait), min(2*wait, maxRootsRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}

// probe says whether a caller would get a certificate now: the CA signs and records, and the CSR API can prove itself.
func (s *server) probe(ctx context.Context) error {
	if err := s.ca.Ready(ctx); err != nil {
		return err
	}
	return s.serving.Ready()
}

// keepHealth lets gRPC's health service say what /readyz says.
func (s *server) keepHealth(ctx context.Context) error {
	ticker := time.NewTicker(5 * time.Second)
	defer ticker.Stop()
	for {
		state := grpc_health_v1.HealthCheckResponse_SERVING
		if s.ready.Check() != nil {
			state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		s.health.SetServingStatus("", state)
		s.health.SetServingStatus("istio.v1.auth.IstioCertificateService", state)
		s.health.SetServingStatus("envoy.service.secret.v3.SecretDiscoveryService", state)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// problems lists what is wrong though the CA goes on.
func (s *server) problems() []ca.Problem {
	all := s.ca.Problems()
	if err := s.mark.problem(); err != nil {
		all = append(all, ca.Problem{About: "high-water mark", Err: err})
	}
	for _, problem := range s.authn.Problems() {
		all = append(all, ca.Problem{About: "token issuer", Err: errors.New(problem)})
	}
	return all
}

func (s *server) status() admin.Status {
	head, bundle := s.ca.Ledger().Head(), s.ca.Bundle()
	status := admin.Status{
		Version: version, Started: s.started, TrustDomain: s.ca.TrustDomain().Name(), DataDir: s.dataDir, CSRAddress: s.csrAddr, OpsAddress: s.opsAddr,
		RootFile: s.rootFile(), Root: ca.AuthorityID(bundle.Roots[0]), Log: head.Log.String(), Number: head.Number, Bundle: bundle.Sequence,
		Problems: []string{}, LogLevel: s.level.Level().String(), Ready: true,
	}
	if err := s.ready.Check(); err != nil {
		status.Ready, status.NotReady = false, err.Error()
	}
	for _, problem := range s.problems() {
		status.Problems = append(status.Problems, problem.Error())
	}
	return status
}

// lastEvent is when the ledger's last event was recorded; zero when it has none.
func lastEvent(book *ledger.Ledger) time.Time {
	head := book.Head()
	if head.Number == 0 {
		return time.Time{}
	}
	return head.Time.Time()
}
