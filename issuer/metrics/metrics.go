// Package metrics holds what the front doors count: Kedge's own names, and the citadel_server_* names on which the alerts of
// an Istio installation are built, so that they go on working when Kedge takes istiod's place.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/gate"
)

// Metrics are the counters of one CA. Make them with New.
type Metrics struct {
	requests *prometheus.CounterVec // kedge_csr_requests_total
	duration prometheus.Histogram   // kedge_csr_duration_seconds
	issued   *prometheus.CounterVec // kedge_certificates_issued_total
	clamped  prometheus.Counter     // kedge_ttl_clamped_total

	waited     prometheus.Histogram   // kedge_csr_wait_seconds
	refused    *prometheus.CounterVec // kedge_refused_total
	handshakes *prometheus.CounterVec // kedge_handshakes_total

	commitSeconds prometheus.Histogram // kedge_ledger_commit_duration_seconds
	commitEvents  prometheus.Histogram // kedge_ledger_commit_events
	commitFailed  prometheus.Counter   // kedge_ledger_commit_failures_total

	sdsStreams *prometheus.GaugeVec   // kedge_sds_streams
	sdsOpened  *prometheus.CounterVec // kedge_sds_opened_total
	sdsPushes  *prometheus.CounterVec // kedge_sds_pushes_total
	sdsAnswers *prometheus.CounterVec // kedge_sds_answers_total
	sdsFailed  prometheus.Counter     // kedge_sds_issue_failures_total

	csrCount, authFailures, csrParsing, success prometheus.Counter
	csrSign                                     *prometheus.CounterVec
}

// New registers everything with the registry.
func New(registry prometheus.Registerer) *Metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		registry.MustRegister(c)
		return c
	}
	vector := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		registry.MustRegister(c)
		return c
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
		registry.MustRegister(h)
		return h
	}
	seconds := prometheus.ExponentialBuckets(0.00025, 2, 16) // 0.25 ms to 8 s
	m := &Metrics{
		requests:      vector("kedge_csr_requests_total", "Calls of the CSR API, by how they ended.", "result"),
		duration:      histogram("kedge_csr_duration_seconds", "Time from the call to the answer of the CSR API.", seconds),
		issued:        vector("kedge_certificates_issued_total", "SVIDs handed out, by profile and by how the caller proved itself.", "profile", "method"),
		clamped:       counter("kedge_ttl_clamped_total", "SVIDs that were given the profile's maximum TTL because more was asked for."),
		waited:        histogram("kedge_csr_wait_seconds", "Time that calls of the CSR API waited for their turn.", seconds),
		refused:       vector("kedge_refused_total", "What was refused at the gate: connection, call, stream; idle-closed: an idle connection that made room for a new one; slow-closed: one whose client did not send the rest of a request; in-vain-closed: one of which a hundred calls in a row were refused or taken back.", "reason"),
		handshakes:    vector("kedge_handshakes_total", "TLS handshakes on the CSR API's port, by how they ended: good, failed.", "result"),
		commitSeconds: histogram("kedge_ledger_commit_duration_seconds", "Time of one ledger commit, until it is durable.", seconds),
		commitEvents:  histogram("kedge_ledger_commit_events", "Events in one ledger commit.", prometheus.ExponentialBuckets(1, 2, 10)),
		commitFailed:  counter("kedge_ledger_commit_failures_total", "Ledger commits that failed: the callers in them were refused."),
		sdsStreams:    prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "kedge_sds_streams", Help: "Streams of Envoys and other clients of SDS, by protocol: state-of-the-world, delta."}, []string{"kind"}),
		sdsOpened:     vector("kedge_sds_opened_total", "SDS streams and fetches that were asked for, by how that ended: opened, or why not; private-keys-off: an SVID was asked for, and sds.privateKeys is false.", "result"),
		sdsPushes:     vector("kedge_sds_pushes_total", "Secrets sent by SDS, by what they are.", "resource"),
		sdsAnswers:    vector("kedge_sds_answers_total", "What clients of SDS said of secrets: ack: they took it; nack: they did not, and go on with the one that they have.", "resource", "answer"),
		sdsFailed:     counter("kedge_sds_issue_failures_total", "SVIDs that could not be issued for an SDS stream, which is tried again."),
		csrCount:      counter("citadel_server_csr_count", "The number of CSRs received by Citadel server."),
		authFailures:  counter("citadel_server_authentication_failure_count", "The number of authentication failures."),
		csrParsing:    counter("citadel_server_csr_parsing_err_count", "The number of errors occurred when parsing the CSR."),
		csrSign:       vector("citadel_server_csr_sign_err_count", "The number of errors occurred when signing the CSR.", "error"),
		success:       counter("citadel_server_success_cert_issuance_count", "The number of certificates issuances that have succeeded."),
	}
	// What can be counted is there from the start, at 0, so that a rate of it can be told.
	for _, reason := range []string{gate.RefusedConnection, gate.RefusedCall, gate.RefusedStream, gate.ClosedIdle, gate.ClosedSlow, gate.ClosedInVain} {
		m.refused.WithLabelValues(reason)
	}
	registry.MustRegister(m.sdsStreams)
	for _, result := range []string{handshakeGood, handshakeFailed} {
		m.handshakes.WithLabelValues(result)
	}
	return m
}

// The results of a call of the CSR API.
const (
	ResultIssued          = "issued"
	ResultInvalid         = "invalid"
	ResultBadCSR          = "bad-csr"
	ResultUnauthenticated = "unauthenticated"
	ResultDenied          = "denied"
	ResultUnavailable     = "unavailable"
	ResultCanceled        = "canceled"
	ResultOpened          = "opened"           // an SDS stream
	ResultKeysOff         = "private-keys-off" // an SVID was asked for by SDS, and it is not configured that keys travel
	ResultUnread          = "unread"           // refused by gRPC itself, as when the message was too large
	ResultInternal        = "internal"
)

// Call counts a call that ended with result after d.
func (m *Metrics) Call(result string, d time.Duration) {
	m.csrCount.Inc()
	m.requests.WithLabelValues(result).Inc()
	m.duration.Observe(d.Seconds())
	switch result {
	case ResultIssued:
		m.success.Inc()
	case ResultBadCSR:
		m.csrParsing.Inc()
	case ResultUnauthenticated, ResultDenied:
		m.authFailures.Inc()
	case ResultInvalid, ResultUnread, ResultUnavailable, ResultInternal:
		m.csrSign.WithLabelValues(result).Inc()
	}
}

// ExpectSDS has what can be counted of SDS be there from the start; kinds are those of streams, resources those of secrets.
func (m *Metrics) ExpectSDS(kinds, resources []string) {
	for _, kind := range kinds {
		m.sdsStreams.WithLabelValues(kind)
	}
	for _, result := range []string{ResultOpened, ResultKeysOff} {
		m.sdsOpened.WithLabelValues(result)
	}
	for _, resource := range resources {
		m.sdsPushes.WithLabelValues(resource)
		for _, answer := range []string{answerAck, answerNack} {
			m.sdsAnswers.WithLabelValues(resource, answer)
		}
	}
}

// SDSStream counts a stream that began, or one less.
func (m *Metrics) SDSStream(kind string, more int) {
	m.sdsStreams.WithLabelValues(kind).Add(float64(more))
}

// SDSOpened counts an attempt to open an SDS stream.
func (m *Metrics) SDSOpened(result string) { m.sdsOpened.WithLabelValues(result).Inc() }

// SDSPushed counts a secret that was sent.
func (m *Metrics) SDSPushed(resource string) { m.sdsPushes.WithLabelValues(resource).Inc() }

// SDSAnswered counts what a client said of a secret.
func (m *Metrics) SDSAnswered(resource string, took bool) {
	answer := answerNack
	if took {
		answer = answerAck
	}
	m.sdsAnswers.WithLabelValues(resource, answer).Inc()
}

// SDSIssueFailed counts an SVID that could not be issued for an SDS stream.
func (m *Metrics) SDSIssueFailed() { m.sdsFailed.Inc() }

const (
	handshakeGood   = "good"
	handshakeFailed = "failed"

	answerAck  = "ack"
	answerNack = "nack"
)

// Handshake counts a TLS handshake.
func (m *Metrics) Handshake(err error) {
	result := handshakeGood
	if err != nil {
		result = handshakeFailed
	}
	m.handshakes.WithLabelValues(result).Inc()
}

// Unread counts a call that gRPC refused by itself.
func (m *Metrics) Unread(d time.Duration) { m.Call(ResultUnread, d) }

// Refused counts what was refused at the gate.
func (m *Metrics) Refused(reason string) { m.refused.WithLabelValues(reason).Inc() }

// Waited counts a call that had to wait for its turn.
func (m *Metrics) Waited(d time.Duration) { m.waited.Observe(d.Seconds()) }

// Issued counts an SVID.
func (m *Metrics) Issued(profile, method string, clamped bool) {
	m.issued.WithLabelValues(profile, method).Inc()
	if clamped {
		m.clamped.Inc()
	}
}

// Commit counts a commit of the ledger.
func (m *Metrics) Commit(c ledger.Commit) {
	if c.Err != nil {
		m.commitFailed.Inc()
		return
	}
	m.commitSeconds.Observe(c.Duration.Seconds())
	m.commitEvents.Observe(float64(c.Events))
}

// Collector reads the state of a CA when it is scraped.
type Collector struct {
	CA       *ca.CA
	Problems func() []ca.Problem // what is wrong though the CA goes on
	Gate     *gate.Gate          // of the CSR API's port
	Serving  func() time.Time    // when the serving certificate expires; zero while there is none
	SDS      func() SDS          // how the streams stand; nil: there are none
}

// SDS is how the streams of SDS stand.
type SDS struct {
	Behind int    // streams that have not acknowledged the CA's bundle
	Oldest uint64 // the oldest bundle that one acknowledged last; 0: none did
}

var (
	sdsBehindDesc   = prometheus.NewDesc("kedge_sds_streams_behind", "SDS streams that have not acknowledged the trust bundle of now: they ask for none, or wait for it, or did not take it.", nil, nil)
	sdsOldestDesc   = prometheus.NewDesc("kedge_sds_oldest_bundle", "Sequence number of the oldest trust bundle that an open SDS stream acknowledged last; 0 while none did.", nil, nil)
	authorityDesc   = prometheus.NewDesc("kedge_authority_not_after_timestamp_seconds", "When an authority that is not removed expires.", []string{"id", "role", "state"}, nil)
	liveDesc        = prometheus.NewDesc("kedge_live_certificates", "Unexpired certificates in the ledger's holdings.", nil, nil)
	sequenceDesc    = prometheus.NewDesc("kedge_bundle_sequence", "Sequence number of the trust bundle.", nil, nil)
	numberDesc      = prometheus.NewDesc("kedge_ledger_number", "Number of the ledger's last event.", nil, nil)
	faultDesc       = prometheus.NewDesc("kedge_ledger_fault", "1 while the ledger takes no event.", nil, nil)
	problemsDesc    = prometheus.NewDesc("kedge_problems", "How many things are wrong though the CA goes on: see kedge doctor.", nil, nil)
	problemDesc     = prometheus.NewDesc("kedge_problem", "1 for each thing that is wrong, while it is; with the file and the reason when a file is no good.", []string{"about", "file", "reason"}, nil)
	connectionsDesc = prometheus.NewDesc("kedge_connections", "Connections to the CSR API's port.", []string{"state"}, nil)
	waitingDesc     = prometheus.NewDesc("kedge_waiting", "Handshakes and calls that wait for their turn.", []string{"what"}, nil)
	servingDesc     = prometheus.NewDesc("kedge_serving_certificate_not_after_timestamp_seconds", "When the certificate of the CSR API's server expires; 0 while there is none.", nil, nil)
	rootDesc        = prometheus.NewDesc("citadel_server_root_cert_expiry_timestamp", "The unix timestamp, in seconds, when the root cert will expire.", nil, nil)
	chainDesc       = prometheus.NewDesc("citadel_server_cert_chain_expiry_timestamp", "The unix timestamp, in seconds, when the cert chain will expire.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{authorityDesc, liveDesc, sequenceDesc, numberDesc, faultDesc, problemsDesc, problemDesc, connectionsDesc, waitingDesc, servingDesc, rootDesc, chainDesc, sdsBehindDesc, sdsOldestDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c Collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	authorities, err := c.CA.Authorities()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(authorityDesc, err)
		return
	}
	var live uint64
	var root, chain time.Time
	for _, a := range authorities {
		if a.State == ledger.StateRemoved {
			continue
		}
		gauge(authorityDesc, float64(a.NotAfter.Unix()), a.ID.String()[:16], a.Role.String(), a.State.String())
		switch {
		case a.Role == ledger.RoleRoot:
			live += a.LiveSVIDs
			if root.IsZero() || a.NotAfter.Before(root) {
				root = a.NotAfter
			}
		case a.State == ledger.StateActive:
			chain = a.NotAfter
		}
	}
	gauge(liveDesc, float64(live))
	gauge(sequenceDesc, float64(c.CA.Bundle().Sequence))
	gauge(numberDesc, float64(c.CA.Ledger().Head().Number))
	var fault float64
	if c.CA.Ledger().Fault() != nil {
		fault = 1
	}
	gauge(faultDesc, fault)
	problems := c.Problems()
	gauge(problemsDesc, float64(len(problems)))
	for wrong := range distinct(problems) {
		gauge(problemDesc, 1, wrong.about, wrong.file, string(wrong.reason))
	}
	counts := c.Gate.Counts()
	gauge(connectionsDesc, float64(counts.Connections-counts.Idle), "busy")
	gauge(connectionsDesc, float64(counts.Idle), "idle")
	gauge(waitingDesc, float64(counts.WaitingHandshakes), "handshake")
	gauge(waitingDesc, float64(counts.WaitingCalls), "call")
	var serving float64
	if end := c.Serving(); !end.IsZero() {
		serving = float64(end.Unix())
	}
	gauge(servingDesc, serving)
	gauge(rootDesc, float64(root.Unix()))
	if c.SDS != nil {
		streams := c.SDS()
		gauge(sdsBehindDesc, float64(streams.Behind))
		gauge(sdsOldestDesc, float64(streams.Oldest))
	}
	if !chain.IsZero() {
		gauge(chainDesc, float64(chain.Unix()))
	}
}

// wrong is what monitoring is told of a problem.
type wrong struct {
	about, file string
	reason      ca.Reason
}

// distinct are the problems as monitoring tells them apart: a root that is away may be said twice, and Prometheus takes no sample twice.
func distinct(problems []ca.Problem) map[wrong]bool {
	all := map[wrong]bool{}
	for _, p := range problems {
		files := ca.FileErrors(p.Err)
		if len(files) == 0 {
			all[wrong{about: p.About}] = true
		}
		for _, f := range files {
			all[wrong{p.About, f.File, f.Reason}] = true
		}
	}
	return all
}
