package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// sample is what was measured, once a round.
type sample struct{ values []float64 }

func (s *sample) add(v float64) { s.values = append(s.values, v) }

// quantile is the smallest value that so many of the values do not exceed; NaN when there are none.
func (s *sample) quantile(q float64) float64 {
	if len(s.values) == 0 {
		return math.NaN()
	}
	slices.Sort(s.values)
	return s.values[min(int(math.Ceil(q*float64(len(s.values))))-1, len(s.values)-1)]
}

// median is the middle value, or the mean of the two in the middle.
func (s *sample) median() float64 {
	if len(s.values) == 0 {
		return math.NaN()
	}
	slices.Sort(s.values)
	n := len(s.values)
	return (s.values[n/2] + s.values[(n-1)/2]) / 2
}

func (s *sample) min() float64 { return slices.Min(s.values) }
func (s *sample) max() float64 { return slices.Max(s.values) }

// of writes the median and the spread.
func (s *sample) of(verb string) string {
	return fmt.Sprintf(verb+" ("+verb+"–"+verb+")", s.median(), s.min(), s.max())
}

// percent writes the median and the spread of shares.
func (s *sample) percent() string {
	return fmt.Sprintf("%.0f %% (%.0f–%.0f)", 100*s.median(), 100*s.min(), 100*s.max())
}

// verdict says whether an aim is met.
func verdict(met bool) string {
	if met {
		return "met"
	}
	return "**missed**"
}

// table is one in Markdown. A row is a line of cells with | between them.
type table struct{ strings.Builder }

func newTable(title, columns string) *table {
	t := &table{}
	fmt.Fprintf(t, "### %s\n\n| %s |\n|%s\n", title, columns, strings.Repeat(" --- |", strings.Count(columns, "|")+1))
	return t
}

func (t *table) row(format string, args ...any) { fmt.Fprintf(t, "| "+format+" |\n", args...) }

func costTables(rounds []costRound) string {
	costs := newTable("Server CPU for one certificate",
		"proof | workload key | Kedge, µs | Istio, µs | Kedge / Istio | aim | bare, µs | Kedge − bare, µs | aim")
	rates := newTable("The same calls: how many a second, and how Kedge's ledger took them",
		"proof | workload key | Kedge, 1/s | Istio, 1/s | records a commit | commit, ms on average")
	for _, sc := range scenarios {
		for _, kind := range keyKinds {
			key := [2]string{sc.name, kind}
			var kedge, istio, ratio, bare, over, kedgeRate, istioRate, perCommit, commit sample
			for _, r := range rounds {
				least := r.bare[bareCSR+kind] + r.bare[bareSign]
				for _, operation := range sc.bare {
					least += r.bare[operation]
				}
				kedge.add(r.kedge[key].cpu)
				istio.add(r.istio[key].cpu)
				ratio.add(r.kedge[key].cpu / r.istio[key].cpu)
				bare.add(least)
				over.add(r.kedge[key].cpu - least)
				kedgeRate.add(r.kedge[key].rate)
				istioRate.add(r.istio[key].rate)
				perCommit.add(r.kedge[key].commits.events.mean())
				commit.add(1000 * r.kedge[key].commits.seconds.mean())
			}
			aim := "–"
			if sc.over > 0 {
				aim = fmt.Sprintf("≤ %.0f µs: %s", sc.over, verdict(over.median() <= sc.over))
			}
			costs.row("%s | %s | %s | %s | %s | ≤ %.0f %%: %s | %s | %s | %s", sc.name, kind, kedge.of("%.0f"), istio.of("%.0f"), ratio.percent(),
				100*sc.share, verdict(ratio.median() <= sc.share), bare.of("%.0f"), over.of("%.0f"), aim)
			rates.row("%s | %s | %s | %s | %s | %s", sc.name, kind, kedgeRate.of("%.0f"), istioRate.of("%.0f"), perCommit.of("%.1f"), commit.of("%.2f"))
		}
	}
	parts := newTable("The bare cryptography, on both cores at once", "operation | the server's core, µs | the other core, µs")
	for _, operation := range []string{bareCSR + keyP256, bareCSR + keyRSA, bareToken, bareChain, bareSign, bareHandshake} {
		var here, there sample
		for _, r := range rounds {
			here.add(r.bare[operation])
			there.add(r.other[operation])
		}
		parts.row("%s | %s | %s", operation, here.of("%.1f"), there.of("%.1f"))
	}
	return costs.String() + "\n" + parts.String() + "\n" + rates.String()
}

func sizeTable(all []*ledgerSize) string {
	t := newTable("Server CPU for one certificate, by what is in the ledger",
		"ledger | events | file, MB | token, µs | compared with the small one | records a commit | client certificate, µs | compared with the small one")
	for _, size := range all {
		t.row("%s | %d | %d | %s | %s | %s | %s | %s", size.name, size.records, size.octets/1e6, size.cost[byToken.name].of("%.0f"), size.ratio[byToken.name].percent(),
			size.perCommit.of("%.1f"), size.cost[byCertificate.name].of("%.0f"), size.ratio[byCertificate.name].percent())
	}
	return t.String()
}

func latencyTable(rows []*latencyRow) string {
	t := newTable("Latency of a call with a token", "offered | calls a second | p50, ms | p99, ms | max, ms | commit p50, ms | commit p99, ms | aim | records a commit | "+
		"not answered | the generator was late by (p99), ms")
	const most = 10 // ms
	for _, row := range rows {
		t.row("%s | %s | %s | %s | %s | %s | %s | ≤ %d ms: %s | %s | %s | %s", row.name, row.rate.of("%.0f"), row.p50.of("%.2f"), row.p99.of("%.2f"), row.max.of("%.0f"),
			row.commit50.of("%.2f"), row.commit99.of("%.2f"), most, verdict(row.commit99.median() <= most), row.perCommit.of("%.1f"), row.failures.of("%.0f"), row.lag.of("%.2f"))
	}
	return t.String()
}

func overloadTable(rounds []overloadRound) string {
	t := newTable("Overload: twice the peak, in an open loop", "peak, 1/s | offered, 1/s | issued, 1/s | of the peak | aim | refused, 1/s | not answered at all | "+
		"p50, s | p99, s | the generator was late by (p99), ms")
	var peak, offered, goodput, share, refused, unanswered, p50, p99, lag sample
	for _, r := range rounds {
		peak.add(r.peak)
		offered.add(r.offered)
		goodput.add(r.goodput)
		share.add(r.share)
		refused.add(r.refused)
		unanswered.add(r.unanswered)
		p50.add(r.p50)
		p99.add(r.p99)
		lag.add(r.lag)
	}
	const least = 0.95
	t.row("%s | %s | %s | %s | ≥ %.0f %%: %s | %s | %s | %s | %s | %s", peak.of("%.0f"), offered.of("%.0f"), goodput.of("%.0f"), share.percent(), 100*least,
		verdict(share.median() >= least), refused.of("%.0f"), unanswered.of("%.0f"), p50.of("%.2f"), p99.of("%.2f"), lag.of("%.2f"))
	return t.String()
}

func profileText(sc scenario, cost float64, shares []share, flat string) string {
	t := newTable(fmt.Sprintf("Profile of Kedge: %s, P-256", sc.name), "what for | share | µs a certificate")
	for _, s := range shares {
		if s.part >= 0.0005 {
			t.row("%s | %.1f %% | %.1f", s.name, 100*s.part, cost*s.part)
		}
	}
	return fmt.Sprintf("%s\n```\n%s```\n\n", t.String(), flat)
}
