package agent

import (
	"github.com/prometheus/client_golang/prometheus"
)

// collector reads the state of an agent when it is scraped.
type collector struct{ agent *Agent }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("kedge_agent_"+name, help, append([]string{"workload"}, labels...), nil)
}

var (
	expiryDesc      = describe("svid_not_after_timestamp_seconds", "When the workload's SVID expires; 0 while there is none.")
	issuedDesc      = describe("svids_issued_total", "SVIDs that the CA issued for the workload.")
	failedDesc      = describe("svid_failures_total", "Calls of the CA's CSR API that brought no SVID.")
	bundleDesc      = describe("bundle_sequence", "Sequence number of the trust bundle that is handed out.")
	toldDesc        = describe("bundle_acknowledged_sequence", "Sequence number of the trust bundle that the CA knows all consumers to have; 0: none yet.")
	consumersDesc   = describe("consumers", "Streams and files by which the workload gets its trust bundle.")
	connectionsDesc = describe("connections", "Connections to a socket.", "socket")
	refusedDesc     = describe("connections_refused_total", "Connections that were refused, since there were as many as there may be.", "socket")
)

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{expiryDesc, issuedDesc, failedDesc, bundleDesc, toldDesc, consumersDesc, connectionsDesc, refusedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	for n, i := range c.agent.identities {
		send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, v, append([]string{i.w.Name}, labels...)...)
		}
		i.mu.Lock()
		var expiry, sequence float64
		if i.now.SVID != nil {
			expiry = float64(i.now.SVID.NotAfter.Unix())
		}
		if i.bundle != nil {
			sequence = float64(i.bundle.Sequence)
		}
		issued, failures, told := float64(i.issued), float64(i.failures), float64(i.told)
		i.mu.Unlock()
		send(expiryDesc, prometheus.GaugeValue, expiry)
		send(issuedDesc, prometheus.CounterValue, issued)
		send(failedDesc, prometheus.CounterValue, failures)
		send(bundleDesc, prometheus.GaugeValue, sequence)
		send(toldDesc, prometheus.GaugeValue, told)
		send(consumersDesc, prometheus.GaugeValue, float64(i.consumers.count()))
		for _, l := range c.agent.doors[n].listeners {
			send(connectionsDesc, prometheus.GaugeValue, float64(l.open.Load()), l.path)
			send(refusedDesc, prometheus.CounterValue, float64(l.refused.Load()), l.path)
		}
	}
}
